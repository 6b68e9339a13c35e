"""PLMS and DPM-Solver++(2M): step by step against diffusers' in double precision, and the order of every sampler."""

import math
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import pytest
import torch
from denoisers import Draws, Network, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ldm_edu.diffusion import (
    PREDICTIONS,
    GaussianMixture,
    Schedule,
    alpha_cumprod_at,
    ddim,
    ddpm,
    dpm_solver,
    half_log_snr,
    plms,
    respaced_betas,
    spaced_timesteps,
)
from ldm_edu.runtime import UserError

LEVELS = Schedule().alphas_cumprod
THEIR_PREDICTION = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
START = normal(2, 3, 4, 4).double()


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    """diffusers' schedulers."""
    return pytest.importorskip("diffusers.schedulers", reason="compares with diffusers, of the extra [test]")


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-12 * max(1.0, theirs.abs().max().item()), rtol=0)


@pytest.mark.parametrize("spacing, stop", [("trailing", -1), ("uniform", 0)])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 10, 50])
def test_plms_steps_as_in_diffusers(num_steps: int, spacing: str, stop: int, theirs: ModuleType):
    """PNDM with skip_prk_steps; "uniform" down to the level of t = 0 is Stable Diffusion's own configuration."""
    scheduler = theirs.PNDMScheduler(
        skip_prk_steps=True, set_alpha_to_one=stop < 0, steps_offset=1,
        timestep_spacing={"trailing": "trailing", "uniform": "leading"}[spacing],
    )  # fmt: skip
    scheduler.alphas_cumprod = LEVELS
    scheduler.final_alpha_cumprod = torch.ones(()) if stop < 0 else LEVELS[0]
    scheduler.set_timesteps(num_steps)
    network, timesteps = Network(), spaced_timesteps(1000, num_steps, spacing)
    ours = list(plms(network, START, LEVELS, timesteps, stop=stop))
    called = scheduler.timesteps.tolist()
    if num_steps == 1:
        # They do not ask twice here; the released code does, and so do we where there is a level to ask at.
        assert called == timesteps and network.calls == timesteps + [0] * (stop == 0)
        if stop == 0:
            return
    else:
        assert network.calls == called and called[1] == called[2] == timesteps[1]
    assert [step.t for step in ours] == [*timesteps, stop]
    z, seen = START, [START]
    for i, t in enumerate(called):
        z = scheduler.step(Network()(z, torch.full((2,), t)), t, z).prev_sample
        if num_steps == 1 or i != 0:
            seen.append(z)
    for step, other in zip(ours, seen, strict=True):
        assert_same(step.z, other)


