"""read_scene: what a ShapeScenes picture shows, recovered from the pixels alone.

With it, whether a sample follows its caption is measured, not judged. A picture that is no clear scene
(noise, blur, two scenes mixed) is refused: every object must have one of the eight colours, and its outline
must be sharp and agree with one of the eight shapes.
"""

from __future__ import annotations

from itertools import pairwise, permutations
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from ldm_edu.datasets.captions import SIZES, Thing, relation
from ldm_edu.datasets.shapes import COLOUR_NAMES, PALETTE, RADII, SHAPE_NAMES
from ldm_edu.datasets.signed_distance import UNIT_AREAS, UNIT_CENTRES, coverage
from ldm_edu.runtime import UserError, batches, refuse_bytes

FOREGROUND = 0.22  # least colourfulness (largest minus smallest channel, 0 to 1) of an object's pixels
SPECK = 0.0045  # smaller patches, in shares of the picture, are ignored; too many of them make it no scene
FARTHEST_COLOUR = 0.24  # from the palette, as a distance in RGB (0 to 1 each)
LEAST_OVERLAP = 0.75  # of an outline with its best shape, as intersection over union
# The widest outline, in picture sides. Renders have about 0.6 / 64, a first stage's copies 1.1 / 64. A blur
# of sigma 2 pixels in 64 makes it 2.5 / 64, and small shapes then begin to look like others.
SOFTEST_EDGE = 2.2 / 64


class Reading(NamedTuple):
    """The objects of a picture in no order, or why there is no reading (then `things` is empty)."""

    things: tuple[Thing, ...]
    refused: str = ""


class _Patch(NamedTuple):
    picture: int
    colour: int
    cover: np.ndarray  # (size, size) how much of each pixel it covers


