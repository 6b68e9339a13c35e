"""The noise schedule and the three things a network can predict, against diffusers' and closed forms."""

import math
import re
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ldm_edu.diffusion import (
    PREDICTIONS,
    Schedule,
    alpha_cumprod_at,
    convert,
    half_log_snr,
    snr,
    split_prediction,
    training_target,
)
from ldm_edu.runtime import UserError

KINDS = {  # ours, and diffusers' name for the same
    "linear": ("linear", 1e-4, 0.02),
    "sqrt_linear": ("scaled_linear", 0.00085, 0.012),
    "cosine": ("squaredcos_cap_v2", 0.0, 0.999),
}


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    """diffusers' schedulers."""
    return pytest.importorskip("diffusers.schedulers", reason="compares with diffusers, of the extra [test]")


def schedule(kind: str = "sqrt_linear", T: int = 1000) -> Schedule:
    return Schedule(kind, T, *KINDS[kind][1:])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# the schedule


@pytest.mark.parametrize("kind", KINDS)
def test_the_schedules_are_those_of_diffusers(kind: str, theirs: ModuleType):
    name, start, end = KINDS[kind]
    own = schedule(kind)
    other = theirs.DDPMScheduler(1000, beta_schedule=name, beta_start=start, beta_end=end)
    torch.testing.assert_close(own.betas.float(), other.betas, rtol=1e-6, atol=1e-9)
    # Their product of a thousand factors is in single precision; in double precision it is ours.
    assert own.alphas_cumprod.dtype == torch.float64
    torch.testing.assert_close(own.alphas_cumprod.float(), other.alphas_cumprod, rtol=2e-5, atol=0)
    product = torch.cumprod(1 - other.betas.double(), 0)
    torch.testing.assert_close(own.alphas_cumprod[:-1], product[:-1], rtol=1e-6, atol=0)


