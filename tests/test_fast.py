"""What makes sampling faster changes nothing else: K and V kept, the network compiled, and the way back."""

import copy
import pickle
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from unets import ours

from ldm_edu.diffusion import guided
from ldm_edu.layers import Attention
from ldm_edu.layers.attention import repeated
from ldm_edu.runtime import UserError
from ldm_edu.unet import UNet, UNetConfig, attention_maps
from ldm_edu.unet.fast import Denoiser, keys_and_values

CONFIG = UNetConfig(
    channels=16, channel_multipliers=(1, 2), blocks=1, attention_levels=(1,), heads=2, context_channels=8, groups=4
)


@pytest.fixture
def unet() -> UNet:
    return ours(CONFIG)


def given(context_seed: int = 0, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(context_seed)
    z = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    return z, torch.full((batch,), 500), torch.randn(batch, 5, 8, generator=generator)


def test_keys_and_values_stand_for_the_context(unet: UNet):
    z, t, context = given()
    kept = keys_and_values(unet, context)
    layers = {module for name, module in unet.named_modules() if name.endswith("cross_attention")}
    assert set(kept) == layers and len(layers) == 4
    with torch.no_grad():
        assert torch.equal(unet(z, t, kept), unet(z, t, context))
        of_one = unet(z, t, keys_and_values(unet, context[:1]))  # stands for both latents
        torch.testing.assert_close(of_one, unet(z, t, context[[0, 0]]))


def test_projected_once_a_prompt(unet: UNet, monkeypatch: pytest.MonkeyPatch):
    projected = []
    project = Attention.project

    def counted(self: Attention, context: Tensor) -> tuple[Tensor, Tensor]:
        projected.append(tuple(context.shape[1:]) == (5, 8))
        return project(self, context)

    monkeypatch.setattr(Attention, "project", counted)
    denoiser, (z, t, context), other = Denoiser(unet), given(), given(1)[2]
    answers = [denoiser(z, t, c) for c in (context, context, context, other, context.clone())]
    assert sum(projected) == 3 * 4, "four cross-attentions, three contexts"
    with torch.no_grad():
        for answer, c in zip(answers, (context, context, context, other, context)):
            assert torch.equal(answer, unet(z, t, c))


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(
    "other",
    [{}, {"attention_levels": ()}, {"attention_levels": (0, 1)}, {"scale_shift": True}, {"transformer_depth": 2}],
    ids=str,
)
def test_what_two_conditions_share_is_computed_once(
    other: dict[str, Any], compile: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("ldm_edu.unet.fast.compiled", lambda network: network)
    unet = ours(replace(CONFIG, **other))
    (z, t, context), null = given(), given(1)[2]
    t[1] = 3
    with torch.no_grad():
        expected = unet(torch.cat([z, z]), torch.cat([t, t]), torch.cat([null, context]))
    rows = []
    denoiser = Denoiser(unet, compile)
    for module in denoiser.unet.modules():
        if isinstance(module, Attention):
            module.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    torch.testing.assert_close(denoiser(z, t, torch.stack([null, context])), expected)
    assert rows == [2] + [4] * (len(rows) - 1), "up to the first cross-attention"
    without, with_condition = expected.chunk(2)
    assert (without - with_condition).abs().max() > 0.01 and (expected[0] - expected[1]).abs().max() > 0.01
    torch.testing.assert_close(
        guided(denoiser, context, null, 3.0)(z, t), without + 3 * (with_condition - without), rtol=1e-4, atol=1e-4
    )
    assert rows.count(2) == 2, "guidance makes use of it"


def test_maps_of_shared_calls_are_those_of_calls_apart(unet: UNet):
    (z, t, context), null = given(), given(1)[2]
    with attention_maps(unet) as shared:
        Denoiser(unet)(z, t, torch.stack([null, context]))
    with attention_maps(unet) as apart, torch.no_grad():
        unet(torch.cat([z, z]), torch.cat([t, t]), torch.cat([null, context]))
    for one, other in zip(shared, apart, strict=True):
        torch.testing.assert_close(one.probabilities, other.probabilities)


def test_repeating_keeps_the_memory_order():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    twice = repeated(x, 4)
    assert twice.shape == (4, 3, 4, 5) and twice.is_contiguous(memory_format=torch.channels_last)


def test_several_contexts_that_do_not_fit_are_refused(unet: UNet):
    z, t, context = given()
    with pytest.raises(UserError, match="with B = 2 here, not .3, 5, 8"):
        Denoiser(unet)(z, t, torch.stack(2 * [context[[0, 1, 1]]]))


def test_answers_are_not_overwritten_and_have_no_gradient(unet: UNet):
    denoiser, (z, t, context) = Denoiser(unet), given()
    first = denoiser(z, t, context)
    before = first.clone()
    denoiser(2 * z, t, context)
    assert torch.equal(first, before) and not first.requires_grad


def test_a_unet_without_context():
    torch.manual_seed(0)
    config = UNetConfig(
        channels=16, channel_multipliers=(1, 2), blocks=1, attention_levels=(0, 1), heads=2, context_channels=None,
        groups=4,
    )  # fmt: skip
    unet = UNet(config).eval()
    torch.nn.init.normal_(unet.conv_out.weight)
    z, t, _ = given()
    with torch.no_grad():
        assert torch.equal(Denoiser(unet)(z, t, None), unet(z, t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_weights_are_noticed(unet: UNet, dtype: torch.dtype):
    denoiser = Denoiser(unet, compile=True, dtype=dtype)
    with torch.no_grad():
        unet.conv_in.weight.mul_(1)
    assert denoiser.is_of(unet), "the same numbers, written again"
    for p in unet.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(unet.parameters(), lr=0.1, fused=True).step()  # raises no weight's version counter
    assert not denoiser.is_of(unet)
    denoiser = Denoiser(unet, compile=True, dtype=dtype)
    assert denoiser.is_of(unet)
    unet.conv_in.weight.data[0] += 1
    assert not denoiser.is_of(unet)


def test_a_unet_of_the_same_weights_and_other_heads_is_another(unet: UNet):
    other = UNet(replace(unet.config, heads=2 * unet.config.heads))
    other.load_state_dict(unet.state_dict())
    assert not Denoiser(unet, compile=True).is_of(other)


def test_a_prompt_that_was_written_into_is_another(unet: UNet):
    denoiser, (z, t, context) = Denoiser(unet), given()
    denoiser(z, t, context)
    context.mul_(2)
    with torch.no_grad():
        torch.testing.assert_close(denoiser(z, t, context), unet(z, t, context))


def test_the_compiler_sees_one_memory_order(unet: UNet, monkeypatch: pytest.MonkeyPatch):
    strides = []
    monkeypatch.setattr("ldm_edu.unet.fast.compiled", lambda f: lambda z, *a: strides.append(z.stride()) or f(z, *a))
    denoiser, (z, t, context) = Denoiser(unet, compile=True), given()
    answers = [denoiser(x, t, context) for x in (z, z.to(memory_format=torch.channels_last))]
    assert len(strides) == 2 and strides[0] == strides[1]
    torch.testing.assert_close(*answers)


def test_threads_do_not_meet_in_the_memory_of_a_cuda_graph(unet: UNet, monkeypatch: pytest.MonkeyPatch):
    """Here played by a program that writes every answer to the same place, and takes its time."""
    memory = torch.empty(2, 4, 8, 8)

    def recorded(network: UNet) -> Callable[..., Tensor]:
        def replay(*inputs: Any) -> Tensor:
            memory.copy_(network(*inputs))
            time.sleep(0.01)
            return memory

        return replay

    monkeypatch.setattr("ldm_edu.unet.fast.compiled", recorded)
    denoisers, (z, t, context) = [Denoiser(unet, compile=True) for _ in range(2)], given()
    with ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(lambda i: denoisers[i % 2](i * z, t, context), range(8)))
    with torch.no_grad():
        for i, answer in enumerate(answers):
            torch.testing.assert_close(answer, unet(i * z, t, context))


def test_without_a_compiler_it_says_why_and_goes_on(unet: UNet, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> Tensor:
        raise RuntimeError("no working C++ compiler\nand much more")

    monkeypatch.setattr(torch, "compile", lambda network, **_: broken)
    denoiser, (z, t, context) = Denoiser(unet, compile=True), given()
    with pytest.warns(UserWarning, match="without the compiler, which failed: no working C.. compiler$"):
        first = denoiser(z, t, context)
    assert torch.equal(denoiser(z, t, context), first), "the second call does not try, nor warn, again"
    with torch.no_grad():
        torch.testing.assert_close(first, unet(z, t, context))


def test_while_maps_are_recorded_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch):
    """A compiled copy would record nothing, or fail."""
    monkeypatch.setattr("ldm_edu.unet.fast.compiled", lambda network: network)
    model = tiny.latent_diffusion()

    def sample(compiled: bool = True) -> Tensor:
        return model.sample("a red circle", num_steps=2, compiled=compiled)

    for _ in range(2):  # before the model was compiled, and after
        with attention_maps(model.unet) as maps, pytest.warns(UserWarning, match="without the compiler: .*maps"):
            answer = sample()
        assert len(maps) == 2 * len(keys_and_values(model.unet, torch.zeros(1, 8, 16))) > 0
        torch.testing.assert_close(answer, sample(compiled=False))
        torch.testing.assert_close(answer, sample())
    assert len(model._compiled) == 1


def test_a_mistake_of_the_caller_is_not_the_compilers(unet: UNet):
    z, t, _ = given()
    with pytest.raises(UserError, match="with context"):
        Denoiser(unet)(z, t, None)


def test_the_pipeline_compiles_once_for_the_same_weights(monkeypatch: pytest.MonkeyPatch):
    compiled = []
    monkeypatch.setattr("ldm_edu.unet.fast.compiled", lambda network: compiled.append(network) or network)
    model = tiny.latent_diffusion()

    def sample(**arguments: object) -> Tensor:
        return model.sample("a red circle", num_steps=2, **arguments)

    eager = sample()
    assert not compiled
    torch.testing.assert_close(sample(compiled=True), eager)
    sample(compiled=True)
    assert len(compiled) == 1 and compiled[0] is not model.unet
    sample(compiled=True, precision="bfloat16")
    assert [unet.conv_in.weight.dtype for unet in compiled] == [torch.float32, torch.bfloat16]
    with torch.no_grad():
        model.unet.conv_out.bias += 1
    torch.testing.assert_close(sample(compiled=True), sample())
    assert len(compiled) == 3


def test_a_model_that_was_compiled_can_be_pickled_and_copied(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ldm_edu.unet.fast.compiled", lambda network: lambda *given: network(*given))
    model = tiny.latent_diffusion()
    expected = model.sample("a red circle", num_steps=2, compiled=True)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        torch.testing.assert_close(other.sample("a red circle", num_steps=2), expected)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("error:Sampling without")
def test_compiled_equals_eager():
    unet = ours(replace(CONFIG, channel_multipliers=(1,), attention_levels=()))  # the middle has attention
    z, t, context = given()
    denoiser = Denoiser(unet, compile=True)
    with torch.no_grad():
        torch.testing.assert_close(denoiser(z, t, context), unet(z, t, context), rtol=1e-4, atol=1e-4)
        other = given(1)[2]  # the K and V of the first prompt have not become constants, as the weights have
        torch.testing.assert_close(denoiser(z, t, other), unet(z, t, other), rtol=1e-4, atol=1e-4)
        # And another network of the same shape, or this one trained on, is not answered by the first one's program.
        before = unet(z, t, context)
        for p in unet.parameters():
            torch.nn.init.normal_(p, std=0.2)
        second = Denoiser(unet, compile=True)
        expected = torch.cat([unet(z, t, each) for each in (other, context)])  # two conditions at once
        torch.testing.assert_close(second(z, t, torch.stack([other, context])), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(denoiser(z, t, context), before, rtol=1e-4, atol=1e-4)
