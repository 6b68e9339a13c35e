"""The eight shapes as signed distance functions: negative inside, zero on the edge, positive outside.

Each is given in units of the object's radius, with y pointing down, and fits the box [-1, 1] x [-1, 1].
The formulas follow the usual constructions (folding by symmetry, then the distance to one edge).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def circle(x: Tensor, y: Tensor) -> Tensor:
    """A disc of radius 0.95."""
    return torch.hypot(x, y) - 0.95


def square(x: Tensor, y: Tensor) -> Tensor:
    """A square of half side 0.85."""
    return torch.maximum(x.abs(), y.abs()) - 0.85


def triangle(x: Tensor, y: Tensor) -> Tensor:
    """A triangle that stands on its base, its tip at (0, -1) and its base at y = 0.8."""
    slope = torch.tensor([1.8, 0.95]) / math.hypot(1.8, 0.95)
    return torch.maximum(slope[0].item() * x.abs() - slope[1].item() * (y + 1), y - 0.8)


def diamond(x: Tensor, y: Tensor) -> Tensor:
    """A square on its corner."""
    return (x.abs() + y.abs() - 1) / math.sqrt(2)


def star(x: Tensor, y: Tensor) -> Tensor:
    """A five-pointed star, one point up: the plane is folded ten times onto one edge, from tip to notch."""
    tip, notch, sector = 1.0, 0.45, math.pi / 5
    angle = torch.remainder(torch.atan2(x, -y) + sector, 2 * sector) - sector
    radius = torch.hypot(x, y)
    along, across = radius * angle.cos(), radius * angle.sin().abs()
    edge = (notch * math.cos(sector) - tip, notch * math.sin(sector))
    length = math.hypot(*edge)
    return ((along - tip) * edge[1] - across * edge[0]) / length


def ring(x: Tensor, y: Tensor) -> Tensor:
    """A ring between the radii 0.45 and 0.95."""
    return (torch.hypot(x, y) - 0.70).abs() - 0.25


def cross(x: Tensor, y: Tensor) -> Tensor:
    """A plus sign."""
    x, y = x.abs(), y.abs()
    return torch.maximum(torch.minimum(x, y) - 0.3, torch.maximum(x, y) - 0.92)


def heart(x: Tensor, y: Tensor) -> Tensor:
    """A heart: two quarter discs on a square that stands on its corner."""
    scale = 0.6
    x, y = x.abs() * scale, 0.55 - y * scale
    lobe = torch.hypot(x - 0.25, y - 0.75) - math.sqrt(2) / 4
    fold = 0.5 * (x + y).clamp(min=0)
    side = torch.minimum(torch.hypot(x, y - 1), torch.hypot(x - fold, y - fold)) * torch.sign(x - y)
    return torch.where(x + y > 1, lobe, side) / scale


SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": circle, "square": square, "triangle": triangle, "diamond": diamond,
    "star": star, "ring": ring, "cross": cross, "heart": heart,
}  # fmt: skip


def coverage(shape: Tensor, x: Tensor, y: Tensor, radius: Tensor, size: int) -> Tensor:
    """How much of each pixel an object covers, 0 to 1, with an edge one pixel wide: `(N, size, size)`.

    Args:
        shape: `(N,)` indices into SHAPES.
        x, y, radius: `(N,)` centre and radius, in units of the picture's side, y down.
        size: the picture's side in pixels.
    """
    centres = (torch.arange(size, device=x.device) + 0.5) / size
    result = torch.zeros(len(shape), size, size, device=x.device)
    for number, distance in enumerate(SHAPES.values()):
        (chosen,) = torch.nonzero(shape == number, as_tuple=True)
        if len(chosen):
            r = radius[chosen, None]
            across = ((centres - x[chosen, None]) / r)[:, None, :]
            down = ((centres - y[chosen, None]) / r)[:, :, None]
            edge = distance(*torch.broadcast_tensors(across, down)) * (r * size)[..., None]
            result[chosen] = (0.5 - edge).clamp_(0, 1)
    return result


def _measure() -> tuple[Tensor, Tensor, Tensor]:
    """Each shape's bounding box (left, top, right, bottom), area and centre of mass, in units of its radius."""
    size, n, span = 512, len(SHAPES), 2.5
    half = torch.full((n,), 0.5)
    cover = coverage(torch.arange(n), half, half, half * 2 / span, size)
    places = ((torch.arange(size) + 0.5) / size - 0.5) * span
    boxes = []
    for mask in cover > 0.5:
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    area = cover.sum((1, 2))
    centre = torch.stack([(cover.sum(1) * places).sum(1), (cover.sum(2) * places).sum(1)], 1) / area[:, None]
    return (torch.tensor(boxes) / size - 0.5) * span, area * (span / size) ** 2, centre


UNIT_BOXES, UNIT_AREAS, UNIT_CENTRES = _measure()
