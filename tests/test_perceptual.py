"""The perceptual distance: a frozen yardstick that lets gradients through, and that ranks damage as eyes do."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from urllib.error import URLError

import numpy as np
import pytest
import tiny
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torchmetrics.functional.image import lpips
from torchvision.models.vgg import cfgs, make_layers
from torchvision.transforms.functional import gaussian_blur

from ldm_edu.autoencoder import (
    AutoencoderKL,
    FirstStageObjective,
    PerceptualConfig,
    PerceptualLoss,
    PerceptualNetwork,
    lpips_vgg,
)
from ldm_edu.datasets import photographs
from ldm_edu.datasets.images import from_levels, to_uint8
from ldm_edu.runtime import UserError

CONFIG = PerceptualConfig(widths=(4, 6, 8))


def network(batch_norm: bool = False) -> PerceptualNetwork:
    torch.manual_seed(0)
    return tiny.stirred(PerceptualNetwork(CONFIG, batch_norm))


def pictures(count: int = 2, seed: int = 0, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# the distance


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), noise=st.sampled_from([1e-3, 0.3, 2.0]))
def test_it_is_a_distance(seed: int, noise: float):
    distance = PerceptualLoss(network())
    one = pictures(seed=seed)
    other = one + noise * pictures(seed=seed + 1)
    with torch.no_grad():
        there, back = distance(one, other), distance(other, one)
        assert there.shape == (2,) and (there > 0).all() and (there <= 2).all()
        torch.testing.assert_close(there, back)
        assert distance(one, one).tolist() == [0, 0]
        torch.testing.assert_close(distance(one[1:], other[1:]), there[1:])  # each picture by itself


def test_it_is_the_squared_distance_of_unit_vectors_averaged_over_places_and_stages():
    own, (one, other) = network(), (pictures(), pictures(seed=1))
    expected = torch.zeros(2)
    for a, b in zip(own(one), own(other)):
        for i in range(2):
            a_rows, b_rows = a[i].flatten(1).T, b[i].flatten(1).T
            a_unit = a_rows / (a_rows.norm(dim=1, keepdim=True) ** 2 + 1e-4).sqrt()
            b_unit = b_rows / (b_rows.norm(dim=1, keepdim=True) ** 2 + 1e-4).sqrt()
            expected[i] += sum(((p - q) ** 2).sum() for p, q in zip(a_unit, b_unit)) / len(a_rows) / 3
    torch.testing.assert_close(PerceptualLoss(own)(one, other), expected)


def test_places_without_features_count_for_nothing():
    own = network()
    for weight in own.parameters():
        nn.init.zeros_(weight)
    images = pictures().requires_grad_()
    distance = PerceptualLoss(own)(images, pictures(seed=1))
    distance.sum().backward()
    assert distance.tolist() == [0, 0] and images.grad.isfinite().all()


def test_the_network_is_a_small_vgg():
    features = network()(pictures(size=24))
    assert [tuple(f.shape) for f in features] == [(2, 4, 24, 24), (2, 6, 12, 12), (2, 8, 6, 6)]
    assert all((f >= 0).all() and f.any() for f in features)


# a yardstick


def test_gradients_reach_the_pictures_and_not_the_weights():
    distance, images = PerceptualLoss(network()), pictures().requires_grad_()
    originals = pictures(seed=1).requires_grad_()
    distance(images, originals).sum().backward()
    assert images.grad.flatten(1).any(1).all() and originals.grad is None
    assert not any(p.requires_grad or p.grad is not None for p in distance.parameters())
    with torch.no_grad():
        assert not distance(images, originals).requires_grad  # a constant: it would teach nothing


def test_a_step_on_it_brings_a_picture_nearer():
    distance, original, image = PerceptualLoss(network()), pictures(), pictures(seed=1)
    before = distance(image, original)
    for _ in range(30):
        image = image.detach().requires_grad_()
        distance(image, original).sum().backward()
        image = image - 0.1 * image.grad.sign()
    assert (distance(image, original) < 0.9 * before).all()


def test_it_stays_in_evaluation():
    distance = PerceptualLoss(network(batch_norm=True))
    objective = FirstStageObjective(AutoencoderKL(tiny.AUTOENCODER), perceptual=distance).train()
    assert objective.model.training and not any(m.training for m in distance.modules())
    assert distance.train() is distance and not any(m.training for m in distance.modules())
    before = {n: b.clone() for n, b in distance.named_buffers()}
    objective(pictures(), torch.Generator())[0].backward()
    assert before and all(torch.equal(b, before[n]) for n, b in distance.named_buffers())


# the network


def test_folding_changes_nothing():
    own = network(batch_norm=True)
    for seed in range(5):  # running statistics that are not those of a new network
        own(3 * pictures(8, seed=seed) + 1)
    folded = own.folded()
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)] and not folded.training
    images = pictures(seed=9)
    for one, other in zip(folded(images), own.eval()(images), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    plain = PerceptualNetwork(CONFIG)
    assert plain.state_dict().keys() == folded.state_dict().keys()


def test_a_checkpoint_of_it_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # no waiting for a busy disk
    own = network()
    own.save(tmp_path / "network", "a card")
    back = PerceptualNetwork.load(tmp_path / "network")
    assert back.config == CONFIG and not back.training
    for name, weight in own.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight.half().float()), name
    with pytest.raises(UserError, match="'perceptual'.*'autoencoder-kl'"):
        AutoencoderKL.load(tmp_path / "network")
    with pytest.raises(UserError, match="'autoencoder-kl'.*'perceptual'"):
        PerceptualNetwork.load("shapes-kl-f4")


# the committed network


def jpeg(image: Tensor, quality: int) -> Tensor:
    file = io.BytesIO()
    Image.fromarray(to_uint8(image[None])[0]).save(file, "JPEG", quality=quality)
    return from_levels(np.array(Image.open(file)))


def moved(image: Tensor, pixels: float) -> Tensor:
    """To the right, by a fraction of a pixel too."""
    whole = int(pixels)
    near, far = (torch.roll(image, by, -1) for by in (whole, whole + 1))
    return (1 + whole - pixels) * near + (pixels - whole) * far


def matched(damage: Callable[[float], Tensor], image: Tensor, mse: float, most: float) -> Tensor:
    """The damage whose squared error is `mse`, found by halving."""
    low, high = 0.05, most
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if (damage(middle) - image).square().mean() < mse else (low, middle)
    found = damage(middle)
    assert (found - image).square().mean().item() == pytest.approx(mse, rel=0.02)
    return found


@pytest.fixture(scope="module")
def distances() -> dict[str, list[float]]:
    """Of each kind of damage to scikit-image's photographs, all with the squared error of a JPEG of quality 10."""
    distance = PerceptualLoss(PerceptualNetwork.load("perceptual"))
    found: dict[str, list[float]] = {}
    for image in photographs(128).values():
        compressed = jpeg(image, 10)
        mse = (compressed - image).square().mean().item()
        noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
        damaged = {
            "brightness": image + mse**0.5,
            "shift": matched(lambda by, i=image: moved(i, by), image, mse, most=8),
            "noise": image + noise * (mse / noise.square().mean()) ** 0.5,
            "jpeg": compressed,
            "blur": matched(lambda sigma, i=image: gaussian_blur(i, 15, sigma), image, mse, most=8),
        }
        with torch.no_grad():
            values = distance(torch.stack([*damaged.values()]), image.expand(len(damaged), -1, -1, -1)).tolist()
        for name, value in zip(damaged, values):
            found.setdefault(name, []).append(value)
    return found


