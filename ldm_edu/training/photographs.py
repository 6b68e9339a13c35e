"""Real photographs for training: Caltech-101, some of it kept aside, and random crops of them."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from torch import Tensor

from ldm_edu.datasets.folder import ImageFolder
from ldm_edu.datasets.public import PublicSet
from ldm_edu.runtime import REPOSITORY, UserError, data_folder, pick_device

HELD_OUT = REPOSITORY / "data" / "caltech101-held-out.json"

ABOUT = """Data: Caltech-101 (L. Fei-Fei, R. Fergus, P. Perona, CVPR Workshop 2004; the collection is tagged CC BY 4.0,
the photographs come from the web and their individual rights are not cleared: their copyright stays with their owners),
without pictures of identifiable people and protected characters, at 128 pixels, in random crops and mirrored: 4,642
pictures. 516 more were kept for measurements (`data/caltech101-held-out.json`). No picture of it is part of this
project. A folder `caltech101/train` under `$LDM_EDU_DATA` is used first; else, with a network, the set comes by itself,
whole but for those people, characters and 516 pictures.
Licence of the weights: MIT, as for the rest of this project; it covers no photograph."""


def photographs(split: str = "train", side: int = 128) -> tuple[Tensor, Tensor]:
    """Pictures, uint8 `(N, 3, side, side)`, and their labels, int64 `(N,)`.

    Args:
        split: "train", or "held-out", which nothing here trains on: of a folder of one's own every tenth picture, of
            the set that is fetched those that the committed first stages never saw.
    """
    folder = data_folder() / "caltech101" / "train"
    if folder.is_dir():
        pictures = ImageFolder(folder, side, check=False)
        images = pictures.as_tensor_cache()
        labels = torch.tensor(pictures.labels or [0] * len(images))  # no folders, no classes
        held_out = torch.arange(len(images)) % 10 == 0
    else:
        kept = json.loads(HELD_OUT.read_text(encoding="utf-8"))  # by class, as numbers of pictures
        public = PublicSet("caltech101", side)
        images, labels = public.as_tensor_cache()
        names = [public.classes[label] for label in labels]
        known = torch.tensor([name in kept for name in names])  # four classes of people and characters are not
        held_out = torch.tensor([i in kept.get(name, ()) for name, i in zip(names, public.pictures.index)])[known]
        images, labels = images[known], torch.tensor([list(kept).index(name) for name in names if name in kept])
    chosen = held_out if split == "held-out" else ~held_out
    return images[chosen], labels[chosen]


def random_crops(
    pictures: Tensor, count: int, size: int, generator: torch.Generator, recolour: bool = False
) -> tuple[Tensor, Tensor]:
    """`count` pictures drawn at random, cropped anywhere to `size` and every second one mirrored; and which they are.

    Args:
        recolour: shuffle red, green and blue of every second picture and make its colours up to four times as strong.
            Photographs have little colour: a first stage trained on them alone, and briefly, kept luminance and one
            axis of colour, and turned grass brown.

    Returns:
        Float pictures `(count, 3, size, size)` in [-1, 1], and their indices `(count,)`.

    Raises:
        UserError: the pictures are smaller than that.
    """
    if size > pictures.shape[-1]:
        raise UserError(f"A crop of {size} pixels does not fit in pictures of {pictures.shape[-1]}: lower size.")
    chosen = torch.randint(len(pictures), (count,), generator=generator)
    corners = torch.randint(pictures.shape[-1] - size + 1, (count, 2), generator=generator).tolist()
    crops = torch.stack(
        [
            pictures[i, :, top : top + size, left : left + size]
            for i, (top, left) in zip(chosen.tolist(), corners, strict=True)
        ]
    )
    mirrored = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    crops = torch.where(mirrored, crops.flip(-1), crops)
    if recolour:
        order = torch.rand(count, 3, generator=generator).argsort(dim=1)[:, :, None, None].expand_as(crops)
        shuffled = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
        strength = 1 + 3 * torch.rand(count, 1, 1, 1, generator=generator)
        recoloured = crops.gather(1, order).float()
        grey = recoloured.mean(dim=1, keepdim=True)
        recoloured = (grey + strength * (recoloured - grey)).clamp(0, 255)
        crops = torch.where(shuffled, recoloured, crops)
    return crops.float() / 127.5 - 1, chosen


def recoloured_crops(size: int) -> Callable[[int, torch.Generator], Tensor]:
    """`(count, generator)` to `random_crops` of the training photographs, recoloured, on the training device."""
    pictures, device = photographs()[0], pick_device()
    return lambda count, generator: random_crops(pictures, count, size, generator, recolour=True)[0].to(device)
