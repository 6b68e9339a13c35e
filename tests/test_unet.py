"""The UNet's options: attention with and without a context, heads and depth by level, labels, and its maps."""

import re
from dataclasses import replace

import pytest
import torch
import unets
from torch import Tensor, nn

from ldm_edu.layers import Attention, AttentionBlock, ResidualBlock
from ldm_edu.runtime import UserError
from ldm_edu.unet import (
    AttentionMap,
    SpatialTransformer,
    UNet,
    UNetConfig,
    attention_maps,
    timestep_embedding,
)

SMALL = UNetConfig(
    in_channels=2, out_channels=2, channels=8, channel_multipliers=(1, 2), blocks=1, attention_levels=(1,), heads=2,
    context_channels=6, groups=4, transformer_depth=2,
)  # fmt: skip


def of_kind(model: nn.Module, kind: type[nn.Module]) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


# structure


def test_attention_is_at_the_chosen_levels_and_in_the_middle():
    places = {f"{b}.transformer" for b in ("down.1.blocks.0", "middle", "up.0.blocks.0", "up.0.blocks.1")}
    assert set(of_kind(UNet(SMALL), SpatialTransformer)) == places
    assert set(of_kind(UNet(replace(SMALL, attention_levels=())), SpatialTransformer)) == {"middle.transformer"}
    plain = UNet(replace(SMALL, context_channels=None))
    assert set(of_kind(plain, AttentionBlock)) == places and not of_kind(plain, SpatialTransformer)
    assert all(block.norm.eps == 1e-5 for block in of_kind(plain, AttentionBlock).values())


def test_heads_and_depth_by_level():
    by_width = replace(SMALL, head_channels=4, attention_levels=(0, 1), transformer_depth=(3, 1))
    for name, layer in of_kind(UNet(by_width), SpatialTransformer).items():
        lowest = name.startswith(("down.1", "middle", "up.0"))
        heads = {module.heads for module in of_kind(layer, Attention).values()}
        assert heads == {4 if lowest else 2} and len(layer.blocks) == (1 if lowest else 3)
    with pytest.raises(UserError, match="Level 1, 16 channels wide.*heads of 5"):
        UNet(replace(SMALL, head_channels=5))
    with pytest.raises(UserError, match=r"transformer_depth \(1, 2, 3\).*each of 2 levels"):
        UNet(replace(SMALL, transformer_depth=(1, 2, 3)))


