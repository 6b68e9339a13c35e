"""The networks: the paper's sizes, shapes, and what each layer is in closed form."""

import math
import re
from dataclasses import replace

import pytest
import tiny
import torch
from torch import Tensor, nn

from ldm_edu.autoencoder import AutoencoderConfig, AutoencoderKL, DiagonalGaussian, FirstStageObjective
from ldm_edu.layers import Attention, AttentionBlock, Downsample, ResidualBlock, Upsample
from ldm_edu.runtime import UserError
from ldm_edu.unet import SpatialTransformer, UNet, UNetConfig, timestep_embedding


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# sizes


def test_the_defaults_are_the_sizes_of_stable_diffusion_1():
    with torch.device("meta"):
        assert parameters(UNet(UNetConfig())) == 859_520_964
        assert parameters(AutoencoderKL(AutoencoderConfig())) == 83_653_863


@pytest.mark.parametrize("multipliers, f", [((1,), 1), ((1, 1), 2), ((1, 2, 2), 4), ((1, 1, 2, 2), 8)])
@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_the_first_stage_shrinks_by_f(multipliers: tuple[int, ...], f: int, size: tuple[int, int]):
    model = AutoencoderKL(replace(tiny.AUTOENCODER, channel_multipliers=multipliers, attention_levels=()))
    images = torch.rand(2, 3, *size) * 2 - 1
    posterior = model.posterior(images)
    assert model.f == f and posterior.mean.shape == posterior.logvar.shape == (2, 2, size[0] // f, size[1] // f)
    assert torch.equal(model.encode(images), posterior.mean)
    assert model.decode(posterior.mean).shape == images.shape


@pytest.mark.parametrize("shape", [(1, 3, 16, 18), (1, 3, 15, 16), (3, 16, 16), (1, 1, 16, 16)])
def test_pictures_that_do_not_fit_the_first_stage_are_named(shape: tuple[int, ...]):
    sides = f"{shape[2]} × {shape[3]}" if len(shape) == 4 and shape[1] == 3 else str(shape)
    with pytest.raises(UserError, match=re.escape(sides)):
        tiny.first_stage().encode(torch.zeros(shape))


@pytest.mark.parametrize("context_channels", [16, None])
@pytest.mark.parametrize("size", [(4, 4), (8, 2)])
def test_the_unet_keeps_the_latents_shape(context_channels: int | None, size: tuple[int, int]):
    config = replace(tiny.UNET, context_channels=context_channels, in_channels=5, scale_shift=True, blocks=2)
    z, t = torch.randn(3, 5, *size), torch.tensor([0, 500, 999])
    context = torch.randn(3, 7, 16) if context_channels else None
    model = tiny.stirred(UNet(config))
    output = model(z, t, context)
    assert output.shape == (3, 2, *size) and output.isfinite().all()
    assert not torch.allclose(output, model(z, t.flip(0), context)), "the timestep does not matter"


# closed forms


def test_a_new_unet_predicts_zero_and_a_new_block_is_its_shortcut():
    torch.manual_seed(0)
    z, t, context = torch.randn(2, 2, 4, 4), torch.tensor([3, 900]), torch.randn(2, 5, 16)
    assert not UNet(tiny.UNET)(z, t, context).any()
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(SpatialTransformer(8, 2, 16, groups=4)(x, context), x)
    assert torch.equal(ResidualBlock(8, 8, 16, groups=4, zero_out=True)(x, torch.randn(2, 16)), x)
    assert not torch.equal(ResidualBlock(8, 8, groups=4)(x), x)


@pytest.mark.parametrize("context_channels", [6, None])
def test_attention_is_softmax_by_hand(context_channels: int | None):
    torch.manual_seed(0)
    layer = Attention(8, 2, context_channels)
    x, context = torch.randn(1, 5, 8), torch.randn(1, 3, 6) if context_channels else None
    source = x if context is None else context
    q, k, v = (f(s)[0] for f, s in ((layer.query, x), (layer.key, source), (layer.value, source)))
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        logits = q[:, head] @ k[:, head].T / math.sqrt(4)
        weights = logits.exp() / logits.exp().sum(1, keepdim=True)
        heads.append(weights @ v[:, head])
    torch.testing.assert_close(layer(x, context)[0], layer.out(torch.cat(heads, 1)))
    assert layer.query.bias is None and layer.out.bias is not None
    with pytest.raises(ValueError, match="8 channels.*3 heads"):
        Attention(8, 3)


def test_attention_in_half_precision_is_close_with_its_gradients():
    """In training, too, where it is written out, and under autocast: half of bfloat16's 8 bits, and more, are left."""
    torch.manual_seed(0)
    layer, x, context = Attention(8, 2, 6), torch.randn(2, 5, 8), torch.randn(2, 3, 6)

    def answer_and_gradients(training: bool, half: bool) -> list[Tensor]:
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half), torch.set_grad_enabled(training):
            answer = layer(x, context)
            if training:
                answer.float().square().sum().backward()
        return [answer.float(), *(p.grad.clone() for p in layer.parameters() if training)]

    exact = answer_and_gradients(True, half=False)
    for training in (True, False):
        for rounded, wanted in zip(answer_and_gradients(training, half=True), exact):
            error = (rounded - wanted).abs().max() / wanted.abs().max()
            assert 1e-5 < error < 1 / 32, error


