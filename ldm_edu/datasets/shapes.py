"""ShapeScenes: a procedural picture set whose every condition is known exactly.

A scene is a pure function of (seed, index): one to three objects on a textured, shaded background. From the one
description come the picture at any resolution, its caption, class, boxes, semantic map, inpainting mask and
low-resolution copy: all the conditions of the paper (sections 3.3 and 4), with nothing to download.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ldm_edu.datasets.captions import SIZES, Thing, describe
from ldm_edu.datasets.hashing import choice, uniform
from ldm_edu.datasets.signed_distance import SHAPES, UNIT_BOXES, coverage
from ldm_edu.runtime import UserError

SHAPE_NAMES = tuple(SHAPES)
PALETTE = {
    "red": (214, 36, 40), "orange": (240, 128, 18), "yellow": (240, 216, 36), "green": (34, 158, 62),
    "cyan": (40, 200, 214), "blue": (40, 76, 214), "purple": (124, 44, 176), "pink": (240, 110, 180),
}  # fmt: skip
COLOUR_NAMES = tuple(PALETTE)
RADII = (0.135, 0.20)  # small, large; in units of the picture's side; each object varies by 5 %
MOST_OBJECTS, GAP, FRAME, CANDIDATES = 3, 0.04, 0.015, 64

# One shape of each colour (and one colour of each shape) is never shown in training.
PAIRS = torch.cartesian_prod(torch.arange(len(SHAPE_NAMES)), torch.arange(len(COLOUR_NAMES)))
HELD_OUT = (PAIRS[:, 0] - 3 * PAIRS[:, 1]) % 8 == 1


@dataclass
class Scenes:
    """B scenes side by side. Objects are `(B, 3)`, of which the first `count` exist; lengths are in picture sides."""

    index: Tensor
    count: Tensor
    shape: Tensor
    colour: Tensor
    large: Tensor
    x: Tensor
    y: Tensor
    radius: Tensor
    seed: int

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device | str) -> Scenes:
        """The same scenes with their tensors on `device`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Scenes(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in moved.items()})

    @property
    def present(self) -> Tensor:
        """`(B, 3)`: which of the three places holds an object."""
        return torch.arange(MOST_OBJECTS, device=self.count.device) < self.count[:, None]

    def things(self, i: int) -> tuple[Thing, ...]:
        """The objects of scene `i`, by name."""
        rows = zip(
            *(t[i].tolist() for t in (self.shape, self.colour, self.large, self.x, self.y)), strict=True
        )
        named = (Thing(SHAPE_NAMES[s], COLOUR_NAMES[c], SIZES[big], x, y) for s, c, big, x, y in rows)
        return tuple(named)[: int(self.count[i])]

    def boxes(self) -> Tensor:
        """`(B, 3, 4)` left, top, right, bottom in [0, 1]; zeros where there is no object."""
        centre = torch.stack([self.x, self.y, self.x, self.y], -1)
        box = centre + UNIT_BOXES.to(self.x.device)[self.shape] * self.radius[..., None]
        return box * self.present[..., None]


def draw_scenes(index: Tensor, seed: int, objects: tuple[int, int], held_out: str) -> Scenes:
    """The scenes with these indices. See `ShapeScenes` for the arguments."""
    count = objects[0] + choice(seed, index, 0, objects[1] - objects[0] + 1)
    seen, unseen = PAIRS[~HELD_OUT].to(index.device), PAIRS[HELD_OUT].to(index.device)
    n = len(seen)
    # Three different pairs of shape and colour: a first one, then two different steps away from it.
    first = choice(seed, index, 1, n)
    step1 = 1 + choice(seed, index, 2, n - 1)
    step2 = 1 + choice(seed, index, 3, n - 2)
    step2 = step2 + (step2 >= step1)
    pairs = seen[torch.stack([first, (first + step1) % n, (first + step2) % n], 1)]
    if held_out == "only":
        pairs[:, 0] = unseen[choice(seed, index, 1, len(unseen))]

    large = torch.stack([choice(seed, index, 4 + k, 2) for k in range(MOST_OBJECTS)], 1)
    vary = torch.stack([0.95 + 0.1 * uniform(seed, index, 7 + k) for k in range(MOST_OBJECTS)], 1)
    radius = torch.tensor(RADII, device=index.device)[large] * vary
    x, y = _places(index, seed, count, radius)
    return Scenes(index, count, pairs[..., 0], pairs[..., 1], large, x, y, radius, seed)