def test_closed_forms():
    steps = torch.arange(1000, dtype=torch.float64) / 999
    torch.testing.assert_close(schedule("linear").betas, 1e-4 + (0.02 - 1e-4) * steps)
    root = 0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * steps
    torch.testing.assert_close(schedule("sqrt_linear").betas, root**2)
    t = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    level = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(schedule("cosine").alphas_cumprod[:-1], level[:-1], rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_without_numbers_is_the_one_in_its_paper(kind: str):
    """A cosine capped at another kind's largest β would be no cosine."""
    assert torch.equal(Schedule(kind).betas, schedule(kind).betas)
    assert Schedule(kind, end=0.5).config() == {"kind": kind, "T": 1000, "start": KINDS[kind][1], "end": 0.5}


@pytest.mark.parametrize("T", [1, 2, 50, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_the_signal_only_falls(kind: str, T: int):
    own = schedule(kind, T)
    levels = [1.0, *own.alphas_cumprod.tolist()]
    assert len(levels) == T + 1 and all(1 >= a > b > 0 for a, b in pairwise(levels))
    again = Schedule(**own.config())
    assert torch.equal(again.betas, own.betas) and again.config() == own.config()


@pytest.mark.parametrize(
    "arguments, word",
    [
        (dict(kind="sine"), "sine"), (dict(T=0), "T=0"), (dict(start=-1), "start=-1"), (dict(end=1.0), "end=1.0"),
        (dict(start=0.5, end=0.1), "start=0.5"), (dict(start=float("nan")), "nan"),
    ],
)  # fmt: skip
def test_what_is_no_schedule_is_named(arguments: dict, word: str):
    with pytest.raises(UserError, match=re.escape(word)):
        Schedule(**arguments)


def test_noise_has_the_moments_of_equation_4():
    own, z0 = schedule(), torch.tensor([[[[1.5]]], [[[-0.5]]], [[[0.0]]]]).expand(3, 1, 200, 200)
    t = torch.tensor([0, 500, 999])
    z = own.add_noise(z0, normal(3, 1, 200, 200), t)
    level = own.alphas_cumprod[t].float()
    torch.testing.assert_close(z.mean((1, 2, 3)), level.sqrt() * z0[:, 0, 0, 0], atol=0.025, rtol=0)  # 5 errors
    torch.testing.assert_close(z.var((1, 2, 3)), 1 - level, atol=0, rtol=0.04)
    assert z.dtype == torch.float32
    torch.testing.assert_close(own.at(t, z), level.view(3, 1, 1, 1))


@pytest.mark.parametrize(
    "z0, noise, t, words",
    [
        (normal(4, 1, 2, 2), normal(1, 1, 2, 2), torch.arange(4), r"\(4, 1, 2, 2\), not \(1, 1, 2, 2\)"),
        (normal(4, 1, 2, 2), normal(1, 2, 2), torch.arange(4), r"z_0's shape.*not \(1, 2, 2\)"),
        (torch.ones(4, 1, 2, 2, dtype=torch.uint8), normal(4, 1, 2, 2), torch.arange(4), "not torch.uint8"),
        (normal(4, 1, 2, 2), normal(4, 1, 2, 2), 3, "a tensor of integers from 0 to 999, not of type int"),
        (normal(4, 1, 2, 2), normal(4, 1, 2, 2), [0, 1, 2, 3], "not of type list"),
    ],
)
def test_what_cannot_be_noised_is_named(z0: Tensor, noise: Tensor, t: object, words: str):
    with pytest.raises(UserError, match=words):
        schedule().add_noise(z0, noise, t)


# what the network predicts


@settings(max_examples=60, deadline=None)
@given(prediction=st.sampled_from(PREDICTIONS), t=st.integers(0, 999), seed=st.integers(0, 2**31))
def test_what_it_is_taught_means_what_it_was_made_of(prediction: str, t: int, seed: int):
    z0, noise = normal(2, 1, 2, 3, 3, seed=seed).double()
    own = schedule()
    level = own.alphas_cumprod[t]
    target = training_target(prediction, z0, noise, level)
    z = own.add_noise(z0, noise, torch.tensor([t]))
    back, epsilon = split_prediction(prediction, target, z, level)
    torch.testing.assert_close(back, z0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(epsilon, noise, rtol=1e-9, atol=1e-9)


def test_the_targets_themselves(theirs: ModuleType):
    z0, noise = normal(2, 4, 2, 3, 3)
    t, own = torch.tensor([0, 10, 500, 999]), schedule()
    scheduler = theirs.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    level = own.at(t, z0)
    assert training_target("eps", z0, noise, level) is noise and training_target("x0", z0, noise, level) is z0
    torch.testing.assert_close(training_target("v", z0, noise, level), scheduler.get_velocity(z0, noise, t))
    torch.testing.assert_close(own.add_noise(z0, noise, t), scheduler.add_noise(z0, noise, t))


@pytest.mark.parametrize("word", [*PREDICTIONS, "score"])
def test_levels_that_would_multiply_another_dimension_are_refused(word: str):
    """With as many rows as columns, torch would take one for the other without a word."""
    z, t = normal(4, 4, 4, 4), torch.tensor([3, 900, 5, 6])
    shaped = schedule().at(t, z)
    assert convert(z, z, shaped, word, "v").shape == z.shape
    for level in (shaped.flatten(), shaped[..., 0]):
        for call in (
            lambda level=level: convert(z, z, level, word, "v"),
            lambda level=level: split_prediction("x0", z, z, level),
            lambda level=level: training_target("v", z, z, level),
        ):
            with pytest.raises(UserError, match=r"z \(4, 4, 4, 4\), as Schedule.at.* it is \(4,"):
                call()
    points = normal(4, 2)  # and a level for each point of a plane
    one = convert(points[1], points[1], shaped[1, 0, 0, 0], word, "v")
    torch.testing.assert_close(convert(points, points, shaped[:, :, 0, 0], word, "v")[1], one)


def test_a_level_may_be_a_plain_number():
    z0, noise = normal(2, 1, 2, 3, 3)
    level = torch.tensor(0.7, dtype=torch.float64)
    assert torch.equal(training_target("v", z0, noise, 0.7), training_target("v", z0, noise, level))
    for word in (*PREDICTIONS, "score"):
        found = convert(noise, z0, 0.7, word, "x0")
        assert found.dtype == torch.float32 and torch.equal(found, convert(noise, z0, level, word, "x0"))
    assert snr(0.7) == snr(level) and half_log_snr(0.7) == half_log_snr(level)
    assert alpha_cumprod_at(0.3) == torch.tensor(0.6, dtype=torch.float64).sigmoid()


def test_an_unknown_prediction_is_named():
    for call in (training_target, split_prediction):
        with pytest.raises(UserError, match="eps, x0, v, not 'score'"):
            call("score", torch.zeros(1), torch.zeros(1), torch.ones(1))
