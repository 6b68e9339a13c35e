"""A folder of pictures as a torch Dataset, in the Hugging Face ImageFolder convention.

FOLDER/metadata.jsonl   a JSON object a line: file_name, and any of caption (or text), label, mask_file_name
FOLDER/CLASS/*.jpg      without metadata.jsonl: sub-folders are classes
FOLDER/*.jpg            without metadata.jsonl: pictures alone (sub-folders are then not looked into)
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from ldm_edu.datasets.images import crop_to_square, read_image, read_mask, resize
from ldm_edu.datasets.metadata import Entry, list_pictures, warn_skipped
from ldm_edu.runtime import UserError, progress

SIDES = re.compile(r"(?<![a-z])(top|bottom|upper|lower)?(left|right|((counter|anti)-?)?clockwise)", re.I)


def mentions_side(caption: str | None) -> bool:
    """Whether a mirrored picture would belie its caption: it says left, right or clockwise.

    Errs on the safe side: "leftover" counts, "bright" does not.
    """
    return caption is not None and SIDES.search(caption) is not None


class ImageFolder(Dataset):
    """Square pictures from a folder: `{"image": (3, size, size) in [-1, 1]}` and, where the folder has them,
    `"caption"` (str), `"label"` (int; `classes` holds the names) and `"mask"` (int64 `(size, size)`).

    By default a picture is its largest middle square, resized. With `augment` the square lies anywhere and
    has half to all of the short side (as in the paper's released code, `ldm/data/imagenet.py`), and every
    second picture is mirrored unless its caption mentions a side. Both follow from (seed, epoch, index)
    alone: the same in any order, worker or process. Call `set_epoch` before each pass.

    On opening, every picture is decoded once, so that a broken one is skipped and named now, not hours into
    a training. `check=False` leaves that out; reading a broken picture then raises UserError.

    Raises:
        UserError: missing or empty folder, unusable metadata, no readable picture, `size` not positive.
    """

    def __init__(
        self, folder: str | Path, size: int, *, augment: bool = False, seed: int = 0, check: bool = True
    ) -> None:
        if size < 1:
            raise UserError(f"size is {size}; it must be a positive number of pixels.")
        self.folder, self.size, self.augment, self.seed, self.epoch = Path(folder), size, augment, seed, 0
        self.entries = list_pictures(folder)
        if check:
            self._visit(lambda _, entry: _read(entry), desc="checking pictures")
        self.has_caption = any(entry.caption is not None for entry in self.entries)
        self.has_mask = self._all_or_none("mask")
        self.has_label = self._all_or_none("label")
        self.classes = self._class_names()
        self._numbers = {name: number for number, name in enumerate(self.classes)}

    def __len__(self) -> int:
        return len(self.entries)

    def set_epoch(self, epoch: int) -> None:
        """Draw other crops and flips than in other epochs."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Tensor | str | int]:
        index = range(len(self))[index]  # negative numbers count from the end; beyond it, IndexError
        entry = self.entries[index]
        image, mask = _read(entry)
        if self.augment:
            cut = self._draw_cut(index, image.shape[-2:], may_flip=not mentions_side(entry.caption))
        else:
            cut = crop_to_square
        item = {"image": resize(cut(image), self.size, self.size)}
        if mask is not None:
            item["mask"] = resize_mask(cut(mask), self.size)
        if self.has_caption:
            item["caption"] = entry.caption or ""
        if self.has_label:
            item["label"] = self._numbers.get(entry.label, entry.label)
        return item

    @property
    def captions(self) -> list[str]:
        """Every picture's caption, "" where it has none."""
        return [entry.caption or "" for entry in self.entries]

    @property
    def labels(self) -> list[int]:
        """Every picture's class number; empty if the folder has none."""
        if not self.has_label:
            return []
        return [self._numbers.get(entry.label, entry.label) for entry in self.entries]

    def as_tensor_cache(self) -> Tensor:
        """All pictures, decoded once: uint8 `(N, 3, size, size)`, middle squares, in the order of `entries`.

        For training on small pictures: `cache[i].float() / 127.5 - 1` is picture i, to half a level. Uses
        threads and shows a bar. A picture that cannot be read is dropped from this data set too, and named in
        a warning.
        """
        size = self.size
        cache = torch.empty(len(self), 3, size, size, dtype=torch.uint8)

        def read(index: int, entry: Entry) -> None:
            square = resize(crop_to_square(read_image(entry.path)), size, size)
            cache[index] = square.add(1).mul(127.5).round().to(torch.uint8)

        readable = self._visit(read, desc="reading pictures")
        return cache if len(readable) == len(cache) else cache[readable]

    def _visit(self, work: Callable[[int, Entry], None], desc: str) -> list[int]:
        """Call `work` on every picture in threads; drop those that raise UserError; return who stayed."""

        def attempt(numbered: tuple[int, Entry]) -> UserError | None:
            try:
                work(*numbered)
            except UserError as error:
                return error
            return None

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            attempts = threads.map(attempt, enumerate(self.entries))
            failures = list(progress(attempts, total=len(self), desc=desc))
        if all(failures):
            raise failures[0]
        if any(failures):
            warn_skipped([entry.path for entry, f in zip(self.entries, failures, strict=True) if f], "cannot be read")
            self.entries = [entry for entry, f in zip(self.entries, failures, strict=True) if not f]
        return [index for index, failure in enumerate(failures) if not failure]

    def _all_or_none(self, field: str) -> bool:
        lacking = [entry.path for entry in self.entries if getattr(entry, field) is None]
        if lacking and len(lacking) < len(self):
            raise UserError(
                f"{len(lacking)} of {len(self)} pictures in {self.folder} have no {field}, "
                f"the first is {lacking[0].name}. Give every picture a {field}, or none."
            )
        return not lacking

    def _class_names(self) -> list[str]:
        labels = {entry.label for entry in self.entries} if self.has_label else set()
        if all(isinstance(label, str) for label in labels):
            return sorted(labels)
        if not all(isinstance(label, int) and label >= 0 for label in labels):
            some = sorted(map(str, labels))[:10]
            raise UserError(f"{self.folder} has labels {some}; use names, or numbers from 0 on.")
        return [str(number) for number in range(max(labels) + 1)]

    def _draw_cut(self, index: int, shape: Sequence[int], may_flip: bool) -> Callable[[Tensor], Tensor]:
        """The function that cuts this epoch's square out of picture `index`, and out of its mask."""
        height, width = shape
        short = min(height, width)
        random = np.random.default_rng((self.seed, self.epoch, index))
        side = int(random.integers(max(short // 2, min(self.size, short)), short, endpoint=True))
        top, left = random.integers(0, (height - side, width - side), endpoint=True)
        flip = random.random() < 0.5 and may_flip

        def cut(image: Tensor) -> Tensor:
            square = image[..., top : top + side, left : left + side]
            return square.flip(-1) if flip else square

        return cut


def _read(entry: Entry) -> tuple[Tensor, Tensor | None]:
    """A picture (3, H, W) and its mask (H, W), if it has one."""
    image = read_image(entry.path)
    if entry.mask is None:
        return image, None
    mask = read_mask(entry.mask)
    if mask.shape != image.shape[1:]:
        (height, width), (mask_height, mask_width) = image.shape[1:], mask.shape
        raise UserError(f"{entry.mask} is {mask_width} x {mask_height}; its picture is {width} x {height}.")
    return image, mask


def resize_mask(mask: Tensor, size: int) -> Tensor:
    """Class numbers `(H, W)` resized to `(size, size)` by the nearest pixel: classes do not mix."""
    return F.interpolate(mask[None, None].float(), size=(size, size), mode="nearest-exact")[0, 0].long()
