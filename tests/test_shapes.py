"""ShapeScenes: a pure function of (seed, index); conditions that all tell the same truth; and the reader."""

import re
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor

from ldm_edu.datasets.captions import Thing, relation, vocabulary
from ldm_edu.datasets.hashing import uniform
from ldm_edu.datasets.reader import agrees, read_scene, read_scenes
from ldm_edu.datasets.shapes import (
    COLOUR_NAMES,
    HELD_OUT,
    PAIRS,
    PALETTE,
    RADII,
    SHAPE_NAMES,
    ShapeScenes,
    object_masks,
)
from ldm_edu.datasets.signed_distance import coverage
from ldm_edu.runtime import UserError

NOUN = re.compile(rf"(?:(small|little|large|big) )?({'|'.join(COLOUR_NAMES)}) ({'|'.join(SHAPE_NAMES)})")
SIDE = re.compile(r"\b(?:above|below|(?:to the )?(left|right) of)\b")
SYNONYM = {"small": "small", "little": "small", "large": "large", "big": "large"}


@pytest.fixture(scope="module")
def many() -> ShapeScenes:
    return ShapeScenes(64, count=3000, seed=3)


def attributes(thing: Thing) -> tuple[str, str, str]:
    return thing.shape, thing.colour, thing.size


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
    phrasings, without_sizes = set(), 0
    for i, caption in enumerate(many.captions(range(len(many)), full=full)):
        things = {(t.colour, t.shape): t for t in scenes.things(i)}
        assert len(things) == scenes.count[i]
        assert set(re.findall(r"\w+|[^\w\s]", caption)) <= known
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  |^ | $| ,", caption)
        nouns = list(NOUN.finditer(caption))
        assert {m.group(2, 3) for m in nouns} == set(things)
        sizes = {m.group(2, 3): SYNONYM[m[1]] for m in nouns if m[1]}
        assert sizes == {pair: t.size for pair, t in things.items()} or (not full and not sizes)
        without_sizes += not sizes
        sides = list(SIDE.finditer(caption))
        assert len(sides) == len(things) - 1
        for side in sides:
            subject = [m for m in nouns if m.end() <= side.start()][-1]
            other = [m for m in nouns if m.start() >= side.end()][0]
            said = f"{side[1]} of" if side[1] else side[0]
            assert relation(things[subject.group(2, 3)], things[other.group(2, 3)]) == said, caption
        phrasings.add(SIDE.sub("SIDE", NOUN.sub("NOUN", re.sub(r"\ban?\b", "A", caption))))
    assert len(phrasings) >= 10
    assert without_sizes == 0 if full else 0.15 < without_sizes / len(many) < 0.25


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


# the reader

READ = 400


@pytest.fixture(scope="module")
def renders(many: ShapeScenes) -> Tensor:
    return many.images(range(READ))