def read_scenes(images: Tensor) -> list[Reading]:
    """Read pictures `(B, 3, S, S)` in [-1, 1]. See `Reading`.

    Raises:
        UserError: another shape, or integers.
    """
    refuse_bytes(images)
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise UserError(f"Scenes come as square pictures (B, 3, S, S); this is {tuple(images.shape)}.")
    pixels = ((images.detach().float().clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).cpu().numpy()
    patches, refused = [], {}
    for i, picture in enumerate(pixels):
        try:
            patches += _patches(i, picture)
        except _Refused as reason:
            refused[i] = str(reason)
    things: dict[int, list[Thing]] = {}
    for patch, thing in zip(patches, _match(patches, images.shape[-1]), strict=True):
        if thing is None:
            refused.setdefault(patch.picture, "an outline that is none of the shapes")
        else:
            things.setdefault(patch.picture, []).append(thing)
    readings = []
    for i in range(len(pixels)):
        found = tuple(things.get(i, ()))
        if i not in refused and not 1 <= len(found) <= 3:
            refused[i] = f"{len(found)} objects"
        readings.append(Reading((), refused[i]) if i in refused else Reading(found))
    return readings


def read_scene(image: Tensor) -> Reading:
    """Read one picture `(3, S, S)` in [-1, 1]."""
    return read_scenes(image[None])[0]


def agrees(reading: Reading, wanted: tuple[Thing, ...]) -> bool:
    """Whether a reading shows exactly these objects, and the relation of each to the next.

    A name of None is left open."""

    def is_one(found: Thing, thing: Thing) -> bool:
        return all(word in (None, seen) for seen, word in zip(found[:3], thing[:3], strict=True))

    def shows(found: tuple[Thing, ...]) -> bool:
        sides = zip(pairwise(found), pairwise(wanted), strict=True)
        return all(map(is_one, found, wanted)) and all(relation(*seen) == relation(*said) for seen, said in sides)

    return len(reading.things) == len(wanted) and any(map(shows, permutations(reading.things)))


class _Refused(Exception):
    pass


_COLOURS = np.array(list(PALETTE.values())) / 255


def _patches(number: int, picture: np.ndarray) -> list[_Patch]:
    """The colourful patches of a picture, each with its colour and a soft outline."""
    size = len(picture)
    colourful = picture.max(-1) - picture.min(-1)
    labels, count = ndimage.label(colourful > FOREGROUND, structure=np.ones((3, 3)))
    if count > 40:
        raise _Refused("too many coloured specks")
    areas = np.bincount(labels.ravel())[1:]
    big = [k + 1 for k in np.flatnonzero(areas >= SPECK * size * size)]
    if areas.sum() - areas[[k - 1 for k in big]].sum() > 0.01 * size * size:
        raise _Refused("coloured specks")
    return [_measure(number, picture, colourful, labels == k) for k in big]


def _measure(number: int, picture: np.ndarray, colourful: np.ndarray, mask: np.ndarray) -> _Patch:
    size = len(picture)
    inner = ndimage.binary_erosion(mask)
    core = picture[inner] if inner.sum() >= 6 else picture[mask]
    mean = np.median(core, axis=0)
    distances = np.linalg.norm(_COLOURS - mean, axis=1)
    colour = int(distances.argmin())
    if distances[colour] > FARTHEST_COLOUR:
        raise _Refused("a colour that is none of the palette's")
    # Along the line from the background's colour to the object's: 0 outside, 1 inside.
    around = ndimage.binary_dilation(mask, iterations=max(3, size // 16))
    near = ndimage.binary_dilation(mask, iterations=max(2, size // 32))
    outside = picture[around & ~near & (colourful < FOREGROUND)]
    background = np.median(outside, axis=0) if len(outside) else np.full(3, 0.5)
    direction = mean - background
    cover = (picture - background) @ direction / max(direction @ direction, 1e-6) * near
    cover = np.clip((cover - 0.1) / 0.8, 0, 1).astype(np.float32)  # without the texture's faint traces
    if cover.sum() < 4:
        raise _Refused("a patch without an inside")
    if _edge_width(cover) > SOFTEST_EDGE * max(size, 64):
        raise _Refused("blurred outlines")
    return _Patch(number, colour, cover)


def _edge_width(cover: np.ndarray) -> float:
    """How wide a patch's outline is, in pixels: the area neither in nor out, over the outline's length."""
    down, across = np.gradient(cover)
    length = np.hypot(down, across).sum()  # the total variation of a mask is its perimeter
    return float((4 * cover * (1 - cover)).sum() / max(length, 1e-6))


def _match(patches: list[_Patch], size: int) -> list[Thing | None]:
    """The shape whose outline fits each patch best, with its size and centre; None where none fits well."""
    results: list[Thing | None] = []
    places = (torch.arange(size) + 0.5) / size
    for part in (patches[b] for b in batches(len(patches), 64)):
        cover = torch.from_numpy(np.stack([p.cover for p in part]))
        mass = cover.sum((1, 2))
        middle = torch.stack([(cover.sum(k) * places).sum(1) for k in (1, 2)], 1) / mass[:, None]
        # The radius and centre with which each shape would have this area and centre of mass.
        radius = (mass[:, None] / size**2 / UNIT_AREAS).sqrt()
        centre = middle[:, None] - UNIT_CENTRES * radius[..., None]
        overlap = _overlap(cover, centre, radius, size)
        scores, shapes = overlap.max(1)
        for i, (score, shape) in enumerate(zip(scores.tolist(), shapes.tolist(), strict=True)):
            r = radius[i, shape].item()
            if score < LEAST_OVERLAP or not RADII[0] * 0.75 < r < RADII[1] * 1.25:
                results.append(None)
                continue
            x, y = centre[i, shape].tolist()
            big = r > (RADII[0] * RADII[1]) ** 0.5
            results.append(Thing(SHAPE_NAMES[shape], COLOUR_NAMES[part[i].colour], SIZES[big], x, y))
    return results


def _overlap(cover: Tensor, centre: Tensor, radius: Tensor, size: int) -> Tensor:
    """Intersection over union of each patch (N, size, size) with each shape in its place: (N, shapes)."""
    n, kinds = radius.shape
    shape = torch.arange(kinds).repeat(n)
    x, y = centre.flatten(0, 1).unbind(1)
    drawn = coverage(shape, x, y, radius.flatten(), size).view(n, kinds, size, size)
    both = torch.minimum(cover[:, None], drawn).sum((2, 3))
    return both / (cover.sum((1, 2))[:, None] + drawn.sum((2, 3)) - both)