def test_attention_over_pixels_does_not_know_their_order():
    torch.manual_seed(0)
    layer, x = AttentionBlock(8, groups=4), torch.randn(2, 8, 3, 5)
    order = torch.randperm(15)

    def shuffled(images: Tensor) -> Tensor:
        return images.flatten(2)[:, :, order].view_as(images)

    torch.testing.assert_close(layer(shuffled(x)), shuffled(layer(x)))


def test_the_timestep_embedding_is_cosines_then_sines():
    t = torch.tensor([0, 1, 37, 999])
    embedded = timestep_embedding(t, 8)
    frequencies = [10_000 ** (-i / 4) for i in range(4)]
    for row, step in zip(embedded.tolist(), t.tolist()):
        expected = [math.cos(step * w) for w in frequencies] + [math.sin(step * w) for w in frequencies]
        assert row == pytest.approx(expected, abs=1e-4)
    # To the last digit as in the released code, and in diffusers: a frequency rounded otherwise counts 999 times.
    half = torch.arange(160, dtype=torch.float32)
    angles = t[:, None] * torch.exp(-math.log(10_000) * half / 160)
    assert torch.equal(timestep_embedding(t, 320), torch.cat([angles.cos(), angles.sin()], 1))


def test_halving_pads_as_its_network_does_and_doubling_repeats():
    x = torch.zeros(1, 1, 4, 4)
    x[..., 0, 0] = 1
    for symmetric in (True, False):
        layer = Downsample(1, symmetric)
        nn.init.ones_(layer.conv.weight), nn.init.zeros_(layer.conv.bias)
        corner = layer(x.flip(2, 3))[..., -1, -1].item(), layer(x)[..., 0, 0].item()
        assert layer(x).shape == (1, 1, 2, 2) and corner == (1, 1)
        one_in = torch.zeros(1, 1, 4, 4)
        one_in[..., 2, 2] = 1  # under the first window if it starts at 0, under the second alone if it starts at -1
        assert layer(one_in)[..., 0, 0].item() == (0 if symmetric else 1)
    layer = Upsample(1)
    nn.init.dirac_(layer.conv.weight), nn.init.zeros_(layer.conv.bias)
    small = torch.arange(6.0).view(1, 1, 2, 3)
    assert torch.equal(layer(small), small.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_the_posterior_is_a_normal_distribution():
    moments = torch.randn(2, 4, 3, 3) * 0.5
    moments[0, 2, 0, 0], moments[0, 3, 0, 0] = -100, 100
    posterior = DiagonalGaussian.from_moments(moments)
    assert posterior.logvar.min() == -30 and posterior.logvar.max() == 20
    posterior = DiagonalGaussian(torch.full((1, 2, 100, 100), 0.3), torch.full((1, 2, 100, 100), -1.0))
    sample = posterior.sample(torch.Generator().manual_seed(0))
    assert sample.mean().item() == pytest.approx(0.3, abs=0.02)
    assert sample.var().item() == pytest.approx(math.exp(-1), rel=0.05)
    normal = torch.distributions.Normal(posterior.mean, (posterior.logvar / 2).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(posterior.kl(), expected)


def test_the_first_stage_learns_through_every_weight():
    torch.manual_seed(0)
    model = AutoencoderKL(tiny.AUTOENCODER)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    loss, readings = FirstStageObjective(model, regulariser_weight=1e-3)(images, torch.Generator().manual_seed(0))
    loss.backward()
    # A bias of the keys shifts all logits of a softmax alike: it has no effect, and no gradient but rounding.
    without = [n for n, p in model.named_parameters() if not p.grad.abs().max() > 1e-9 and not n.endswith("key.bias")]
    assert without == []
    assert loss.item() == pytest.approx(readings["l1"].item() + 1e-3 * readings["kl"].item(), rel=1e-5)
