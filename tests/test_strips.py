"""Decoding in strips: the picture that the whole decoder makes, and when it is done."""

from dataclasses import replace

import pytest
import tiny
import torch
from torch import Tensor

from ldm_edu.autoencoder import (
    AutoencoderConfig,
    AutoencoderKL,
    AutoencoderVQ,
    FirstStage,
    VQConfig,
    first_stage,
    strips,
)
from ldm_edu.autoencoder.strips import decode_in_strips, fits_whole


def model(**changes: object) -> AutoencoderKL:
    torch.manual_seed(0)
    return tiny.stirred(AutoencoderKL(replace(tiny.AUTOENCODER, **changes))).eval()


def relative_error(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max()).item()


@pytest.mark.parametrize("rows", [1, 2, 5, 16, 64])
@pytest.mark.parametrize("height, width", [(4, 4), (5, 3), (1, 7), (9, 2)])
@torch.no_grad()
def test_strips_make_the_whole_picture(rows: int, height: int, width: int):
    decoder = model().decoder
    latent = torch.randn(1, 2, height, width)
    assert relative_error(decode_in_strips(decoder, latent, rows), decoder(latent)) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        dict(attention_levels=(0, 1, 2)),
        dict(attention_levels=(), middle_attention=False),
        dict(channel_multipliers=(2,), attention_levels=()),
        dict(channel_multipliers=(1, 2, 1, 3), blocks=2),
        dict(groups=1),
        dict(groups=8),
    ],
)
@torch.no_grad()
def test_strips_know_every_kind_of_decoder(changes: dict[str, object]):
    decoder = model(**changes).decoder
    latent = torch.randn(2, 2, 5, 6)
    assert relative_error(decode_in_strips(decoder, latent, 3), decoder(latent)) < 1e-5


@torch.no_grad()
def test_strips_do_not_know_the_picture_by_parts_alone():
    """A change in one corner reaches the far one, through the statistics and the attention of the whole."""
    decoder, latent = model().decoder, torch.randn(1, 2, 16, 4)
    changed = latent.clone()
    changed[..., 0, 0] += 5
    before, after = decode_in_strips(decoder, latent, 4), decode_in_strips(decoder, changed, 4)
    far = (after - before)[..., -4:, :].abs().max()
    assert far > 1e-3
    assert relative_error(after, decoder(changed)) < 1e-5


@pytest.mark.parametrize("channels_last", [False, True])
@torch.no_grad()
def test_strips_in_bfloat16_round_as_the_whole_does(channels_last: bool):
    decoder, latent = model(channels=32, groups=8).decoder, torch.randn(1, 2, 12, 12)
    exact = decoder(latent)
    order = torch.channels_last if channels_last else torch.contiguous_format
    decoder, latent = decoder.to(torch.bfloat16, memory_format=order), latent.bfloat16()
    whole, cut = decoder(latent).float(), decode_in_strips(decoder, latent, 5).float()
    error, usual = (cut - exact).square().mean().sqrt(), (whole - exact).square().mean().sqrt()
    assert 0 < error < 1.25 * usual


@torch.no_grad()
def test_strips_under_autocast():
    decoder, latent = model().decoder, torch.randn(1, 2, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        cut, whole = decode_in_strips(decoder, latent, 5), decoder(latent)
    assert cut.dtype == whole.dtype == torch.bfloat16
    assert relative_error(cut.float(), whole.float()) < 0.05


# when


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """How pictures were decoded, and how many at a time."""
    seen: list[tuple[str, int]] = []

    def in_strips(decoder: torch.nn.Module, latent: Tensor) -> Tensor:
        seen.append(("strips", len(latent)))
        return decode_in_strips(decoder, latent)

    monkeypatch.setattr(first_stage, "decode_in_strips", in_strips)
    return seen


def decoded(stage: FirstStage, latent: Tensor, ways: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """What `stage.decode(latent)` did; its result must be the decoder's."""
    ways.clear()
    hook = stage.decoder.register_forward_pre_hook(lambda _, given: ways.append(("whole", len(given[0]))))
    picture = stage.decode(latent)
    hook.remove()
    assert relative_error(picture, stage.decoder(stage.post_quant_conv(latent))) < 1e-5
    return list(ways)


def need(stage: FirstStage, latent: Tensor) -> int:
    """The least limit at which the latent fits, found by halving."""
    low, high = 0, 2**40
    while high - low > 1:
        middle = (low + high) // 2
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(strips, "WHOLE_LIMIT", middle)
            low, high = (low, middle) if fits_whole(stage.decoder, latent) else (middle, high)
    return high


def test_strips_only_where_the_whole_does_not_fit(monkeypatch: pytest.MonkeyPatch, ways: list):
    stage, latent = model(), torch.randn(3, 2, 4, 4)
    one, three = need(stage, latent[:1]), need(stage, latent)
    assert 2 * one < three <= 3 * one
    for limit, wanted in [
        (three, [("whole", 3)]),
        (three - 1, [("whole", 1)] * 3),
        (one, [("whole", 1)] * 3),
        (one - 1, [("strips", 1)] * 3),
    ]:
        monkeypatch.setattr(strips, "WHOLE_LIMIT", limit)
        with torch.no_grad():
            assert decoded(stage, latent, ways) == wanted


def test_never_strips_while_gradients_are_wanted(monkeypatch: pytest.MonkeyPatch, ways: list):
    monkeypatch.setattr(strips, "WHOLE_LIMIT", 0)
    stage, latent = model(), torch.randn(2, 2, 4, 4, requires_grad=True)
    assert decoded(stage, latent, ways) == [("whole", 2)]
    stage.decode(latent).sum().backward()
    assert latent.grad.any() and stage.decoder.conv_in.weight.grad.any()


@torch.no_grad()
def test_a_vq_first_stage_too(monkeypatch: pytest.MonkeyPatch, ways: list):
    torch.manual_seed(0)
    config = VQConfig(latent_channels=2, channels=8, channel_multipliers=(1, 2), blocks=1, groups=4, codebook_size=16)
    stage = AutoencoderVQ(config).eval()
    stage.quantizer.codebook.weight.normal_()
    latent = torch.randn(1, 2, 6, 5)
    whole = stage.decode(latent)
    monkeypatch.setattr(strips, "WHOLE_LIMIT", 0)
    ways.clear()
    assert relative_error(stage.decode(latent), whole) < 1e-5 and ways == [("strips", 1)]


def test_what_is_decoded_whole_by_default():
    """Stable Diffusion's first stage: 768 pixels a side in one piece, 1024 in strips; in half precision both whole."""
    with torch.device("meta"):
        decoder = AutoencoderKL(AutoencoderConfig()).decoder
    for side, dtype, whole in [
        (768, torch.float32, True),
        (1024, torch.float32, False),
        (1024, torch.bfloat16, True),
        (2048, torch.bfloat16, False),
    ]:
        assert fits_whole(decoder, torch.empty(1, 4, side // 8, side // 8, dtype=dtype)) == whole
