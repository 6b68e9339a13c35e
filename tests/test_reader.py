"""read_scenes: right on renders and what resembles them, and a refusal of everything else; it never raises."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor

from ldm_edu.datasets.captions import Thing
from ldm_edu.datasets.reader import agrees, read_scene, read_scenes
from ldm_edu.datasets.shapes import PALETTE, RADII, SHAPE_NAMES, ShapeScenes
from ldm_edu.datasets.signed_distance import coverage
from ldm_edu.runtime import UserError

READ = 400


@pytest.fixture(scope="module")
def many() -> ShapeScenes:
    return ShapeScenes(64, count=READ, seed=3)


def attributes(thing: Thing) -> tuple[str, str, str]:
    return thing.shape, thing.colour, thing.size


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
    for attribute, right in (("size", [5]), ("colour", [4]), ("shape", [3])):
        opened = [tuple(t._replace(**{attribute: None}) for t in things) for things in others]
        assert [i for i, things in enumerate(opened) if agrees(reading, things)] == right


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
