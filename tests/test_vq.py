"""Vector quantisation: the nearest code, the straight-through gradient, both terms, usage, and the restart of codes."""

import math
from dataclasses import replace

import pytest
import tiny
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ldm_edu.autoencoder import AutoencoderVQ, VectorQuantizer, VQConfig, perplexity, usage
from ldm_edu.runtime import UserError

SHAPE = dict(channels=8, channel_multipliers=(1, 1, 2), blocks=1, groups=4)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantizer(codebook: Tensor, **arguments: object) -> VectorQuantizer:
    made = VectorQuantizer(*codebook.shape, **arguments)
    with torch.no_grad():
        made.codebook.weight.copy_(codebook)
    return made


def first_stage(size: int = 16, seed: int = 0) -> AutoencoderVQ:
    """f = 4, two latent channels, with codes where the latents are."""
    torch.manual_seed(seed)
    model = tiny.stirred(AutoencoderVQ(VQConfig(latent_channels=2, codebook_size=size, **SHAPE))).eval()
    with torch.no_grad():
        latent = model.encode(draw(2, 3, 16, 16, seed=seed).clamp(-1, 1))
        rows = latent.movedim(1, -1).reshape(-1, 2)
        model.quantizer.codebook.weight.copy_(rows.mean(0) + 1.5 * rows.std(0) * draw(size, 2, seed=seed + 1))
    return model


def distances(latent: Tensor, codebook: Tensor) -> Tensor:
    """Squared, in float64, of each place to each code: `(B, h, w, n)`."""
    return (latent.double().movedim(1, -1)[..., None, :] - codebook.double()).square().sum(-1)


# the nearest code


@settings(max_examples=60, deadline=None)
@given(
    b=st.integers(1, 3), c=st.integers(1, 5), h=st.integers(1, 4), w=st.integers(1, 5), n=st.integers(1, 40),
    scale=st.sampled_from([0.01, 1.0, 30.0]), whole=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_the_code_is_the_one_that_a_search_finds(
    b: int, c: int, h: int, w: int, n: int, scale: float, whole: bool, seed: int
):
    latent, codebook = scale * draw(b, c, h, w, seed=seed), scale * draw(n, c, seed=seed + 1)
    if whole:  # then float32 is exact, and only ties are free
        latent, codebook = (4 * latent / scale).round(), (4 * codebook / scale).round()
    own = quantizer(codebook)
    codes = own.codes(latent)
    assert codes.shape == (b, h, w) and codes.dtype == torch.int64
    every = distances(latent, codebook)
    chosen, least = every.gather(-1, codes[..., None])[..., 0], every.amin(-1)
    assert torch.equal(chosen, least) if whole else (chosen <= least + 1e-5 * scale**2).all()
    assert torch.equal(own.lookup(codes), codebook[codes].permute(0, 3, 1, 2))


def test_large_latents_are_searched_in_parts():
    latent, codebook = draw(2, 2, 100, 130), draw(5, 2, seed=1)  # 26,000 places
    assert torch.equal(quantizer(codebook).codes(latent), distances(latent, codebook).argmin(-1))


def test_autocast_changes_no_code():
    latent, codebook = draw(2, 3, 32, 32), draw(1024, 3, seed=1)
    own = quantizer(codebook)
    codes = own.codes(latent)
    rows = latent.movedim(1, -1).flatten(0, 2).bfloat16()
    rounded = (codebook.square().sum(1) - 2 * rows @ codebook.bfloat16().T).argmin(1)
    assert (rounded != codes.flatten()).float().mean() > 0.1, "then bfloat16 would do no harm, and this test no good"
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(own.codes(latent), codes) and torch.equal(own(latent)[2], codes)
        assert own(latent.bfloat16())[0].dtype == torch.float32
        assert first_stage().encode(torch.zeros(1, 3, 16, 16)).dtype == torch.float32


def test_a_codebook_has_a_vector():
    with pytest.raises(UserError, match="codebook_size must be at least 1, not 0"):
        VQConfig(codebook_size=0)
    assert VQConfig(codebook_size=1).f == 4


def test_a_new_codebook_is_small_and_even():
    codebook = VectorQuantizer(64, 8).codebook.weight
    assert codebook.abs().max() <= 1 / 64 and codebook.std().item() == pytest.approx(1 / 64 / math.sqrt(3), rel=0.1)


# gradients


def test_the_gradient_goes_straight_through():
    own, latent = quantizer(draw(9, 3)), draw(2, 3, 4, 5, seed=1).requires_grad_()
    quantized, _, codes = own(latent)
    torch.testing.assert_close(quantized, own.lookup(codes))
    upstream = draw(2, 3, 4, 5, seed=2)
    quantized.backward(upstream)
    assert torch.equal(latent.grad, upstream) and own.codebook.weight.grad is None


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("beta", [0.25, 0.0, 2.0])
def test_each_term_moves_one_side_and_beta_weighs_the_commitment(beta: float, legacy: bool):
    own = quantizer(draw(6, 3), commitment_weight=beta, legacy=legacy)
    latent = draw(2, 3, 4, 4, seed=1).requires_grad_()
    _, loss, codes = own(latent)
    loss.backward()
    error = own.lookup(codes).detach() - latent.detach()
    assert loss.item() == pytest.approx((1 + beta) * error.square().mean().item(), rel=1e-5)
    on_codebook, on_encoder = (beta, 1.0) if legacy else (1.0, beta)
    torch.testing.assert_close(latent.grad, on_encoder * -2 * error / error.numel())
    pull = torch.zeros(6, 3).index_add_(0, codes.flatten(), error.movedim(1, -1).reshape(-1, 3))
    torch.testing.assert_close(own.codebook.weight.grad, on_codebook * 2 * pull / error.numel())


def test_the_paper_s_beta_is_the_default_and_the_mistake_is_not():
    own = VectorQuantizer(4, 2)
    assert own.commitment_weight == 0.25 and own.legacy is False and own.restart_after == 0


# usage


@settings(max_examples=60, deadline=None)
@given(codes=st.lists(st.integers(0, 19), min_size=1, max_size=60), more=st.integers(0, 50))
def test_perplexity_lies_between_one_and_the_number_of_codes_in_use(codes: list[int], more: int):
    size = 20 + more
    value, used = perplexity(torch.tensor(codes), size).item(), len(set(codes))
    shares = [codes.count(code) / len(codes) for code in set(codes)]
    assert value == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)), rel=1e-4)
    assert 1 - 1e-4 <= value <= used * (1 + 1e-4) and usage(torch.tensor(codes), size) == used / size


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_perplexity_of_even_and_of_single_codes(size: int):
    codes = torch.arange(size).repeat(3).view(3, size, 1)
    assert perplexity(codes, size).item() == pytest.approx(size, rel=1e-4) and usage(codes, size) == 1
    assert perplexity(torch.full((2, 4, 4), size - 1), size).item() == pytest.approx(1, rel=1e-5)