def test_at_the_same_squared_error_it_ranks_damage_as_eyes_do(distances: dict[str, list[float]]):
    means = {name: fmean(values) for name, values in distances.items()}
    assert means["brightness"] < means["shift"] < means["noise"] < means["blur"], means
    assert means["shift"] < means["jpeg"], means


@pytest.mark.parametrize("less, more", [("brightness", "shift"), ("shift", "jpeg"), ("shift", "blur")])
def test_on_every_photograph(less: str, more: str, distances: dict[str, list[float]]):
    pairs = list(zip(distances[less], distances[more], strict=True))
    assert len(pairs) == 7 and all(a < b for a, b in pairs), pairs


# the paper's own


def test_lpips_without_its_weights_is_worded(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def no_network(url: str, *arguments: object, **more: object) -> None:
        asked.append(url)
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", no_network)
    with pytest.raises(UserError, match="VGG16.*no route to host.*hub/checkpoints.*perceptual=ours"):
        lpips_vgg()
    assert len(asked) == 1 and "vgg16" in asked[0]


def test_lpips_is_used_like_our_own(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)  # its convolutions alone, at random: the classifier behind them is 500 MB
    features = make_layers(cfgs["D"])
    monkeypatch.setattr(lpips, "_get_tv_model_features", lambda name, pretrained: features)
    distance = lpips_vgg().train()
    assert not any(m.training for m in distance.modules())
    images, originals = pictures(size=32).requires_grad_(), pictures(size=32, seed=1)
    value = distance(images, originals)
    assert value.shape == (2,) and (value > 0).all() and distance(originals, originals).tolist() == [0, 0]
    value.sum().backward()
    assert images.grad.any() and not any(p.requires_grad or p.grad is not None for p in distance.parameters())
