"""ShapeScenes: a pure function of (seed, index), and conditions that all tell the same truth."""

import re
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_edu.datasets.captions import relation, vocabulary
from ldm_edu.datasets.hashing import uniform
from ldm_edu.datasets.shapes import (
    COLOUR_NAMES,
    HELD_OUT,
    PAIRS,
    PALETTE,
    SHAPE_NAMES,
    ShapeScenes,
    object_masks,
)
from ldm_edu.runtime import UserError

NOUN = re.compile(rf"(?:(small|little|large|big) )?(?:({'|'.join(COLOUR_NAMES)}) )?({'|'.join(SHAPE_NAMES)})\b")
SIDE = re.compile(r"\b(?:above|below|(?:to the )?(left|right) of)\b")
SYNONYM = {"small": "small", "little": "small", "large": "large", "big": "large"}


@pytest.fixture(scope="module")
def many() -> ShapeScenes:
    return ShapeScenes(64, count=3000, seed=3)


# a pure function


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    index=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6),
    held_out=st.sampled_from(["exclude", "only"]),
    data=st.data(),
)
def test_a_scene_depends_on_seed_and_index_alone(
    seed: int, index: list[int], held_out: str, data: st.DataObject
):
    order = data.draw(st.permutations(range(len(index))))
    one, other = (ShapeScenes(32, count=2**31, seed=seed, held_out=held_out) for _ in range(2))
    together, shuffled = one.batch(index), other.batch([index[k] for k in order])
    for place, k in enumerate(order):
        alone = one[index[k]]
        assert alone["caption"] == together["caption"][k] == shuffled["caption"][place]
        for name in set(alone) - {"caption"}:
            # A picture's last bit may hang on how many pixels are computed at a time; nothing else may.
            slack = dict(atol=2e-6, rtol=0) if name in ("image", "low_resolution") else dict(atol=0, rtol=0)
            torch.testing.assert_close(alone[name], together[name][k], **slack)
            torch.testing.assert_close(alone[name], shuffled[name][place], **slack)


def test_the_scenes_are_those_that_the_checkpoints_learned():
    """Whoever changes what is drawn or said must train again."""
    scenes = ShapeScenes(64, seed=0)
    assert scenes.captions(range(4)) == [
        "one little orange square",
        "one large blue ring",
        "there is an orange ring above a red heart, and a green heart to the left of the red heart",
        "there is a small cyan cross",
    ]
    means = [[0.0649, 0.0629, 0.0177], [0.2062, 0.2869, 0.3081], [0.2747, 0.1709, 0.1004], [-0.2648, -0.2787, -0.2960]]
    torch.testing.assert_close(scenes.images(range(4)).mean((2, 3)), torch.tensor(means), atol=2e-4, rtol=0)
    held_out = {(SHAPE_NAMES[s], COLOUR_NAMES[c]) for s, c in PAIRS[HELD_OUT].tolist()}
    assert {("square", "red"), ("star", "orange"), ("heart", "yellow"), ("diamond", "purple")} < held_out


def test_other_seeds_and_indices_are_other_scenes(many: ShapeScenes):
    index = range(100)
    pictures = torch.cat([many.images(index), ShapeScenes(64, seed=4).images(index)])
    distance = (pictures[:, None, :, ::4, ::4] - pictures[None, :, :, ::4, ::4]).abs().mean((2, 3, 4))
    assert distance[~torch.eye(len(pictures), dtype=torch.bool)].min() > 0.01


def test_the_hash_is_uniform_and_its_fields_are_independent():
    index = torch.arange(20_000)
    draws = torch.stack([uniform(seed, index, field) for seed in (0, 1) for field in (0, 1, 40)])
    assert 0 <= draws.min() and draws.max() < 1
    torch.testing.assert_close(draws.mean(1), torch.full((6,), 0.5), atol=0.01, rtol=0)  # 5 standard errors
    torch.testing.assert_close(draws.var(1), torch.full((6,), 1 / 12), atol=0.003, rtol=0)
    torch.testing.assert_close(torch.corrcoef(draws), torch.eye(6), atol=0.035, rtol=0)
    assert torch.corrcoef(torch.stack([draws[0, 1:], draws[0, :-1]]))[0, 1].abs() < 0.035  # neighbours


# the picture


