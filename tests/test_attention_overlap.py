"""Where words look: the words are found in their captions, the boxes on the grid, and the known model looks there."""

import re

import pytest
import torch
import typer.testing

from ldm_edu.cli import main
from ldm_edu.datasets.shapes import ShapeScenes
from ldm_edu.evaluation.attention import (
    LARGEST_BOX,
    WORDS,
    box_cover,
    measure_attention,
    overlap,
    overlaps,
    pairs,
)
from ldm_edu.pipeline import LatentDiffusion
from ldm_edu.runtime import UserError


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


def test_the_overlap_is_1_for_equal_weights_and_4_inside_a_quarter():
    cover = box_cover(torch.tensor([0.25, 0.5, 0.75, 1.0]), 4, 4)
    for weights, ratio in ((torch.full((16,), 0.3), 1.0), (7 * cover, 4.0), (1 - cover, 0.0), (1 + cover, 1.6)):
        assert overlap(weights, cover).item() == pytest.approx(ratio)


def test_pairs_are_the_words_and_small_boxes_of_one_scene(model: LatentDiffusion):
    scenes = ShapeScenes(64, 200, seed=3)
    found, drawn = pairs(model, scenes), scenes.scenes(range(200))
    captions, boxes = scenes.captions(range(200), full=True), drawn.boxes()
    areas = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    small = drawn.present & (areas < LARGEST_BOX)
    assert len(found.own) == (small.sum(1) * drawn.count).sum() and found.own.sum() == small.sum()
    for scene, token, box, own in zip(*found, strict=True):
        words = re.findall(r"\w+|,", captions[scene])
        named = [(t.colour, t.shape) for t in drawn.things(scene)]
        this = boxes[scene, named.index((words[token], words[token + 1]))]
        assert own == (this == box).all() and "the" not in words[max(token - 1, 0) : token]


def test_colour_words_look_at_their_object(model: LatentDiffusion):
    scenes = ShapeScenes(64, 70, seed=3)  # more than a batch
    found = pairs(model, scenes)
    ratios = overlaps(model, scenes, found, timesteps=(900, 300))
    assert len(ratios) == 7
    assert all(r.shape == (len(found.own), len(WORDS), 2, 5) for r in ratios.values())
    colour = ratios["up.1.blocks.1.transformer.blocks.0.cross_attention"][:, 0, :, -1]
    assert colour[found.own].mean() > 4 > 1 > colour[~found.own].mean()
    after = found.scene >= 64
    assert colour[found.own & after].mean() > 4


def test_the_command(capsys: pytest.CaptureFixture):
    result = measure_attention(captions=6, seed=5)
    assert {*WORDS, "colour_other_box", "shape_layer", "both_head", "boxes"} <= result.keys()
    run = typer.testing.CliRunner().invoke(main, ["evaluate", "attention", "--captions", "6", "--seed", "5"])
    assert run.exit_code == 0
    assert re.search(rf"^ +colour {result['colour']}$", run.stdout, flags=re.MULTILINE)
    with pytest.raises(UserError, match="seed 0"):
        measure_attention(seed=0)
