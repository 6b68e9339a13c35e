"""Public data sets: torchvision's, downloaded on first use, and scikit-image's photographs, already there.

Before you publish weights or pictures, look up the licence of the set you used.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm_edu.datasets.images import crop_to_square, from_levels, from_pillow, resize
from ldm_edu.runtime import UserError, data_folder, progress

# name: (class in torchvision.datasets, what each split is called there)
SETS = {
    "caltech101": ("Caltech101", {"train": {}}),  # comes unsplit
    "cifar10": ("CIFAR10", {"train": {"train": True}, "test": {"train": False}}),
    "cifar100": ("CIFAR100", {"train": {"train": True}, "test": {"train": False}}),
    "dtd": ("DTD", {"train": {"split": "train"}, "test": {"split": "test"}}),
    "fashion-mnist": ("FashionMNIST", {"train": {"train": True}, "test": {"train": False}}),
    "flowers102": ("Flowers102", {"train": {"split": "train"}, "test": {"split": "test"}}),
    "mnist": ("MNIST", {"train": {"train": True}, "test": {"train": False}}),
    "oxford-pets": ("OxfordIIITPet", {"train": {"split": "trainval"}, "test": {"split": "test"}}),
    "stl10": ("STL10", {"train": {"split": "train"}, "test": {"split": "test"}}),
}

PHOTOGRAPHS = ("chelsea", "coffee", "rocket", "hubble_deep_field", "brick", "grass", "gravel")


class PublicSet(Dataset):
    """One of torchvision's sets: items `{"image": (3, size, size) in [-1, 1], "label": int}`.

    `name` is a key of `SETS`, `split` is "train" or "test"; `classes` holds the labels' names. The files lie
    in `torchvision/` under `data_folder()`; what is not there is downloaded once, with a progress bar. A
    picture is its middle square, resized to `size`.

    Raises:
        UserError: unknown name or split, or no files and no way to download them.
    """

    def __init__(self, name: str, size: int, split: str = "train") -> None:
        if name not in SETS:
            raise UserError(f"There is no public set {name!r}. There are: {', '.join(SETS)}.")
        if split not in SETS[name][1]:
            raise UserError(f"{name} has no split {split!r}. It has: {', '.join(SETS[name][1])}.")
        self.name, self.size, self.split = name, size, split
        self.pictures = _open(name, split)
        self.classes = list(getattr(self.pictures, "classes", None) or self.pictures.categories)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        picture, label = self.pictures[index]
        image = crop_to_square(from_pillow(picture, f"picture {index} of {self.name}"))
        return {"image": resize(image, self.size, self.size), "label": int(label)}

    def as_tensor_cache(self) -> tuple[Tensor, Tensor]:
        """All pictures, uint8 `(N, 3, size, size)`, and their labels, int64 `(N,)`."""
        images = torch.empty(len(self), 3, self.size, self.size, dtype=torch.uint8)
        labels = torch.empty(len(self), dtype=torch.int64)
        for index in progress(range(len(self)), desc=f"reading {self.name}"):
            item = self[index]
            images[index], labels[index] = item["image"].add(1).mul(127.5).round(), item["label"]
        return images, labels


def _open(name: str, split: str) -> Dataset:
    from torchvision import datasets  # takes seconds to import

    folder = data_folder() / "torchvision"
    class_name, splits = SETS[name]
    make = getattr(datasets, class_name)
    try:
        return make(root=folder, download=False, **splits[split])
    except (RuntimeError, OSError):
        pass  # not there yet
    try:
        with _network_timeout(seconds=30):
            return make(root=folder, download=True, **splits[split])
    except (RuntimeError, OSError, ImportError) as error:
        python = f"from ldm_edu.datasets.public import PublicSet; PublicSet('{name}', 32)"
        raise UserError(
            f"The set {name} is not in {folder} and could not be downloaded ({error}).\n"
            f'On a computer with a network, run\n    LDM_EDU_DATA=FOLDER python -c "{python}"\n'
            f"and copy FOLDER/torchvision to {folder}."
        ) from error


@contextmanager
def _network_timeout(seconds: float) -> Iterator[None]:
    """A dead network fails after `seconds` of silence, not minutes; torchvision has no option for it."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def photographs(size: int | None = None) -> dict[str, Tensor]:
    """The photographs in the scikit-image package, by name: images `(3, H, W)` in [-1, 1], never downloaded.

    With `size`, their middle squares, resized to `(3, size, size)`.

    In colour: chelsea, a cat (300 x 451, CC0, Stefan van der Walt); coffee, a cup on wood (400 x 600, CC0,
    Rachel Michetti); rocket, a launch (427 x 640, public domain, SpaceX); hubble_deep_field (872 x 1000,
    public domain, NASA). Grey textures: brick, grass, gravel (512 x 512, CC0). Its pictures of people are
    left out. Source of the licences: the notes in `skimage.data`.
    """
    from skimage import data

    images = {name: from_levels(getattr(data, name)()) for name in PHOTOGRAPHS}
    if size is None:
        return images
    return {name: resize(crop_to_square(image), size, size) for name, image in images.items()}