@pytest.mark.parametrize("size", [32, 47, 64, 256, 1024])
def test_pictures_at_every_size_show_the_same_scene(size: int):
    scenes = ShapeScenes(size, count=10, seed=5)
    images = scenes.images(range(2))
    assert images.shape == (2, 3, size, size) and images.dtype == torch.float32
    assert images.isfinite().all() and -1 <= images.min() and images.max() <= 1
    small = ShapeScenes(32, count=10, seed=5).images(range(2))
    shrunk = torch.nn.functional.interpolate(images, 32, mode="area")
    assert (shrunk - small).abs().mean() < 0.05


def test_boxes_fit_the_masks_and_objects_keep_apart(many: ShapeScenes):
    scenes, size = many.scenes(range(60)), 256
    inside, boxes = object_masks(scenes, size) > 0.5, scenes.boxes()
    assert inside.sum(1).max() == 1, "two objects overlap"
    assert scenes.count.unique().tolist() == [1, 2, 3]
    for i in range(len(scenes)):
        for k in range(3):
            if k >= scenes.count[i]:
                assert not inside[i, k].any() and not boxes[i, k].any()
                continue
            rows, columns = inside[i, k].any(1).nonzero(), inside[i, k].any(0).nonzero()
            tight = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (tight - boxes[i, k] * size).abs().max() <= 1.5, (i, k)
            assert 0 <= boxes[i, k].min() and boxes[i, k].max() <= 1


def test_neighbours_stand_clearly_to_one_side(many: ShapeScenes):
    drawn, sides = many.scenes(range(len(many))), []
    for i in range(len(many)):
        for a, b in pairwise(drawn.things(i)):
            across, down = a.x - b.x, a.y - b.y
            assert abs(abs(across) - abs(down)) >= 0.06  # no diagonals
            horizontal = "left of" if across < 0 else "right of"
            sides.append(horizontal if abs(across) > abs(down) else "above" if down < 0 else "below")
            assert relation(a, b) == sides[-1]
    shares = [sides.count(side) / len(sides) for side in ("above", "below", "left of", "right of")]
    assert min(shares) > 0.15 and sum(shares) == pytest.approx(1)


def test_all_conditions_agree_with_the_picture(many: ShapeScenes):
    index = torch.arange(80)
    batch, scenes = many.batch(index), many.scenes(index)
    assert torch.equal(batch["label"], batch["classes"][:, 0])
    assert torch.equal(batch["classes"] >= 0, scenes.present)
    palette, right = torch.tensor(list(PALETTE.values())) / 127.5 - 1, 0
    for i in range(len(index)):
        things, picture, semantic = scenes.things(i), batch["image"][i], batch["semantic_map"][i]
        assert set(semantic.unique().tolist()) == {0} | {1 + SHAPE_NAMES.index(t.shape) for t in things}
        colourful = picture.max(0).values - picture.min(0).values
        assert ((colourful > 0.44) == (semantic > 0)).float().mean() > 0.97
        for thing, box in zip(things, scenes.boxes()[i] * 64):
            left, top, right_, bottom = box.round().int().tolist()
            inside = semantic[top:bottom, left:right_] == 1 + SHAPE_NAMES.index(thing.shape)
            colour = picture[:, top:bottom, left:right_][:, inside].median(1).values
            right += COLOUR_NAMES[(palette - colour).norm(dim=1).argmin()] == thing.colour
    assert right == scenes.count.sum()
    averaged = batch["image"].unflatten(3, (16, 4)).unflatten(2, (16, 4)).mean((3, 5))
    torch.testing.assert_close(batch["low_resolution"], averaged)


def test_the_inpainting_mask_is_a_rectangle(many: ShapeScenes):
    masks = many.batch(range(100))["mask"]
    assert masks.shape == (100, 1, 64, 64) and set(masks.unique().tolist()) == {0, 1}
    rows, columns = masks.amax(3), masks.amax(2)
    assert torch.equal(masks, rows[..., None] * columns[..., None, :])
    for side in (rows, columns):
        assert side.diff(dim=-1).clamp(min=0).sum(-1).max() <= 1, "not in one piece"
        assert 0.2 * 64 <= side.sum(-1).min() and side.sum(-1).max() <= 0.65 * 64


# the captions