# restart


def after_steps(steps: int, restart_after: int, seed: int = 0) -> tuple[VectorQuantizer, Tensor, list[Tensor]]:
    """A quantiser with far codes 2, 3, 4, of which 4 alone is chosen, once; and its codebook after each step."""
    own = quantizer(torch.tensor([[0.0, 0.0], [1.0, 1.0], [50.0, 0.0], [0.0, 60.0], [-70.0, 0.0]]))
    own.restart_after = restart_after
    latent, seen = draw(2, 2, 3, 3), []
    for step in range(steps):
        z = latent.clone()
        z[0, :, 0, 0] = torch.tensor([-70.0, 0.0]) if step == 1 else 0
        own.restart_dead_codes(z, own.codes(z), torch.Generator().manual_seed(seed + step))
        seen.append(own.codebook.weight.detach().clone())
    return own, z, seen


def test_dead_codes_move_onto_latents_and_no_others_move():
    _, latent, seen = after_steps(steps=3, restart_after=3)
    rows = latent.movedim(1, -1).reshape(-1, 2).tolist()
    assert torch.equal(seen[0], seen[1]), "too soon"
    moved = (seen[2] != seen[1]).any(1).nonzero().flatten().tolist()
    assert moved == [2, 3]  # 4 was chosen in the second step
    assert seen[2][2].tolist() in rows and seen[2][3].tolist() in rows


def test_restarts_hang_on_the_generator_alone():
    one, again, other = (after_steps(steps=3, restart_after=3, seed=seed)[2][-1] for seed in (0, 0, 7))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_zero_is_never():
    own, _, seen = after_steps(steps=12, restart_after=0)
    assert torch.equal(seen[0], seen[-1]) and own.idle.tolist()[2:] == [12, 12, 10]


def test_a_code_that_stays_dead_is_moved_again_and_does_not_count_as_used():
    own = quantizer(torch.tensor([[0.0, 0.0], [50.0, 0.0]]))
    own.restart_after, moved = 4, []
    for step in range(12):
        before = own.codebook.weight.detach().clone()
        latent = torch.zeros(1, 2, 2, 2)
        own.restart_dead_codes(latent, torch.zeros(1, 2, 2, dtype=torch.int64), torch.Generator())
        moved += [step] if not torch.equal(before, own.codebook.weight) else []
        with torch.no_grad():
            own.codebook.weight[1] = 50.0
    assert moved == [3, 7, 11] and own.unused.tolist() == [0, 112]


