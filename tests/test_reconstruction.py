"""PSNR and SSIM of reconstructions, on first stages whose answer is known without training."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ldm_edu.datasets.public import photographs
from ldm_edu.evaluation.reconstruction import (
    EQUAL_PSNR,
    Score,
    bicubic_copy,
    mean_scores,
    pad_to_multiple,
    psnr,
    reconstruct,
    score,
    ssim,
)
from ldm_edu.runtime import UserError


class Lossless:
    """Moves each f x f block into channels and back: a first stage that loses nothing."""

    def __init__(self, f: int) -> None:
        self.f = f

    def encode(self, images: Tensor) -> Tensor:
        return F.pixel_unshuffle(images, self.f)

    def decode(self, latent: Tensor) -> Tensor:
        return F.pixel_shuffle(latent, self.f)


class Blocks:
    """Keeps the mean of each f x f block."""

    def __init__(self, f: int) -> None:
        self.f = f

    def encode(self, images: Tensor) -> Tensor:
        assert images.shape[-2] % self.f == images.shape[-1] % self.f == 0
        return F.avg_pool2d(images, self.f)

    def decode(self, latent: Tensor) -> Tensor:
        return F.interpolate(latent, scale_factor=self.f, mode="nearest") * 1.001  # leaves [-1, 1] a little


def noise(height: int, width: int, seed: int = 0) -> Tensor:
    """A picture of random 8-bit levels."""
    levels = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed))
    return levels / 127.5 - 1


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 2, 4, 8, 16, 32]))
def test_padding_reflects_and_crops_back(height: int, width: int, f: int):
    image = noise(height, width)
    padded, crop = pad_to_multiple(image, f)
    assert padded.shape[-2] % f == padded.shape[-1] % f == 0
    assert padded.shape[-2] - height < f and padded.shape[-1] - width < f
    assert torch.equal(padded[..., *crop], image)
    right, below = padded.shape[-1] - width, padded.shape[-2] - height
    if right < width and below < height:  # where torch can do it
        assert torch.equal(padded, F.pad(image[None], (0, right, 0, below), mode="reflect")[0])


def test_padding_a_single_pixel():
    padded, _ = pad_to_multiple(torch.full((3, 1, 2), 0.5), 8)
    assert padded.shape == (3, 8, 8) and (padded == 0.5).all()


@pytest.mark.parametrize("size", [(16, 16), (17, 23), (3, 50), (1, 1), (4, 3)])
@pytest.mark.parametrize("f", [4, 8])
def test_any_size_is_reconstructed(size: tuple[int, int], f: int):
    image = noise(*size)
    assert torch.equal(reconstruct(Lossless(f), image), image)
    batch = torch.stack([image, image.flip(-1)])
    restored = reconstruct(Blocks(f), batch)
    assert restored.shape == batch.shape and restored.abs().max() <= 1
    assert not restored.requires_grad


@pytest.mark.parametrize("size", [(16, 16), (17, 23), (5, 50), (1, 1)])
def test_lossless_first_stage_scores_full_marks(size: tuple[int, int]):
    image = noise(*size)
    scores = mean_scores([score(reconstruct(Lossless(4), image), image, f=4)])
    assert (
        scores["psnr"] == EQUAL_PSNR
        and scores["ssim"] == pytest.approx(1, abs=1e-4)
        and scores["images"] == 1
    )
    assert math.isfinite(scores["bicubic_psnr"])


def test_psnr_in_closed_form():
    black, grey = torch.full((3, 8, 8), -1.0), torch.full((3, 8, 8), 10 / 127.5 - 1)
    assert psnr(grey, black) == pytest.approx(20 * math.log10(255 / 10), abs=1e-4)


def test_psnr_is_taken_at_8_bits():
    image = noise(8, 8)
    assert psnr(image + 0.4 / 127.5, image) == EQUAL_PSNR
    assert psnr(image + 3, torch.ones(3, 8, 8)) == EQUAL_PSNR  # clipped to white


def test_metrics_are_scikit_images():
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    first, second = photographs(64)["coffee"], bicubic_copy(photographs(64)["coffee"], 4)
    a, b = (((x + 1) * 127.5).round().byte().permute(1, 2, 0).numpy() for x in (first, second))
    assert psnr(second, first) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=255), abs=1e-3)
    wang = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    _, full = structural_similarity(a, b, data_range=255, channel_axis=2, full=True, **wang)
    inside = (slice(None), slice(None), slice(5, -5), slice(5, -5))  # edges are continued differently
    from torchmetrics.functional.image import structural_similarity_index_measure

    levels = [torch.from_numpy(x).permute(2, 0, 1)[None].float() for x in (b, a)]
    mean, ours = structural_similarity_index_measure(*levels, data_range=255.0, return_full_image=True)
    assert ssim(second, first) == pytest.approx(mean.item(), abs=1e-6)
    np.testing.assert_allclose(ours[inside][0].permute(1, 2, 0), full[5:-5, 5:-5], atol=1e-3)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30))
def test_ssim_of_any_size_is_at_most_one(height: int, width: int):
    image, other = noise(height, width), noise(height, width, seed=1)
    assert ssim(image, image) == pytest.approx(1, abs=1e-4)
    assert -1 <= ssim(image, other) < 1


def test_bicubic_copy_is_pillows():
    photo = photographs(64)["chelsea"]
    picture = Image.fromarray(((photo + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
    theirs = picture.resize((16, 16), Image.Resampling.BICUBIC).resize((64, 64), Image.Resampling.BICUBIC)
    ours = (bicubic_copy(photo, 4) + 1) * 127.5
    assert (
        ours - torch.from_numpy(np.array(theirs)).permute(2, 0, 1)
    ).abs().max() < 2  # theirs is rounded twice


def one_score(image: Tensor) -> Score:
    return score(reconstruct(Blocks(4), image), image, f=4)


def test_blocks_lose_to_bicubic_on_a_photograph():
    result = one_score(photographs(64)["chelsea"])
    assert result.psnr < result.bicubic_psnr < EQUAL_PSNR and 0 < result.ssim < 1


def test_the_mean_is_of_the_pictures_values():
    pictures = [noise(8, 8), photographs(64)["coffee"], photographs(32)["grass"]]
    each = [one_score(picture) for picture in pictures]
    scores = mean_scores(each)
    assert list(scores) == ["psnr", "ssim", "bicubic_psnr", "images"] and scores["images"] == 3
    for name in ("psnr", "ssim", "bicubic_psnr"):
        assert scores[name] == pytest.approx(sum(getattr(one, name) for one in each) / 3)


def test_no_pictures():
    with pytest.raises(UserError, match="no picture"):
        mean_scores([])