@pytest.mark.parametrize("end", ["clean", "interior", "interior, lower order", "interior, euler"])
@pytest.mark.parametrize("num_steps", [2, 10, 20])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_dpm_solver_steps_as_in_diffusers(
    prediction: str, num_steps: int, end: str, theirs: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    """DPM-Solver++, order 2, midpoint. They round to single precision in between, which is taken out here."""
    scheduler = theirs.DPMSolverMultistepScheduler(
        prediction_type=THEIR_PREDICTION[prediction], final_sigmas_type="zero" if end == "clean" else "sigma_min",
        lower_order_final=end == "interior, lower order", euler_at_final=end == "interior, euler",
    )  # fmt: skip
    timesteps = spaced_timesteps(1000, num_steps, "quadratic")
    scheduler.set_timesteps(timesteps=timesteps)
    levels = torch.cat([LEVELS[timesteps], torch.ones(1) if end == "clean" else LEVELS[:1]])
    single, scheduler.sigmas = scheduler.sigmas, ((1 - levels) / levels).sqrt()
    assert single.shape == scheduler.sigmas.shape
    double = SimpleNamespace(**vars(torch) | {"float32": torch.float64})
    monkeypatch.setattr("diffusers.schedulers.scheduling_dpmsolver_multistep.torch", double)
    # Their lower_order_final counts below 15 steps only.
    lower = end == "interior, euler" or (end == "interior, lower order" and num_steps < 15)
    stop = -1 if end == "clean" else 0
    ours = list(dpm_solver(Network(), START, LEVELS, timesteps, prediction, stop, lower))
    for step, following in pairwise(ours):
        z = scheduler.step(Network()(step.z, torch.full((2,), step.t)), step.t, step.z).prev_sample
        assert_same(following.z, z)
        assert_same(step.z0, scheduler.model_outputs[-1])
    assert ours[-1].t == stop and ours[-1].z0 is (ours[-1].z if stop < 0 else ours[-2].z0)


# what holds for any levels and any timesteps

SUBSETS = st.sets(st.integers(0, 999), min_size=2, max_size=12).map(lambda s: sorted(s, reverse=True))


@settings(max_examples=40, deadline=None)
@given(timesteps=SUBSETS, kind=st.sampled_from(["linear", "sqrt_linear", "cosine"]))
def test_ddim_at_eta_1_has_the_moments_of_ancestral_sampling(timesteps: list[int], kind: str):
    """Mean and variance of each step, from the β of the respaced schedule (equations 6 and 7 of Ho et al.)."""
    levels = Schedule(
        kind, 1000, *{"linear": (1e-4, 0.02), "cosine": (0.0, 0.999)}.get(kind, (0.00085, 0.012))
    )
    levels = levels.alphas_cumprod
    betas = dict(zip(timesteps, respaced_betas(levels, timesteps).flip(0), strict=True))

    def walk(noise: float) -> list:
        draw = lambda shape: torch.full((2, *shape), noise, dtype=torch.float64)  # noqa: E731
        return list(ddim(Network(), START, levels, timesteps, eta=1.0, draw=draw))

    still, moved = walk(0.0), walk(1.0)
    (t, z, z0), following = still[0], levels[timesteps[1]]
    beta, level = betas[t], levels[t]
    mean = following.sqrt() * beta / (1 - level) * z0 + (1 - beta).sqrt() * (1 - following) / (1 - level) * z
    torch.testing.assert_close(still[1].z, mean, rtol=1e-9, atol=1e-9)
    variance = (1 - following) / (1 - level) * beta
    torch.testing.assert_close(
        (moved[1].z - still[1].z).square(), variance.expand(z.shape), rtol=1e-7, atol=1e-12
    )
    for a, b in zip(
        ddim(Network(), START, levels, timesteps, eta=1.0, draw=Draws()),
        ddpm(Network(), START, levels, timesteps, draw=Draws()),
        strict=True,
    ):
        torch.testing.assert_close(a.z, b.z, rtol=1e-6, atol=1e-8)


@settings(max_examples=40, deadline=None)
@given(timesteps=SUBSETS, prediction=st.sampled_from(PREDICTIONS))
@pytest.mark.parametrize("sampler", [ddim, plms, dpm_solver])
def test_data_of_one_point_is_found_in_any_steps(sampler: Callable, timesteps: list[int], prediction: str):
    """The path is a straight line then, for which each solver is exact: to the clean end and to any level before."""
    point = GaussianMixture(normal(1, 3, 4, 4, seed=7), std=0.0)
    denoiser = point.denoiser(LEVELS, prediction)
    *_, end = sampler(denoiser, START, LEVELS, timesteps, prediction)
    torch.testing.assert_close(end.z, point.means.expand(2, -1, -1, -1), rtol=1e-7, atol=1e-7)
    first, stop = timesteps[0], timesteps[-1]
    *_, end = sampler(denoiser, START, LEVELS, timesteps[:-1], prediction, stop=stop)
    noise = (START - LEVELS[first].sqrt() * point.means) / (1 - LEVELS[first]).sqrt()
    exact = LEVELS[stop].sqrt() * point.means + (1 - LEVELS[stop]).sqrt() * noise
    torch.testing.assert_close(end.z, exact, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("sampler", [ddim, dpm_solver])
def test_a_schedule_that_begins_with_noise_alone(sampler: Callable):
    """ᾱ = 0 at the last timestep: with v or z_0 predicted it is a level like any other."""
    levels, point = (
        torch.cat([LEVELS, torch.zeros(1, dtype=torch.float64)]),
        normal(1, 3, 4, 4, seed=7).double(),
    )

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        signal, sigma = levels[t[0]].sqrt(), (1 - levels[t[0]]).sqrt()
        return signal * (z - signal * point) / sigma - sigma * point

    *_, end = sampler(velocity, START, levels, [1000, 700, 200], "v", stop=50)
    torch.testing.assert_close(end.z, LEVELS[50].sqrt() * point + (1 - LEVELS[50]).sqrt() * START)


@pytest.mark.parametrize("sampler", [ddim, ddpm, plms, dpm_solver])
def test_a_walk_that_does_not_fall_is_refused(sampler: Callable):
    draw = {"draw": Draws()} if sampler in (ddim, ddpm) else {}
    for timesteps, stop in (([499, 999], -1), ([999, 999], -1), ([999, 499], 499), ([999, 499], 700)):
        with pytest.raises(UserError, match=r"timesteps fall.*t = (499|999) leads from ᾱ = 0\."):
            next(sampler(Network(), START, LEVELS, timesteps, stop=stop, **draw))


# the order, on data for which the best denoiser is known: between λ = -2 and 2 the path is smooth

MIXTURE = GaussianMixture(
    torch.tensor([[-1.0, 0.5], [1.0, 0.0], [0.2, -1.0]]), 0.4, torch.tensor([0.3, 0.5, 0.2])
)
NOISE = normal(64, 2, seed=3).double()


def reference(start: Tensor, begin: float, end: float, steps: int = 800) -> Tensor:
    """Classical Runge-Kutta on the ODE of Song et al. 2021, equation 14: d(z/√ᾱ)/d(e^{-λ}) = ε."""

    def slope(y: Tensor, lam: float) -> Tensor:
        level = alpha_cumprod_at(torch.tensor(lam, dtype=torch.float64))
        return -math.exp(-lam) * MIXTURE.predict("eps", level.sqrt() * y, level)

    y, h = start / alpha_cumprod_at(torch.tensor(begin, dtype=torch.float64)).sqrt(), (end - begin) / steps
    for i in range(steps):
        lam = begin + i * h
        a = slope(y, lam)
        b = slope(y + h / 2 * a, lam + h / 2)
        c = slope(y + h / 2 * b, lam + h / 2)
        y = y + h / 6 * (a + 2 * b + 2 * c + slope(y + h * c, lam + h))
    return y * alpha_cumprod_at(torch.tensor(end, dtype=torch.float64)).sqrt()


def errors(
    sampler: Callable, prediction: str, steps: list[int], exact: Tensor, **options: bool
) -> list[float]:
    found = []
    for number in steps:
        lambdas = torch.linspace(2, -2, number + 1, dtype=torch.float64)
        levels = alpha_cumprod_at(lambdas)
        torch.testing.assert_close(half_log_snr(levels), lambdas)
        denoiser = MIXTURE.denoiser(levels, prediction)
        *_, end = sampler(denoiser, NOISE, levels, range(number, 0, -1), prediction, stop=0, **options)
        found.append((end.z - exact).square().mean().sqrt().item())
    return found


def slope_of(steps: list[int], found: list[float]) -> float:
    """The fitted order: error ~ steps ** -order."""
    x, y = torch.tensor(steps).double().log(), torch.tensor(found).double().log()
    x, y = x - x.mean(), y - y.mean()
    return -((x * y).sum() / (x * x).sum()).item()


@pytest.fixture(scope="module")
def exact() -> Tensor:
    fine, coarse = reference(NOISE, -2, 2, 400), reference(NOISE, -2, 2, 200)
    assert (fine - coarse).abs().max() < 1e-8  # what the samplers are measured against is known far better
    return fine


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_orders_of_the_samplers(prediction: str, exact: Tensor):
    steps = [40, 80, 160, 320]
    first = errors(ddim, prediction, steps, exact)
    second = errors(dpm_solver, prediction, steps, exact)
    assert slope_of(steps, first) == pytest.approx(1, abs=0.15), first
    assert slope_of(steps, second) == pytest.approx(2, abs=0.15), second
    assert second[0] < first[0] / 5
    # PLMS has weights of fourth order for equal steps in e^{-λ}; these are equal in λ, which leaves the second.
    assert slope_of(steps, errors(plms, prediction, steps, exact)) == pytest.approx(2, abs=0.15)


def test_a_first_order_end_keeps_the_order(exact: Tensor):
    """One step of local error h² among second-order ones: still h² in all. Only the last step differs."""
    steps = [40, 80, 160, 320]
    found = errors(dpm_solver, "eps", steps, exact, lower_order_final=True)
    assert slope_of(steps, found) == pytest.approx(2, abs=0.15), found
    common = (Network(), START, LEVELS, [999, 700, 300], "eps", 0)
    whole, lower = (list(dpm_solver(*common, lower_order_final=flag)) for flag in (False, True))
    assert all(torch.equal(a.z, b.z) for a, b in zip(whole[:-1], lower[:-1], strict=True))
    *_, first_order = ddim(Network(), lower[2].z, LEVELS, [300], stop=0)
    assert_same(lower[-1].z, first_order.z)
    assert (whole[-1].z - lower[-1].z).abs().max() > 0.01