@pytest.fixture(scope="module")
def wanted(many: ShapeScenes) -> list[tuple[Thing, ...]]:
    scenes = many.scenes(range(READ))
    return [scenes.things(i) for i in range(READ)]


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur, `sigma` in pixels."""
    return torch.from_numpy(ndimage.gaussian_filter(images.numpy(), (0, 0, sigma, sigma)))


def share_right(images: Tensor, wanted: list[tuple[Thing, ...]]) -> float:
    readings = read_scenes(images)
    return sum(agrees(reading, things) for reading, things in zip(readings, wanted)) / len(images)


def share_refused(images: Tensor) -> float:
    readings = read_scenes(images)
    assert all(bool(r.refused) != bool(r.things) for r in readings), "a reason or a reading, never both"
    return sum(bool(r.refused) for r in readings) / len(images)


def test_renders_are_read_right(renders: Tensor, wanted: list[tuple[Thing, ...]]):
    assert share_right(renders, wanted) >= 0.995


def test_so_are_8_bit_copies_and_mildly_blurred_ones(renders: Tensor, wanted: list[tuple[Thing, ...]]):
    assert share_right((renders * 127.5).round()[:100] / 127.5, wanted[:100]) >= 0.99
    assert share_right(blurred(renders[:100], 1.0), wanted[:100]) >= 0.95


@pytest.mark.parametrize("size, count", [(32, 60), (128, 40), (256, 12)])
def test_other_sizes_are_read(size: int, count: int):
    scenes = ShapeScenes(size, count=count, seed=6)
    drawn = scenes.scenes(range(count))
    assert share_right(scenes.images(range(count)), [drawn.things(i) for i in range(count)]) >= 0.95


def test_places_are_read_to_a_pixel(renders: Tensor, wanted: list[tuple[Thing, ...]]):
    for reading, things in zip(read_scenes(renders[:50]), wanted):
        places = {attributes(t): (t.x, t.y) for t in reading.things}
        for thing in things:
            assert places[attributes(thing)] == pytest.approx((thing.x, thing.y), abs=1 / 64)


def test_noise_is_refused():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(40, 3, 64, 64, generator=generator)
    flat = 2 * torch.rand(40, 3, 64, 64, generator=generator) - 1
    assert share_refused(torch.cat([normal, 0.3 * normal, flat])) == 1


@pytest.mark.parametrize("sigma", [2.5, 3.0, 4.0, 6.0])
def test_blurred_scenes_are_refused(renders: Tensor, sigma: float):
    assert share_refused(blurred(renders[:120], sigma)) >= 0.95


def test_blur_is_measured_against_the_picture_not_in_pixels():
    images = ShapeScenes(256, count=20, seed=6).images(range(20))
    assert share_refused(blurred(images, 3.0)) <= 0.05 and share_refused(blurred(images, 12.0)) >= 0.95


def test_half_mixed_scenes_are_refused(renders: Tensor):
    assert share_refused((renders + renders.roll(1, 0)) / 2) >= 0.95


def test_outlines_that_are_none_of_the_shapes_are_refused():
    down, across = torch.meshgrid(torch.arange(64) - 32.0, torch.arange(64) - 32.0, indexing="ij")
    box, disc = (across.abs() < 12) & (down.abs() < 12), torch.hypot(across, down) < 13
    outlines = [
        (across.abs() < 14) & (down.abs() < 4),  # a bar
        disc & (down > 0),  # half a disc
        disc & (torch.hypot(across - 6, down) > 11),  # a crescent
        box & ~((across > -4) & (down < 4)),  # an L
        box & ~((across.abs() < 6) & (down.abs() > 3)),  # an H
    ]
    red = (torch.tensor(PALETTE["red"]) / 127.5 - 1)[:, None, None]
    for outline in outlines:
        assert "none of the shapes" in read_scene(torch.where(outline, red, 0.0)).refused


def test_a_noisy_scene_is_not_read_as_another(renders: Tensor, wanted: list[tuple[Thing, ...]]):
    """Half-way through sampling a scene is neither noise nor picture: refuse it, or read it right."""
    generator = torch.Generator().manual_seed(0)
    for strength in (0.1, 0.3, 0.6):
        noise = torch.randn(100, 3, 64, 64, generator=generator)
        images = (1 - strength**2) ** 0.5 * renders[:100] + strength * noise
        assert share_refused(images) + share_right(images, wanted[:100]) >= 0.95


def test_a_reading_agrees_with_its_scene_only():
    star, circle = Thing("star", "red", "small", 0.5, 0.2), Thing("circle", "blue", "large", 0.5, 0.7)
    reading = read_scene(picture_of(star, circle))
    assert agrees(reading, (star, circle)) and agrees(reading, (circle, star))
    others = [
        (star,), (star, circle, circle), (star, star), (star._replace(shape="ring"), circle),
        (star, circle._replace(colour="cyan")), (star._replace(size="large"), circle),
        (star._replace(y=0.9), circle), (star._replace(x=0.1, y=0.6), circle),
    ]  # fmt: skip
    assert not [things for things in others if agrees(reading, things)]


def picture_of(*things: Thing) -> Tensor:
    """The things on plain grey, drawn by the package's own outlines."""
    picture = torch.zeros(3, 64, 64)
    for t in things:
        shape, radius = torch.tensor([SHAPE_NAMES.index(t.shape)]), torch.tensor([RADII[t.size == "large"]])
        cover = coverage(shape, *torch.tensor([[t.x], [t.y]]), radius, 64)
        picture = torch.lerp(picture, (torch.tensor(PALETTE[t.colour]) / 127.5 - 1)[:, None, None], cover)
    return picture


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from("constant random gradient stripes patches pixel nan infinite".split()),
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([8, 33, 64]),
    contrast=st.floats(0, 3),
)
def test_no_picture_makes_the_reader_raise(kind: str, seed: int, size: int, contrast: float):
    generator = torch.Generator().manual_seed(seed)
    colours = contrast * (2 * torch.rand(4, 3, 1, 1, generator=generator) - 1)
    line = torch.linspace(-1, 1, size)
    picture = colours[0].expand(3, size, size).clone()
    if kind in ("random", "nan", "infinite"):
        picture += torch.randn(3, size, size, generator=generator)
    if kind == "gradient":
        picture += colours[1] * line + colours[2] * line[:, None]
    if kind == "stripes":
        picture[..., ::3] = colours[1]
    if kind == "patches":
        for colour in colours[1:]:
            y, x, h, w = (torch.rand(4, generator=generator) * size).int().tolist()
            picture[:, y : y + h, x : x + w] = colour
    if kind == "pixel":
        picture[:, size // 2, size // 2] = colours[1, :, 0, 0]
    if kind in ("nan", "infinite"):
        picture[:, : size // 2] = float(kind[:3])
    reading = read_scene(picture)
    assert bool(reading.things) != bool(reading.refused) and len(reading.things) <= 3


def test_the_reader_takes_square_pictures_only():
    assert read_scenes(torch.zeros(0, 3, 64, 64)) == []
    for shape in [(3, 64, 64), (1, 1, 64, 64), (1, 3, 64, 32)]:
        with pytest.raises(UserError, match=re.escape(str(shape))):
            read_scenes(torch.zeros(shape))
