"""Public sets: what is there is read, what is not is asked for in words, and photographs need no network."""

import socket
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm_edu.datasets.public import PHOTOGRAPHS, SETS, PublicSet, photographs
from ldm_edu.runtime import UserError


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to reach a network fails at once."""

    def refuse(*_, **__):
        raise OSError("the test has no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LDM_EDU_DATA", str(tmp_path))
    return tmp_path


def test_what_is_there_is_read(data: Path, offline: None):
    """Three digits in MNIST's own format, where torchvision would have put them."""
    folder = data / "torchvision" / "MNIST" / "raw"
    folder.mkdir(parents=True)
    digits = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    for split in ("train", "t10k"):
        pictures = struct.pack(">IIII", 0x803, 3, 28, 28) + digits.tobytes()
        (folder / f"{split}-images-idx3-ubyte").write_bytes(pictures)
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 3) + bytes([7, 0, 9]))
    mnist = PublicSet("mnist", 28, split="test")
    assert len(mnist) == 3 and len(mnist.classes) == 10
    item = mnist[0]
    assert item["label"] == 7
    torch.testing.assert_close(
        item["image"], torch.from_numpy(digits[0] / 127.5 - 1).float().expand(3, -1, -1)
    )
    images, labels = mnist.as_tensor_cache()
    assert labels.tolist() == [7, 0, 9] and (images[:, 1].numpy() == digits).all()


@pytest.mark.parametrize("name", SETS)
def test_offline_says_which_set_and_what_to_do(data: Path, offline: None, name: str):
    with pytest.raises(UserError) as caught:
        PublicSet(name, 32)
    message = str(caught.value)
    assert name in message and str(data / "torchvision") in message and "the test has no network" in message
    assert f"PublicSet('{name}', 32)" in message
    assert socket.getdefaulttimeout() is None


def test_unknown_set_and_split():
    with pytest.raises(UserError, match=r"no public set 'imagenet'.*cifar10"):
        PublicSet("imagenet", 32)
    with pytest.raises(UserError, match=r"caltech101 has no split 'test'.*train"):
        PublicSet("caltech101", 32, split="test")


def test_photographs_need_no_network(offline: None):
    photos = photographs()
    assert tuple(photos) == PHOTOGRAPHS and photos["chelsea"].shape == (3, 300, 451)
    assert all(-1 <= photo.min() and photo.max() <= 1 and photo.std() > 0.1 for photo in photos.values())


def test_photographs_of_one_size():
    assert torch.stack(list(photographs(64).values())).shape == (len(PHOTOGRAPHS), 3, 64, 64)
