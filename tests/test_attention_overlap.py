"""Where words look: the words are found in their captions, the boxes on the grid, and the known model looks there."""

import re
from statistics import fmean

import pytest
import torch
import typer.testing

from ldm_edu.cli import main
from ldm_edu.datasets.captions import Thing
from ldm_edu.datasets.shapes import ShapeScenes
from ldm_edu.evaluation.attention import (
    LARGEST_BOX,
    TIMESTEPS,
    WORDS,
    best,
    box_cover,
    box_of,
    measure_attention,
    overlap,
    overlaps,
    pairs,
    true_pairs,
)
from ldm_edu.pipeline import LatentDiffusion
from ldm_edu.runtime import UserError, noise
from ldm_edu.unet import attention_maps


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return LatentDiffusion.load("shapes-text", "cpu")


def test_a_box_covers_its_share_of_any_grid():
    boxes = torch.tensor([[0.25, 0.5, 0.75, 1.0], [0.1, 0.2, 0.4, 0.3]])
    for size in (4, 5, 8):
        cover = box_cover(boxes, size, size + 1)
        torch.testing.assert_close(cover.mean(1), torch.tensor([0.25, 0.03]))
    quarter = torch.zeros(4, 4)
    quarter[2:, 1:3] = 1  # rows go down, columns to the right
    torch.testing.assert_close(box_cover(boxes[0], 4, 4), quarter.flatten())


def test_the_box_of_a_thing_is_that_of_its_scene():
    drawn = ShapeScenes(64, 50, seed=3).scenes(range(50))
    for i in range(50):
        for thing, box in zip(drawn.things(i), drawn.boxes()[i], strict=False):
            torch.testing.assert_close(box_of(thing), box, rtol=0, atol=0.05 * 0.2 + 1e-6)


def test_the_overlap_is_1_for_equal_weights_and_4_inside_a_quarter():
    cover = box_cover(torch.tensor([0.25, 0.5, 0.75, 1.0]), 4, 4)
    for weights, ratio in ((torch.full((16,), 0.3), 1.0), (7 * cover, 4.0), (1 - cover, 0.0), (1 + cover, 1.6)):
        assert overlap(weights, cover).item() == pytest.approx(ratio)


def test_pairs_are_the_words_and_small_boxes_of_one_scene(model: LatentDiffusion):
    scenes = ShapeScenes(64, 200, seed=3)
    found, drawn = true_pairs(model, scenes), scenes.scenes(range(200))
    captions, boxes = scenes.captions(range(200), full=True), drawn.boxes()
    areas = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    small = drawn.present & (areas < LARGEST_BOX)
    assert len(found.own) == (small.sum(1) * drawn.count).sum() and found.own.sum() == small.sum()
    for scene, token, box, own in zip(*found, strict=True):
        words = re.findall(r"\w+|,", captions[scene])
        named = [(t.colour, t.shape) for t in drawn.things(scene)]
        this = boxes[scene, named.index((words[token], words[token + 1]))]
        assert own == (this == box).all() and "the" not in words[max(token - 1, 0) : token]


def test_pairs_of_what_was_read_leave_out_what_no_caption_names(model: LatentDiffusion):
    asked, unasked = Thing("star", "red", "small", 0.25, 0.3), Thing("ring", "blue", "small", 0.7, 0.6)
    found = pairs(model, ["a red star", "a small blue ring below the red star"], [[asked, unasked], [unasked]])
    assert [column.tolist() for column in (found.scene, found.token, found.own)] == [
        [0, 0, 1], [1, 1, 2], [True, False, True],
    ]  # fmt: skip
    torch.testing.assert_close(found.box, torch.stack([box_of(asked), box_of(unasked), box_of(unasked)]))
    assert len(pairs(model, ["a red star"], [[]]).box) == 0


def test_colour_words_look_at_their_object(model: LatentDiffusion):
    scenes = ShapeScenes(64, 70, seed=3)  # more than the encoder's batch
    found = true_pairs(model, scenes)
    ratios, layers = overlaps(model, scenes, found, timesteps=(900, 300))
    assert ratios.shape == (7, len(found.own), len(WORDS), 2, 5)
    assert layers[6] == "up.1.blocks.1.transformer.blocks.0.cross_attention"
    colour = ratios[6, :, 0, :, 4]
    assert colour[found.own].mean() > 4 > 1 > colour[~found.own].mean()
    assert colour[found.own & (found.scene >= 64)].mean() > 4
    torch.testing.assert_close(overlaps(model, scenes, found, timesteps=(300,)).ratios[..., 0, :], ratios[..., 1, :])


def test_with_another_picture_a_word_knows_only_the_sentence(model: LatentDiffusion):
    scenes = ShapeScenes(64, 40, seed=3)
    found = true_pairs(model, scenes)
    own, other = (overlaps(model, scenes, found, (300,), other_picture=x).ratios[6, found.own, 0, 0, 4] for x in (0, 1))
    assert other.mean() < own.mean() / 2
    with torch.no_grad():  # the picture of the scene before, with the noise of one's own
        before = model.to_latent(scenes.images([*range(39, 40), *range(39)]))
        noisy = model.schedule.add_noise(before, noise(before.shape[1:], range(40)), torch.full((40,), 300))
        with attention_maps(model.unet) as maps:
            model.unet(noisy, torch.full((40,), 300), model.context(scenes.captions(range(40), full=True)))
    weights = maps[6].probabilities.mean(1)[found.scene, :, found.token]
    expected = overlap(weights, box_cover(found.box, maps[6].height, maps[6].width))[found.own]
    torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-4)


def test_the_best_is_found_for_each_word():
    ratios = torch.ones(7, 4, len(WORDS), 2, 5)
    for word, (layer, head) in enumerate([(6, 0), (0, 4), (3, 2)]):
        ratios[layer, :, word, :, head] = 2
    ratios[2, 0, 0] = 4  # in one row alone
    assert best(ratios) == [(6, 0), (0, 4), (3, 2)]


def test_the_command(capsys: pytest.CaptureFixture):
    result = measure_attention(captions=6, seed=5)
    assert {*WORDS, "colour_other_box", "shape_layer", "both_head", "boxes"} <= result.keys()
    by_timestep = result["shape_by_timestep"]
    blind = result["shape_other_picture_by_timestep"]
    assert tuple(blind) == TIMESTEPS and fmean(blind.values()) == pytest.approx(result["shape_other_picture"], abs=1e-3)
    assert tuple(by_timestep) == TIMESTEPS and fmean(by_timestep.values()) == pytest.approx(result["shape"], abs=1e-3)
    for names in (["attention"], ["attention", "shapes-text"]):
        run = typer.testing.CliRunner().invoke(main, ["evaluate", *names, "--captions", "6", "--seed", "5"])
        assert run.exit_code == 0
        assert re.search(rf"^ +colour {result['colour']}$", run.stdout, flags=re.MULTILINE)
    with pytest.raises(UserError, match="seed 0"):
        measure_attention(seed=0)
    with pytest.raises(UserError, match="2 captions of seed 7, or those of seed 8, name too few small objects"):
        measure_attention(captions=2, seed=7)  # one object in each: nothing to compare a box with
