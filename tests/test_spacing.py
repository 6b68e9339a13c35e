"""Fewer steps: the spacings, against diffusers' and the released codes', and the schedule that a subset makes."""

from itertools import pairwise
from types import ModuleType

import numpy as np
import pytest
import torch
from denoisers import Draws, Network, normal
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_edu.diffusion import SPACINGS, Schedule, ddpm, respaced_betas, spaced_timesteps
from ldm_edu.runtime import UserError


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    """diffusers' schedulers."""
    return pytest.importorskip("diffusers.schedulers", reason="compares with diffusers, of the extra [test]")


def test_spaced_timesteps(theirs: ModuleType):
    assert spaced_timesteps(1000, 4) == [999, 749, 499, 249] and spaced_timesteps(1000, 1) == [999]
    scheduler = theirs.DDIMScheduler(timestep_spacing="trailing")
    for number in (1, 2, 3, 7, 10, 25, 30, 50, 64, 250, 333, 999, 1000):
        scheduler.set_timesteps(number)
        assert spaced_timesteps(1000, number) == scheduler.timesteps.tolist(), number
    for number in (0, -1, 1001):
        with pytest.raises(UserError, match=f"between 1 and 1000; it is {number}"):
            spaced_timesteps(1000, number)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), T=st.integers(1, 2000), spacing=st.sampled_from(SPACINGS))
def test_spaced_timesteps_fall_within_the_schedule(data: st.DataObject, T: int, spacing: str):
    number = data.draw(st.integers(1, T))
    steps = spaced_timesteps(T, number, spacing)
    assert len(steps) == number and steps[0] < T and steps[-1] >= 0
    assert all(a > b for a, b in pairwise(steps))
    assert spacing != "trailing" or steps[0] == T - 1
    assert number < T or steps == list(reversed(range(T)))


@pytest.mark.parametrize("number", [1, 2, 5, 8, 10, 20, 25, 50, 100, 250, 500])
def test_uniform_is_the_released_codes(number: int, theirs: ModuleType):
    """And diffusers' "leading" with an offset of 1, as Stable Diffusion's own configuration has it."""
    released = np.asarray(list(range(0, 1000, 1000 // number))) + 1
    assert spaced_timesteps(1000, number, "uniform") == released[::-1].tolist()
    scheduler = theirs.DDIMScheduler(timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(number)
    assert spaced_timesteps(1000, number, "uniform") == scheduler.timesteps.tolist()


def test_uniform_where_the_steps_do_not_fit(theirs: ModuleType):
    """The released code makes 31 steps of 30; diffusers 30. At T = 1000 steps its last is outside."""
    released = (np.asarray(range(0, 1000, 1000 // 30)) + 1).tolist()
    assert len(released) == 31 and spaced_timesteps(1000, 30, "uniform") == released[29::-1]
    assert max(range(0, 1000, 1)) + 1 == 1000 and spaced_timesteps(1000, 1000, "uniform")[0] == 999


def test_quadratic_is_the_released_codes_while_its_timesteps_differ():
    agreed = []
    for number in range(1, 201):
        released = ((np.linspace(0, np.sqrt(1000 * 0.8), number) ** 2).astype(int) + 1).tolist()
        ours = spaced_timesteps(1000, number, "quadratic")[::-1]
        if len(set(released)) == number:
            agreed.append(number)
            assert ours == released
        else:
            moved = [i for i, (a, b) in enumerate(zip(ours, released, strict=True)) if a != b]
            assert moved and max(moved) < number / 2, number  # only near the clean end
    assert agreed == list(range(1, 30))
    gaps = [a - b for a, b in pairwise(spaced_timesteps(1000, 20, "quadratic"))]
    assert gaps == sorted(gaps, reverse=True)


def test_an_unknown_spacing_is_named():
    with pytest.raises(UserError, match="'linspace'; there are trailing, uniform, quadratic"):
        spaced_timesteps(1000, 10, "linspace")


@pytest.mark.parametrize("timesteps", [[-1, 3], [3, 1000], [3, 3], []])
def test_respacing_takes_different_timesteps_of_the_schedule(timesteps: list[int]):
    with pytest.raises(UserError, match="different integers between 0 and 999"):
        respaced_betas(Schedule().alphas_cumprod, timesteps)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_a_subset_is_all_of_the_respaced_schedule(
    variance: str, spacing: str, theirs: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    """Our ancestral sampling on a subset, and diffusers' on every step of the schedule with the respaced β."""
    levels, timesteps = Schedule().alphas_cumprod, spaced_timesteps(1000, 12, spacing)
    betas = respaced_betas(levels, timesteps)
    torch.testing.assert_close(torch.cumprod(1 - betas, 0), levels[timesteps[::-1]])
    scheduler = theirs.DDPMScheduler(
        12, trained_betas=betas.numpy(), clip_sample=False,
        variance_type={"posterior": "fixed_small", "beta": "fixed_large"}[variance],
    )  # fmt: skip
    assert scheduler.alphas_cumprod.dtype == torch.float32  # theirs is rounded; give it the product as it is
    scheduler.alphas_cumprod = torch.cumprod(1 - betas, 0)
    scheduler.set_timesteps(12)
    draws, start = Draws(), normal(2, 3, 4, 4).double()
    ours = list(ddpm(Network(), start, levels, timesteps, variance=variance, draw=draws))
    z = start
    for i, t in enumerate(timesteps):
        fresh = draws.drawn[min(i, len(draws.drawn) - 1)].double()
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, fresh=fresh, **__: fresh
        )
        z = scheduler.step(Network()(z, torch.full((2,), t)), 11 - i, z).prev_sample
        torch.testing.assert_close(ours[i + 1].z, z, rtol=1e-9, atol=1e-9)