def _places(index: Tensor, seed: int, count: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Centres `(B, 3)` such that boxes keep a gap and each neighbour's side is beyond doubt: the first candidate
    that does, or a fixed layout that always does."""
    many = index[:, None] * CANDIDATES + torch.arange(CANDIDATES, device=index.device)
    r = radius[:, None]
    low, span = FRAME + r, 1 - 2 * (FRAME + r)
    x, y = (
        low + span * torch.stack([uniform(seed, many, field + k) for k in range(MOST_OBJECTS)], -1)
        for field in (20, 30)
    )
    layout = torch.tensor([[0.24, 0.74, 0.45], [0.24, 0.31, 0.775]], device=index.device)
    x = torch.cat([x, layout[0].expand(len(x), 1, -1)], 1)
    y = torch.cat([y, layout[1].expand(len(y), 1, -1)], 1)

    good = torch.ones(x.shape[:2], dtype=torch.bool, device=index.device)
    for a, b in ((0, 1), (1, 2), (0, 2)):
        across, down = (x[..., a] - x[..., b]).abs(), (y[..., a] - y[..., b]).abs()
        apart = torch.maximum(across, down) >= radius[:, None, a] + radius[:, None, b] + GAP
        clear = (across - down).abs() >= 0.1 if b == a + 1 else True
        good &= (apart & clear) | (count[:, None] <= b)
    good[:, -1] = True
    chosen = good.int().argmax(1)[:, None, None].expand(-1, 1, MOST_OBJECTS)
    return x.gather(1, chosen).squeeze(1), y.gather(1, chosen).squeeze(1)


def render(scenes: Scenes, size: int) -> Tensor:
    """The pictures of these scenes: `(B, 3, size, size)` in [-1, 1], on the scenes' device."""
    picture = _background(scenes, size)
    picture += _grain(scenes, size)
    palette = torch.tensor(list(PALETTE.values()), device=scenes.x.device) / 255
    pixel = (torch.arange(size, device=scenes.x.device) + 0.5) / size
    slant = [uniform(scenes.seed, scenes.index, 50 + k) - 0.5 for k in range(2)]
    for k, cover in enumerate(object_masks(scenes, size).unbind(1)):
        across = slant[0][:, None] * (pixel - scenes.x[:, k, None]) / scenes.radius[:, k, None]
        down = slant[1][:, None] * (pixel - scenes.y[:, k, None]) / scenes.radius[:, k, None]
        light = 1 + 0.2 * (across[:, None, :] + down[:, :, None])
        colour = palette[scenes.colour[:, k]][:, :, None, None] * light[:, None]
        picture = torch.lerp(picture, colour, cover[:, None])
    return picture.clamp_(0, 1).mul_(2).sub_(1)


def object_masks(scenes: Scenes, size: int) -> Tensor:
    """How much of each pixel each object covers: `(B, 3, size, size)` in [0, 1]."""
    present = scenes.present
    masks = torch.zeros(*present.shape, size, size, device=present.device)
    masks[present] = coverage(*(t[present] for t in (scenes.shape, scenes.x, scenes.y, scenes.radius)), size)
    return masks


def _background(scenes: Scenes, size: int) -> Tensor:
    """A greyish colour, shaded from one side to the other, with stripes or checks: `(B, 3, size, size)`."""

    def u(field: int) -> Tensor:
        return uniform(scenes.seed, scenes.index, field)

    pixel = (torch.arange(size, device=scenes.x.device) + 0.5) / size
    tint = torch.stack([u(60), u(61), u(62)], 1) - 0.5
    base = (0.22 + 0.6 * u(63))[:, None] + 0.08 * tint
    shade = 0.24 * (
        (u(64) - 0.5)[:, None, None] * (pixel - 0.5) + (u(65) - 0.5)[:, None, None] * (pixel[:, None] - 0.5)
    )
    frequency = 2 * torch.pi * (4 + 8 * u(66))[:, None]
    angle = 2 * torch.pi * u(67)[:, None]
    a, b = frequency * angle.cos() * pixel, frequency * angle.sin() * pixel
    sines, cosines = a.sin()[:, None, :], a.cos()[:, None, :]
    rows, columns = b.cos()[:, :, None], b.sin()[:, :, None]
    stripes = sines * rows + cosines * columns  # sin(a + b), without a sine for each pixel
    checks = sines * columns * 1.4
    kind = (u(68) < 0.5)[:, None, None]
    texture = (0.01 + 0.02 * u(69))[:, None, None] * torch.where(kind, stripes, checks)
    return base[:, :, None, None] + (shade + texture)[:, None]


def _grain(scenes: Scenes, size: int) -> Tensor:
    """Fine noise, a value for each pixel: detail that nobody misses, for the first stage to leave out."""
    pixels = torch.arange(size * size, device=scenes.index.device).view(1, size, size)
    grain = uniform(scenes.seed + 1, scenes.index[:, None, None] * 1_000_003 + pixels, 0) - 0.5
    return ((0.02 + 0.03 * uniform(scenes.seed, scenes.index, 70))[:, None, None] * grain)[:, None]


class ShapeScenes(Dataset):
    """The picture set: item i is a dictionary, always the same for the same (seed, i).

    Args:
        size: side in pixels, 32 to 1024.
        count: how many scenes.
        seed: training uses 0, evaluation 1: other seeds are other scenes.
        objects: the fewest and the most objects in a scene, within 1 to 3.
        held_out: "exclude" never shows the held-out pairs of shape and colour; "only" gives one to the first object.

    Raises:
        UserError: an argument out of range, with the range.
    """

    def __init__(
        self,
        size: int = 64,
        count: int = 100_000,
        seed: int = 0,
        objects: tuple[int, int] = (1, 3),
        held_out: str = "exclude",
        device: torch.device | str = "cpu",
    ) -> None:
        if not 32 <= size <= 1024:
            raise UserError(f"ShapeScenes renders pictures of 32 to 1024 pixels a side, not {size}.")
        if count < 1:
            raise UserError(f"ShapeScenes needs at least one scene, not {count}.")
        if not 0 <= seed < 2**32:
            raise UserError(f"The seed is an integer from 0 to 2**32 - 1, not {seed}.")
        if not 1 <= objects[0] <= objects[1] <= MOST_OBJECTS:
            raise UserError(f"A scene has one to three objects: objects=(1, 3), say, not {objects}.")
        if held_out not in ("exclude", "only"):
            raise UserError(f"held_out is 'exclude' or 'only', not {held_out!r}.")
        self.size, self.count, self.seed, self.device = size, count, seed, device
        self.objects, self.held_out = tuple(objects), held_out

    def __len__(self) -> int:
        return self.count

    def scenes(self, index: Tensor | Sequence[int]) -> Scenes:
        """The descriptions of these scenes."""
        index = torch.as_tensor(index, dtype=torch.int64, device=self.device)
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < self.count:
            raise IndexError(f"Scene {index.tolist()} is outside 0 .. {self.count - 1}.")
        return draw_scenes(index, self.seed, self.objects, self.held_out)

    def images(self, index: Tensor | Sequence[int]) -> Tensor:
        """The pictures of these scenes: `(B, 3, size, size)` in [-1, 1]."""
        return render(self.scenes(index), self.size)

    def captions(self, index: Tensor | Sequence[int], full: bool = False) -> list[str]:
        """A caption for each; `full` names every attribute, else sizes are sometimes left out."""
        scenes = self.scenes(index).to("cpu")  # it is read number by number
        words = [choice(self.seed, scenes.index, 80 + k, 1000).tolist() for k in range(4)]
        return [describe(scenes.things(i), [w[i] for w in words], full) for i in range(len(scenes))]

    def batch(self, index: Tensor | Sequence[int]) -> dict[str, Tensor | list[str]]:
        """Everything about these scenes: picture, caption, class, boxes, semantic map, mask, low-resolution copy.

        `label` (B,) the first object's shape; `boxes` (B, 3, 4) in [0, 1] with `classes` (B, 3), -1 where there is no
        object; `semantic_map` (B, size, size) 0 for background, 1 + shape for an object; `mask` (B, 1, size, size),
        1 where an inpainting model must paint; `low_resolution` (B, 3, size/4, size/4).
        """
        scenes = self.scenes(index)
        image = render(scenes, self.size)
        masks = object_masks(scenes, self.size)
        strongest, which = masks.max(1)
        classes = scenes.shape.masked_fill(~scenes.present, -1)
        return {
            "image": image,
            "caption": self.captions(index),
            "label": scenes.shape[:, 0],
            "boxes": scenes.boxes(),
            "classes": classes,
            "semantic_map": torch.where(
                strongest > 0.5, scenes.shape.gather(1, which.flatten(1)).view_as(which) + 1, 0
            ),
            "mask": self._mask(scenes),
            "low_resolution": F.avg_pool2d(image, 4),
        }

    def _mask(self, scenes: Scenes) -> Tensor:
        pixel = (torch.arange(self.size, device=scenes.x.device) + 0.5) / self.size
        sides = []
        for field in (90, 92):
            width = 0.25 + 0.35 * uniform(scenes.seed, scenes.index, field)
            start = (1 - width) * uniform(scenes.seed, scenes.index, field + 1)
            sides.append((pixel >= start[:, None]) & (pixel < (start + width)[:, None]))
        return (sides[0][:, None, None, :] & sides[1][:, None, :, None]).float()

    def __getitem__(self, i: int) -> dict[str, Tensor | str]:
        return {name: value[0] for name, value in self.batch([i]).items()}
