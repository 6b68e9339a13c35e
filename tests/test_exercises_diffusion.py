"""The checks on diffusion: each takes the right solution, and names the mistake of each wrong one."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from graded import refusals
from torch import Tensor

from ldm_edu.diffusion import GaussianMixture, Schedule, ddpm, dpm_solver
from ldm_edu.exercises.diffusion import (
    check_ddim_step,
    check_eta,
    check_noising,
    check_posterior_variance,
    check_second_order_step,
    check_v,
)

CHECKS = {
    check_noising: "noising",
    check_posterior_variance: "posterior variance",
    check_v: "v from ε",
    check_ddim_step: "DDIM step",
    check_eta: "η",
    check_second_order_step: "second-order step",
}


# The right solutions, written as a learner would: with nothing of the package.


def noising(z0: Tensor, noise: Tensor, levels: Tensor, t: Tensor) -> Tensor:
    level = levels[t][:, None, None, None]
    return torch.sqrt(level) * z0 + torch.sqrt(1 - level) * noise


def posterior(betas: Tensor) -> Tensor:
    found, before = [], 1.0
    for beta in betas.tolist():
        now = before * (1 - beta)
        found.append((1 - before) / (1 - now) * beta)
        before = now
    return torch.tensor(found)


def velocity(epsilon: Tensor, z: Tensor, level: Tensor) -> Tensor:
    return (epsilon - torch.sqrt(1 - level) * z) / torch.sqrt(level)


def step(z: Tensor, e: Tensor, now: Tensor, to: Tensor) -> Tensor:
    return to**0.5 * (z - (1 - now) ** 0.5 * e) / now**0.5 + (1 - to) ** 0.5 * e


def sigma(eta: Tensor, now: Tensor, to: Tensor) -> float:
    return float(eta) * math.sqrt((1 - to) / (1 - now)) * math.sqrt(1 - now / to)


def half_log_snr(level: Tensor) -> Tensor:
    return torch.log(torch.sqrt(level) / torch.sqrt(1 - level))


def second(
    z: Tensor, z0: Tensor, old: Tensor, before: Tensor, now: Tensor, to: Tensor, r: Callable = lambda a, b: a / b,
    half: float = 0.5, e: Callable = lambda h: torch.exp(-h),
) -> Tensor:  # fmt: skip
    h_before, h = half_log_snr(now) - half_log_snr(before), half_log_snr(to) - half_log_snr(now)
    direction = z0 + half / r(h_before, h) * (z0 - old)
    return (1 - to) ** 0.5 / (1 - now) ** 0.5 * z - to**0.5 * (e(h) - 1) * direction


RIGHT = dict(zip(CHECKS, (noising, posterior, velocity, step, sigma, second), strict=True))


@pytest.mark.parametrize("check", CHECKS, ids=CHECKS.values())
def test_a_right_solution_passes(check: Callable, capsys: pytest.CaptureFixture):
    assert check(RIGHT[check]) is None
    assert capsys.readouterr().out == f"ok: {CHECKS[check]}\n"


def test_the_solutions_are_what_the_package_does():
    levels, z = (
        Schedule(T=50, end=0.2).alphas_cumprod,
        torch.linspace(-2, 2, 8, dtype=torch.float64).view(4, 2),
    )
    data = GaussianMixture(torch.tensor([[1.0, 0.0], [-1.0, 0.5]]), 0.3)
    steps = list(dpm_solver(data.denoiser(levels), z, levels, [49, 30, 5], stop=0))
    for (a, b), c in zip(pairwise(steps), steps[2:], strict=False):
        arguments = (b.z, b.z0, a.z0, levels[a.t], levels[b.t], levels[c.t])
        torch.testing.assert_close(second(*arguments), c.z)
    one, none = (
        [
            s.z
            for s in ddpm(
                data.denoiser(levels), z, levels, [49, 30], draw=lambda shape, x=x: x * torch.ones(4, 2)
            )
        ]
        for x in (1.0, 0.0)
    )
    assert (one[1] - none[1]).mean().item() == pytest.approx(sigma(torch.tensor(1.0), levels[49], levels[30]))
    everywhere = posterior(Schedule(T=50, end=0.2).betas)
    assert everywhere[31].item() == pytest.approx(
        sigma(torch.tensor(1.0), levels[31], levels[30]) ** 2, rel=1e-5
    )


def level_of(levels: Tensor, t: Tensor) -> Tensor:
    return levels[t].reshape(-1, 1, 1, 1)


NOISING = {
    "take the roots": lambda x, e, a, t: level_of(a, t) * x + (1 - level_of(a, t)) * e,
    "exchanged": lambda x, e, a, t: noising(e, x, a, t),
    "1-√ᾱ": lambda x, e, a, t: level_of(a, t).sqrt() * x + (1 - level_of(a, t).sqrt()) * e,
    "root of 1-ᾱ": lambda x, e, a, t: level_of(a, t).sqrt() * x + (1 - level_of(a, t)) * e,
    "root of ᾱ": lambda x, e, a, t: level_of(a, t) * x + (1 - level_of(a, t)).sqrt() * e,
    "must fade": lambda x, e, a, t: x + (1 - level_of(a, t)).sqrt() * e,
    "wrong sign": lambda x, e, a, t: noising(x, -e, a, t),
    "too early": lambda x, e, a, t: noising(x, e, a, t - 1),
    "one ᾱ for the whole batch": lambda x, e, a, t: a[t[0]].sqrt() * x + (1 - a[t[0]]).sqrt() * e,
    "product once more": lambda x, e, a, t: noising(x, e, torch.cumprod(a, 0), t),
    "your answer is .*; it should be": lambda x, e, a, t: e,
    "stops with RuntimeError": lambda x, e, a, t: a[t].sqrt() * x + (1 - a[t]).sqrt() * e,
}


def ratio(before: Callable, product: Callable = lambda b: torch.cumprod(1 - b, 0)) -> Callable:
    return lambda b: b * (1 - before(product(b))) / (1 - product(b))


def after(first: float) -> Callable:
    return lambda a: torch.cat([torch.tensor([first]), a[:-1]])


POSTERIOR = {
    "is β_t; at t = 0 it should be 0": lambda b: b,
    "you took 0": ratio(after(0.0)),
    "1, not ᾱ_0": ratio(lambda a: a[[0, *range(len(a) - 1)]]),
    "roll goes round": ratio(lambda a: torch.roll(a, 1)),
    "step after": ratio(lambda a: a[[*range(1, len(a)), -1]]),
    "upside down": lambda b: (1 - torch.cumprod(1 - b, 0)) / (1 - after(1.0)(torch.cumprod(1 - b, 0))) * b,
    "α_t alone": ratio(after(1.0), lambda b: 1 - b),
    "what z_t alone says": lambda b: after(1.0)(torch.cumprod(1 - b, 0)) / torch.cumprod(1 - b, 0) * b,
    "the standard deviation": lambda b: posterior(b) ** 0.5,
    "takes the logarithm": lambda b: torch.cat([posterior(b)[1:2], posterior(b)[1:]]),
    r"shape \(5,\); it should be \(6,\)": lambda b: posterior(b)[1:],
}


def clean(e: Tensor, z: Tensor, a: Tensor) -> Tensor:
    return (z - (1 - a).sqrt() * e) / a.sqrt()


V = {
    "not z_t": lambda e, z, a: a.sqrt() * e - (1 - a).sqrt() * z,
    "with a minus": lambda e, z, a: a.sqrt() * e + (1 - a).sqrt() * clean(e, z, a),
    "exchanged": lambda e, z, a: (1 - a).sqrt() * e - a.sqrt() * clean(e, z, a),
    "it is -v": lambda e, z, a: (1 - a).sqrt() * clean(e, z, a) - a.sqrt() * e,
    "take the roots": lambda e, z, a: a * e - (1 - a) * clean(e, z, a),
    "that is z_0": clean,
    "flow matching": lambda e, z, a: e - clean(e, z, a),
    "division is missing": lambda e, z, a: a.sqrt() * e - (1 - a).sqrt() * (z - (1 - a).sqrt() * e),
    "for level = 0.7 is": lambda e, z, a: 0 * e,
}
STEP = {
    "that you put back": lambda z, e, a, b: b.sqrt() * clean(e, z, a) + (1 - a).sqrt() * e,
    "the signal belongs": lambda z, e, a, b: a.sqrt() * clean(e, z, a) + (1 - b).sqrt() * e,
    "the noise is missing": lambda z, e, a, b: b.sqrt() * clean(e, z, a),
    "all the way": lambda z, e, a, b: clean(e, z, a),
    "divide by √ᾱ": lambda z, e, a, b: b.sqrt() * (z - (1 - a).sqrt() * e) + (1 - b).sqrt() * e,
    "take the roots": lambda z, e, a, b: b * (z - (1 - a) * e) / a + (1 - b) * e,
    "are exchanged": lambda z, e, a, b: step(z, e, b, a),
    "wrong sign": lambda z, e, a, b: b.sqrt() * clean(e, z, a) - (1 - b).sqrt() * e,
    "now = 0.2, following = 0.5": lambda z, e, a, b: z,
}
ETA = {
    "then times η": lambda n, a, b: n * sigma(1.0, a, b) ** 2,
    "asked for is σ": lambda n, a, b: sigma(n, a, b) ** 2,
    "it would be η²": lambda n, a, b: (n * sigma(1.0, a, b) ** 2) ** 0.5,
    "that is √β": lambda n, a, b: n * (1 - a / b) ** 0.5,
    "upside down": lambda n, a, b: n * torch.sqrt((1 - a) / (1 - b) * (1 - a / b)),
    "you took 1 - ᾱ_now": lambda n, a, b: n * torch.sqrt((1 - b) / (1 - a) * (1 - a)),
    "η is missing": lambda n, a, b: sigma(1.0, a, b),
    "ᾱ rises": lambda n, a, b: n * torch.sqrt((1 - a) / (1 - b) * (1 - b / a)),
    "eta = 1.0, now = 0.2, following = 0.5 is": lambda n, a, b: 0.5,
}
SECOND = {
    "first order": lambda *a: second(*a, half=0.0),
    "yours is upside down": lambda *a: second(*a, r=lambda before, h: h / before),
    "the ½ is missing": lambda *a: second(*a, half=1.0),
    "is not 1": lambda *a: second(*a, r=lambda before, h: 1),
    "the sign": lambda *a: second(*a, half=-0.5),
    r"not e\^\{h\}": lambda *a: second(*a, e=torch.exp),
    "r does not mind": lambda *a: second(*a, e=lambda h: torch.exp(-2 * h)),
    "before = 0.05, now = 0.2, following = 0.7 is": lambda z, *rest: z,
}
test_a_wrong_solution_is_refused_in_words, test_what_a_learner_leaves_undone_is_refused_in_words = refusals(
    CHECKS, (NOISING, POSTERIOR, V, STEP, ETA, SECOND)
)