def test_two_codes_are_not_moved_onto_one_latent():
    own = quantizer(torch.arange(12.0).view(6, 2) + 100)
    own.restart_after, latent = 2, draw(1, 2, 2, 2)
    for count in (0, 4, 5):  # as many a step as there are latents; the others come next
        own.restart_dead_codes(latent, torch.full((1, 2, 2), 5), torch.Generator())
        rows = own.codebook.weight.tolist()
        assert sum(row[0] < 50 for row in rows) == count and len({tuple(row) for row in rows[:4]}) == 4


# the first stage


def test_the_latent_is_the_one_before_quantisation_and_the_decoder_quantises():
    model, images = first_stage(), draw(2, 3, 16, 24).clamp(-1, 1)
    with torch.no_grad():
        latent = model.encode(images)
        codes = model.quantizer.codes(latent)
        assert latent.shape == (2, 2, 4, 6) and not torch.isclose(latent, model.quantizer.lookup(codes)).all(1).any()
        assert codes.unique().numel() > 2
        assert torch.equal(model.decode(latent), model.decode_codes(codes))
        torch.testing.assert_close(model.posterior(images).sample(), latent, atol=1e-5, rtol=1e-5)
        # A small error disappears in the codebook, a large one does not.
        two = distances(latent, model.quantizer.codebook.weight).sqrt().topk(2, largest=False).values
        safe = (two[..., 1] - two[..., 0])[:, None].float() * 0.4  # half of the way could reach the next code
        direction = F.normalize(draw(2, 2, 4, 6, seed=3), dim=1)
        assert torch.equal(model.decode(latent + safe * direction), model.decode(latent))
        assert not torch.equal(model.decode(latent + 5 * direction), model.decode(latent))


def test_what_training_gets():
    model, images = first_stage(), draw(2, 3, 16, 16).clamp(-1, 1)
    latent = model.encode(images)
    quantized, loss, codes = model.quantizer(latent)
    given, penalty, readings = model.regularised(images, torch.Generator())
    assert torch.equal(given, quantized) and torch.equal(penalty, loss) and penalty.requires_grad
    assert not any(r.requires_grad for r in readings.values()) and readings["codebook"] == loss
    assert readings["perplexity"] == perplexity(codes, 16)
    spreads = latent.detach().transpose(0, 1).flatten(1).std(1)
    assert (readings["latent_std_min"], readings["latent_std_max"]) == (spreads.min(), spreads.max())
    assert readings["usage"].item() == pytest.approx(usage(codes, 16))  # from the first step on
    for _ in range(99):
        readings = model.regularised(images, torch.Generator())[2]
    assert 0 < usage(codes, 16) < 1 and readings["usage"].item() == pytest.approx(usage(codes, 16))
    model.quantizer.restart_after = 10  # a code that is moved is not used
    model.quantizer.idle.zero_(), model.quantizer.unused.zero_()
    unused = [code for code in range(16) if code not in codes]
    for _ in range(100):
        readings = model.regularised(images, torch.Generator())[2]
        model.quantizer.codebook.weight.data[unused] = 1e3
    assert readings["usage"].item() == pytest.approx(usage(codes, 16))


def test_before_its_start_nothing_is_quantised_and_codes_are_laid_out():
    model, images, draws = first_stage(), draw(2, 3, 16, 16).clamp(-1, 1), torch.Generator()
    quantizer, before = model.quantizer, model.quantizer.codebook.weight.detach().clone()
    quantizer.start, quantizer.restart_after = 3, 2
    rows = {tuple(row) for row in model.encode(images).movedim(1, -1).reshape(-1, 2).tolist()}
    for step in range(3):
        latent, penalty, readings = model.regularised(images, draws)
        assert torch.equal(latent, model.encode(images)) and penalty == 0 and latent.requires_grad
        assert readings["codebook"] == 0 and not {"perplexity", "usage"} & readings.keys()
        assert torch.equal(quantizer.codebook.weight, before) == (step == 0)
    assert {tuple(row) for row in quantizer.codebook.weight.tolist()} <= rows
    quantized, penalty, readings = model.regularised(images, draws)
    assert not torch.equal(quantized, latent) and penalty > 0 and readings["perplexity"] > 1


@pytest.mark.parametrize("size", [1, 300])
def test_any_codebook_size_trains_and_decodes(size: int):
    config = replace(VQConfig(latent_channels=2, **SHAPE), codebook_size=size)
    model, images = AutoencoderVQ(config), draw(1, 3, 8, 8)
    latent, penalty, readings = model.regularised(images, torch.Generator())
    (model.to_picture(latent).square().mean() + penalty).backward()
    assert all(p.grad is not None for p in model.parameters()) and readings["perplexity"] >= 1 - 1e-5
