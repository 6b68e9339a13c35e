"""Real photographs for training: Caltech-101, a tenth of it kept aside, and random crops of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm_edu.datasets.folder import ImageFolder
from ldm_edu.datasets.public import PublicSet
from ldm_edu.runtime import UserError, data_folder

ABOUT = """Data: Caltech-101 (L. Fei-Fei, R. Fergus, P. Perona, CVPR Workshop 2004; the collection is tagged CC BY 4.0,
the photographs come from the web and their individual rights are not cleared: their copyright stays with their owners),
without pictures of identifiable people and protected characters, at 128 pixels, in random crops and mirrored; nine of
ten pictures, the tenth being kept for measurements. No picture of it is part of this project. With a network the set
comes by itself; a folder `caltech101/train` under `$LDM_EDU_DATA` is used first.
Licence of the weights: MIT, as for the rest of this project; it covers no photograph."""


def photographs(split: str = "train", side: int = 128) -> tuple[Tensor, Tensor]:
    """Pictures, uint8 `(N, 3, side, side)`, and their labels, int64 `(N,)`.

    Args:
        split: "train", or "held-out": every tenth picture, which nothing here trains on.
    """
    folder = data_folder() / "caltech101" / "train"
    if folder.is_dir():
        pictures = ImageFolder(folder, side, check=False)
        images = pictures.as_tensor_cache()
        labels = torch.tensor(pictures.labels or [0] * len(images))  # no folders, no classes
    else:
        images, labels = PublicSet("caltech101", side).as_tensor_cache()
    held_out = torch.arange(len(images)) % 10 == 0
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
