"""The photographs that first stages learn from: which are kept aside, and random crops of the others."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm_edu.autoencoder import PerceptualConfig, PerceptualNetwork
from ldm_edu.runtime import UserError
from ldm_edu.training import perceptual
from ldm_edu.training import photographs as module
from ldm_edu.training.perceptual import PerceptualSettings, train_perceptual
from ldm_edu.training.photographs import HELD_OUT, photographs, random_crops


def crop_of(picture: Tensor, crop: Tensor) -> set[bool]:
    """Whether the crop is found in the picture as it is (False), mirrored (True), or both."""
    size = crop.shape[-1]
    windows = picture.unfold(1, size, 1).unfold(2, size, 1).movedim(0, 2)
    return {flip for flip in (False, True) if (windows == (crop.flip(-1) if flip else crop)).flatten(2).all(2).any()}


def test_random_crops_are_crops_and_mirrored_crops():
    pictures = torch.randint(256, (5, 3, 12, 12), generator=torch.Generator().manual_seed(0)).to(torch.uint8)

    def draw(seed: int) -> tuple[Tensor, Tensor]:
        return random_crops(pictures, 200, 7, torch.Generator().manual_seed(seed))

    crops, chosen = draw(1)
    assert crops.shape == (200, 3, 7, 7) and crops.dtype == torch.float32
    assert chosen.unique().tolist() == [0, 1, 2, 3, 4]
    found = [crop_of(pictures[i].float() / 127.5 - 1, crop) for i, crop in zip(chosen.tolist(), crops)]
    assert all(len(f) == 1 for f in found)
    assert 60 < sum(f == {True} for f in found) < 140
    corners = {tuple(c[0, 0, :2].tolist()) for c in crops}
    assert len(corners) > 100  # from anywhere
    again, other = draw(1), draw(2)
    assert torch.equal(again[0], crops) and torch.equal(again[1], chosen) and not torch.equal(other[0], crops)
    whole = random_crops(pictures, 20, 12, torch.Generator().manual_seed(0))
    assert crop_of(pictures[whole[1][0]].float() / 127.5 - 1, whole[0][0])
    with pytest.raises(UserError, match="13 pixels.*of 12"):
        random_crops(pictures, 1, 13, torch.Generator())


def test_recoloured_crops_are_stronger_in_colour_and_as_bright():
    pictures = torch.randint(100, 130, (4, 3, 9, 9), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    pictures[3] = pictures[3, :1]  # grey

    def draw(recolour: bool) -> tuple[Tensor, Tensor]:
        return random_crops(pictures, 200, 9, torch.Generator().manual_seed(1), recolour)

    (plain, chosen), (strong, same) = draw(False), draw(True)
    assert torch.equal(chosen, same) and strong.abs().max() <= 1
    torch.testing.assert_close(strong.mean(1), plain.mean(1), atol=1e-5, rtol=0)
    changed = (strong - plain).flatten(1).abs().amax(1) > 1e-5
    assert 0.35 < changed[chosen != 3].float().mean() < 0.65 and not changed[chosen == 3].any()
    ratio = (strong.std(1) / plain.std(1).clamp_min(1e-6)).flatten(1).nanmedian(1).values[changed]
    assert 1 <= ratio.min() < 1.3 and 3.5 < ratio.max() <= 4.001


def test_every_tenth_photograph_is_kept_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LDM_EDU_DATA", str(tmp_path))
    for i in range(25):
        folder = tmp_path / "caltech101/train" / ("cats" if i < 15 else "dogs")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 2 * i, 0)).save(folder / f"{i:02}.png")
    train, labels = photographs(side=8)
    held_out, held_out_labels = photographs("held-out", side=8)
    assert train.shape == (22, 3, 8, 8) and train.dtype == torch.uint8
    assert held_out[:, 0, 0, 0].tolist() == [0, 10, 20] and held_out_labels.tolist() == [0, 0, 1]
    assert sorted(train[:, 0, 0, 0].tolist() + [0, 10, 20]) == list(range(25)) and labels.sum() == 9


def test_photographs_without_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LDM_EDU_DATA", str(tmp_path))
    (tmp_path / "caltech101/train").mkdir(parents=True)
    for i in range(12):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"caltech101/train/{i:02}.png")
    train, labels = photographs(side=8)
    assert train.shape == (10, 3, 8, 8) and labels.tolist() == [0] * 10  # enough for a first stage
    with pytest.raises(UserError, match="one class.*folder of its own"):
        train_perceptual("it", PerceptualConfig(), PerceptualSettings(steps=1), "", None)


def test_the_perceptual_network_learns_classes_and_comes_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    levels = torch.tensor([30, 220]).repeat(4)[:, None, None, None]  # dark ones and bright ones
    grain = torch.randint(20, (8, 3, 24, 24), generator=torch.Generator().manual_seed(0))
    drawn = (levels + grain).to(torch.uint8), torch.arange(8) % 2
    monkeypatch.setattr(perceptual, "photographs", lambda: drawn)
    settings = PerceptualSettings(steps=20, batch_size=8, size=16, learning_rate=0.02, log_every=10, save_every=20)
    folder, seen = str(tmp_path / "run"), []
    network = train_perceptual(
        "it", PerceptualConfig((4, 8)), settings, "What it is.", folder, on_step=lambda _, means: seen.append(means)
    )
    assert seen[-1]["accuracy"] > 0.9 and seen[-1]["loss"] < seen[0]["loss"]
    images = drawn[0].float() / 127.5 - 1
    for one, other in zip(network(images), PerceptualNetwork.load(f"{folder}/checkpoint")(images), strict=True):
        torch.testing.assert_close(one, other, atol=2e-2, rtol=2e-2)  # kept in half precision
    assert "What it is." in (tmp_path / "run/checkpoint/README.md").read_text()


def test_of_the_fetched_set_nothing_is_measured_on_that_the_committed_models_learned_from(monkeypatch, tmp_path: Path):
    """The whole set as torchvision orders it, each picture the colour of its class and number."""
    held_out = json.loads(HELD_OUT.read_text(encoding="utf-8"))
    assert len(held_out) == 97 and sum(map(len, held_out.values())) == 516
    names = sorted([*held_out, "Faces", "Faces_easy", "garfield", "snoopy"])

    class Fetched:
        classes, pictures = names, SimpleNamespace(index=[n for _ in names for n in range(1, 1001)])

        def __init__(self, name: str, size: int) -> None:
            assert (name, size) == ("caltech101", 2)

        def as_tensor_cache(self) -> tuple[Tensor, Tensor]:
            labels = torch.arange(len(names)).repeat_interleave(1000)
            colours = torch.stack([labels, torch.tensor(self.pictures.index) // 10 % 100, labels * 0], 1)
            return colours.to(torch.uint8)[:, :, None, None].expand(-1, 3, 2, 2), labels

    monkeypatch.setenv("LDM_EDU_DATA", str(tmp_path))
    monkeypatch.setattr(module, "PublicSet", Fetched)
    (images, labels), (kept, kept_labels) = photographs(side=2), photographs("held-out", side=2)
    assert len(kept) == 516 and len(images) == 97_000 - 516
    for pictures, numbers in ((images, labels), (kept, kept_labels)):
        assert [names[i] for i in pictures[:, 0, 0, 0]] == [list(held_out)[i] for i in numbers]
    assert kept[:, 1, 0, 0].tolist() == [n // 10 for numbers in held_out.values() for n in numbers]