@pytest.mark.parametrize("full", [True, False])
def test_captions_say_what_the_scene_shows(many: ShapeScenes, full: bool):
    scenes, known = many.scenes(range(len(many))), set(vocabulary(SHAPE_NAMES, COLOUR_NAMES))
    phrasings, without_sizes, without_colours = set(), 0, Counter()
    for i, caption in enumerate(many.captions(range(len(many)), full=full)):
        things = set(scenes.things(i))
        assert len(things) == scenes.count[i]
        assert set(re.findall(r"\w+|[^\w\s]", caption)) <= known
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  |^ | $| ,", caption)
        nouns = list(NOUN.finditer(caption))
        meant = {m: [t for t in things if t.shape == m[3] and m[2] in (None, t.colour)] for m in nouns}
        assert {len(found) for found in meant.values()} == {1}, "a noun that could be two things, or none"
        meant = {m: found[0] for m, found in meant.items()}
        assert set(meant.values()) == things
        sizes = {t: SYNONYM[m[1]] for m, t in meant.items() if m[1]}
        assert sizes == {t: t.size for t in things} or (not full and not sizes)
        without_sizes += not sizes
        coloured = {t for m, t in meant.items() if m[2]}
        assert coloured.isdisjoint(t for m, t in meant.items() if not m[2]), "with its colour in one place only"
        without_colours[len(things), len(things - coloured)] += 1
        sides = list(SIDE.finditer(caption))
        assert len(sides) == len(things) - 1
        for side in sides:
            subject = [m for m in nouns if m.end() <= side.start()][-1]
            other = [m for m in nouns if m.start() >= side.end()][0]
            said = f"{side[1]} of" if side[1] else side[0]
            assert relation(meant[subject], meant[other]) == said, caption
        phrasings.add(SIDE.sub("SIDE", NOUN.sub("NOUN", re.sub(r"\ban?\b", "A", caption))))
    assert len(phrasings) >= 10
    assert without_sizes == 0 if full else 0.15 < without_sizes / len(many) < 0.25
    # (objects, those without a colour): how often
    some = Counter({key: n for key, n in without_colours.items() if key[1]})
    assert set(some) == (set() if full else {(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3)})
    assert full or 0.14 < some.total() / len(many) < 0.2, "one in five, unless a shape is there twice"


def test_the_vocabulary_holds_no_word_in_vain(many: ShapeScenes):
    said = {word for caption in many.captions(range(len(many))) for word in re.findall(r"\w+|,", caption)}
    assert said == set(vocabulary(SHAPE_NAMES, COLOUR_NAMES))


# pairs held out of training


def test_one_shape_of_each_colour_is_held_out():
    pairs = PAIRS[HELD_OUT]
    assert sorted(pairs[:, 0].tolist()) == sorted(pairs[:, 1].tolist()) == list(range(8))


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_pairs_are_never_in_training_and_always_first_otherwise(seed: int):
    forbidden = {tuple(pair) for pair in PAIRS[HELD_OUT].tolist()}
    found = {}
    for held_out in ("exclude", "only"):
        s = ShapeScenes(64, count=5000, seed=seed, held_out=held_out).scenes(range(5000))
        rows = zip(s.shape.tolist(), s.colour.tolist(), s.count.tolist())
        shown = [list(zip(shapes, colours))[:n] for shapes, colours, n in rows]
        assert all(len(set(pairs)) == len(pairs) for pairs in shown)
        found[held_out] = shown
    everything = {tuple(pair) for pair in PAIRS.tolist()}
    assert {pair for pairs in found["exclude"] for pair in pairs} == everything - forbidden
    assert {pairs[0] for pairs in found["only"]} == forbidden
    assert not forbidden & {pair for pairs in found["only"] for pair in pairs[1:]}


# wrong arguments


@pytest.mark.parametrize(
    "arguments, word",
    [
        (dict(size=31), "31"), (dict(size=1025), "1025"), (dict(size=-64), "-64"), (dict(count=0), "0"),
        (dict(count=-5), "-5"), (dict(objects=(0, 2)), "(0, 2)"), (dict(objects=(2, 1)), "(2, 1)"),
        (dict(objects=(1, 4)), "(1, 4)"), (dict(held_out="maybe"), "maybe"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(arguments: dict, word: str):
    with pytest.raises(UserError, match=re.escape(word)):
        ShapeScenes(**arguments)


@pytest.mark.parametrize("index", [-1, 10])
def test_an_index_out_of_range(index: int):
    with pytest.raises(IndexError, match=rf"\[{index}\].*0 \.\. 9"):
        ShapeScenes(count=10).images([index])