@pytest.mark.parametrize("context_channels", [6, None])
def test_every_block_of_a_new_unet_adds_nothing(context_channels: int | None):
    torch.manual_seed(0)
    config = replace(SMALL, context_channels=context_channels, scale_shift=True, num_classes=3)
    model = UNet(config)
    seen = []

    def unchanged(layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        x = layer.shortcut(given[0]) if isinstance(layer, ResidualBlock) else given[0]
        seen.append(torch.equal(output, x))

    for kind in (ResidualBlock, SpatialTransformer, AttentionBlock):
        for layer in of_kind(model, kind).values():
            layer.register_forward_hook(unchanged)
    assert not model(*unets.inputs(config, torch.float32)).any()
    assert len(seen) == 12 and all(seen)


def test_scale_and_shift_by_hand():
    torch.manual_seed(0)
    block = unets.stirred(ResidualBlock(8, 8, 5, groups=4, scale_shift=True))
    x, time = torch.randn(2, 8, 4, 4), torch.randn(2, 5)
    scale, shift = block.time(nn.functional.silu(time))[..., None, None].split(8, dim=1)
    h = block.norm2(block.conv1(nn.functional.silu(block.norm1(x)))) * (1 + scale) + shift
    torch.testing.assert_close(block(x, time), x + block.conv2(nn.functional.silu(h)))


def test_labels_are_added_to_the_timestep():
    config = replace(SMALL, num_classes=3)
    model = unets.ours(config)
    z, t, context, _ = unets.inputs(config, torch.float32)
    answers = [model(z, t, context, torch.full((2,), label)) for label in range(3)]
    assert not torch.allclose(answers[0], answers[1])
    with torch.no_grad():  # label 2 again, by the time embedding's last bias
        model.time.linear2.bias += model.label.weight[2]
        model.label.weight.zero_()
    torch.testing.assert_close(model(z, t, context, torch.zeros(2, dtype=torch.long)), answers[2])


@pytest.mark.parametrize(
    "change, drop, words",
    [
        ({}, "context", "with context: give it context"), ({"num_classes": 3}, "labels", "with labels: give it labels"),
        ({"context_channels": None}, None, "without context: give it none"),
    ],
)  # fmt: skip
def test_conditions_that_are_missing_or_too_many_are_named(change: dict, drop: str | None, words: str):
    config = replace(SMALL, **change)
    z, t, context, labels = unets.inputs(replace(config, context_channels=6), torch.float32)
    given = {"context": context, "labels": labels}
    with pytest.raises(UserError, match=words):
        unets.ours(config)(z, t, **{name: value for name, value in given.items() if name != drop})


@pytest.mark.parametrize("t", [1, None, [3, 961]])
def test_timesteps_and_labels_are_tensors(t: object):
    config = replace(SMALL, num_classes=3)
    z, times, context, labels = unets.inputs(config, torch.float32)
    model = unets.ours(config)
    assert torch.equal(model(z, times.float(), context, labels), model(z, times, context, labels))
    with pytest.raises(UserError, match=rf"t must be a tensor \(2,\).*, not {re.escape(str(t))}"):
        model(z, t, context, labels)
    with pytest.raises(UserError, match="labels must be a tensor.*not 1"):
        model(z, times, context, 1)


@pytest.mark.parametrize("channels", [7, 1, 0])
def test_a_timestep_embedding_has_two_halves(channels: int):
    with pytest.raises(UserError, match=f"even number from 2 on, not {channels}"):
        timestep_embedding(torch.arange(3), channels)


@pytest.mark.parametrize("height, width", [(5, 8), (8, 6), (2, 4)])
def test_a_size_that_cannot_be_halved_is_named(height: int, width: int):
    model = unets.ours(replace(SMALL, channel_multipliers=(1, 2, 2)))
    with pytest.raises(UserError, match=f"halves its input 2 times.* multiples of 4, not {height} × {width}"):
        model(torch.zeros(1, 2, height, width), torch.tensor([0]), torch.zeros(1, 5, 6))
    assert model(torch.zeros(1, 2, 4, 8), torch.tensor([0]), torch.zeros(1, 5, 6)).shape == (1, 2, 4, 8)


# attention maps


def test_attention_maps_are_the_softmax_and_leave_the_network_as_it_was():
    config = replace(SMALL, attention_levels=(0, 1))
    model = unets.ours(config)
    z, t, context, _ = unets.inputs(config, torch.float32)
    before, names = model(z, t, context), list(model.state_dict())
    given: dict[str, tuple[Tensor, Tensor]] = {}
    layers = {name: layer for name, layer in of_kind(model, Attention).items() if name.endswith("cross_attention")}
    hooks = [
        layer.register_forward_hook(lambda _, inputs, __, name=name: given.update({name: inputs}))
        for name, layer in layers.items()
    ]
    with attention_maps(model) as maps:
        assert torch.equal(model(z, t, context), before)
    for hook in hooks:
        hook.remove()
    assert [m.layer for m in maps] == list(given) and set(given) == set(layers) and len(maps) == 14
    for m in maps:
        x, source = given[m.layer]
        layer = layers[m.layer]
        q, k = (s.unflatten(2, (2, -1)) for s in (layer.query(x), layer.key(source)))
        logits = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
        torch.testing.assert_close(m.probabilities, logits.exp() / logits.exp().sum(-1, keepdim=True))
        assert m.probabilities.shape == (2, 2, m.height * m.width, 5) and not m.probabilities.requires_grad
        top = m.layer.startswith(("down.0", "up.1"))
        assert (m.height, m.width) == ((4, 6) if top else (2, 3))
    assert torch.equal(model(z, t, context), before) and len(maps) == 14 and list(model.state_dict()) == names


def test_attention_maps_beside_the_fused_kernel_in_low_precision_and_one_in_another(monkeypatch: pytest.MonkeyPatch):
    model = unets.ours(SMALL).requires_grad_(False).bfloat16()
    z, t, context, _ = unets.inputs(SMALL, torch.bfloat16)
    fused, calls = nn.functional.scaled_dot_product_attention, []
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", lambda *a: calls.append(1) or fused(*a))
    before, number = model(z, t, context), len(calls)
    assert number == len(of_kind(model, Attention))
    with attention_maps(model) as outer, attention_maps(model.middle) as inner:
        after = model(z, t, context)
    assert torch.equal(before, after) and len(calls) == 2 * number
    assert len(outer) == 8 and len(inner) == 2 and inner[0].layer == "transformer.blocks.0.cross_attention"
    assert isinstance(outer[0], AttentionMap) and outer[0].probabilities.dtype == torch.float32
    torch.testing.assert_close(outer[0].probabilities.sum(-1), torch.ones(2, 2, 6))


def test_attention_maps_end_even_if_the_network_stops():
    model = unets.ours(SMALL)
    z, t, context, _ = unets.inputs(SMALL, torch.float32)
    with pytest.raises(UserError), attention_maps(model) as maps:
        model(z, t)
    model(z, t, context)
    assert maps == []


def test_attention_maps_may_end_in_any_order():
    model = unets.ours(SMALL)
    z, t, context, _ = unets.inputs(SMALL, torch.float32)
    first, second = attention_maps(model), attention_maps(model)
    one, other = first.__enter__(), second.__enter__()
    model(z, t, context)
    first.__exit__(None, None, None)
    model(z, t, context)
    second.__exit__(None, None, None)
    model(z, t, context)
    assert (len(one), len(other)) == (8, 16)
    assert not any(module._forward_pre_hooks for module in model.modules())
