"""Samplers: from noise to a latent, step by step.

Each is a generator of `Step`s. The progress bar, the timestep slider and the tests all read the same stream.
A sampler takes any denoiser `(z, t) -> prediction`; conditions and guidance are bound around the network before.

What all of them take:
    denoiser: called with `z` and the timestep `t` (B,), an index into `alphas_cumprod`.
    noise: `(B, c, h, w)`, the start.
    alphas_cumprod: `(T,)`, the schedule's, or any other tensor that falls as the index rises. So a schedule in
        continuous time is one too: give the levels that the steps are to visit, and index them.
    timesteps: falling indices into it, at least one, where the denoiser is called.
    prediction: what the denoiser answers, "eps", "x0" or "v".
    stop: the index of the level where the last step ends; -1, as everywhere, is the clean latent.
All raise UserError for timesteps that are no indices or do not fall, for an answer that is not of z's shape, and for a
first ᾱ of 0 (no signal at all), which suits "x0" and "v" but neither "eps" nor PLMS. Where latents are in half
precision, the denoiser sees them so and the steps hold them so; in between, from step to step, it is single.
"""

from __future__ import annotations

import math
import operator
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ldm_edu.diffusion.parametrisation import split_prediction
from ldm_edu.runtime import UserError

Denoiser = Callable[[Tensor, Tensor], Tensor]
Draw = Callable[[Sequence[int]], Tensor]


class Step(NamedTuple):
    """One step of a sampler: `z` at the noise level of timestep `t`, and `z0`, the clean latent predicted from it.

    The first step holds the noise; the last has t = -1 and z = z0. A sampler that stops before, at t = `stop`,
    repeats its last prediction there.
    """

    t: int
    z: Tensor
    z0: Tensor


def _in_single(sampler: Callable[..., Iterator[Step]]) -> Callable[..., Iterator[Step]]:
    """The sampler for latents in half precision, too: rounded between steps, many small ones would be lost."""

    @wraps(sampler)
    def run(denoiser: Denoiser, noise: Tensor, *args: object, **arguments: object) -> Iterator[Step]:
        exact = torch.promote_types(noise.dtype, torch.float32)
        steps = sampler(lambda z, t: denoiser(z.to(noise.dtype), t), noise.to(exact), *args, **arguments)
        return (Step(t, z.to(noise.dtype), z0.to(noise.dtype)) for t, z, z0 in steps)

    return run


@_in_single
def ddim(
    denoiser: Denoiser,
    noise: Tensor,
    alphas_cumprod: Tensor,
    timesteps: Sequence[int],
    prediction: str = "eps",
    eta: float = 0.0,
    draw: Draw | None = None,
    stop: int = -1,
) -> Iterator[Step]:
    """DDIM (Song et al. 2021, equation 12): deterministic at eta = 0, ancestral sampling at eta = 1.

    Args:
        eta: from 0 to 1.
        draw: gives fresh noise for a batch, `(c, h, w) -> (B, c, h, w)`; needed where eta > 0.
    """
    if not 0 <= eta <= 1:
        raise UserError(f"eta lies between 0 (deterministic) and 1 (ancestral); it is {eta}.")
    if eta > 0 and not callable(draw):
        raise UserError(f"With eta = {eta} each step adds noise: say where it comes from (draw=...).")
    z = z0 = noise
    for t, now, following in _levels(alphas_cumprod, timesteps, stop, prediction):
        z0, epsilon = clean_and_noise(denoiser, z, t, now, prediction)
        yield Step(t, z, z0)
        # Equation 16 of Song et al.: eta = 1 gives the posterior's own standard deviation.
        sigma = eta * ((1 - following) / (1 - now) * (1 - now / following)) ** 0.5
        z = following**0.5 * z0 + max(1 - following - sigma**2, 0.0) ** 0.5 * epsilon
        if sigma > 0:
            z = z + sigma * fresh_noise(draw, z)
    yield Step(stop, z, z if stop < 0 else z0)


@_in_single
def ddpm(
    denoiser: Denoiser,
    noise: Tensor,
    alphas_cumprod: Tensor,
    timesteps: Sequence[int],
    prediction: str = "eps",
    variance: str = "posterior",
    draw: Draw | None = None,
    stop: int = -1,
) -> Iterator[Step]:
    """Ancestral sampling (Ho et al. 2020, algorithm 2 and equation 7), on all timesteps or any subset of them.

    Args:
        variance: "posterior" for β̃_t, "beta" for β_t, the two choices of Ho et al. (section 3.2).
        draw: as in `ddim`.
    """
    if not callable(draw):
        raise UserError("Ancestral sampling adds noise at each step: say where it comes from (draw=...).")
    if variance not in ("posterior", "beta"):
        raise UserError(f"The variance is 'posterior' or 'beta', not {variance!r}.")
    z = z0 = noise
    for t, now, following in _levels(alphas_cumprod, timesteps, stop, prediction):
        z0, _ = clean_and_noise(denoiser, z, t, now, prediction)
        yield Step(t, z, z0)
        alpha = now / following
        beta = 1 - alpha
        # The mean of q(z_following | z_t, z_0), equation 7 of Ho et al.
        z = following**0.5 * beta / (1 - now) * z0 + alpha**0.5 * (1 - following) / (1 - now) * z
        sigma2 = beta * (1 - following) / (1 - now) if variance == "posterior" else beta
        if following < 1 and sigma2 > 0:
            z = z + sigma2**0.5 * fresh_noise(draw, z)
    yield Step(stop, z, z if stop < 0 else z0)


# The weights of the latest slopes, newest first, in the linear multistep methods of order 1 to 4.
ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@_in_single
def plms(
    denoiser: Denoiser,
    noise: Tensor,
    alphas_cumprod: Tensor,
    timesteps: Sequence[int],
    prediction: str = "eps",
    stop: int = -1,
) -> Iterator[Step]:
    """PLMS, the pseudo linear multi-step method (Liu et al. 2022, "Pseudo numerical methods for diffusion models on
    manifolds", section 3): DDIM's step, their transfer part, along Adams and Bashforth's mix of the last noises.

    The first step follows the released code of latent diffusion, not the paper's Runge-Kutta steps: it goes there,
    asks again, and starts over along the mean of both answers. So the second timestep is asked twice. The noises
    are mixed whatever the network predicts.

    It wants small steps: a mix of four noises overshoots and swings where a step takes more than 2 / (1 + 20 κ / 3)
    of the noise left, with κ = 1 without guidance and up to about 3 at guidance 3 (notebook 07, section 7). On
    `shapes-text`, at guidance 3, 8 steps drew next to nothing that was asked for, 25 were as good as DDIM's.
    """
    z = z0 = noise
    past: deque[Tensor] = deque(maxlen=4)
    levels = _levels(alphas_cumprod, timesteps, stop, "eps")
    for (t, now, following), upcoming in zip(levels, [*(t for t, *_ in levels[1:]), stop]):
        z0, epsilon = clean_and_noise(denoiser, z, t, now, prediction)
        yield Step(t, z, z0)
        past.appendleft(epsilon)
        if len(past) == 1 and upcoming >= 0:
            there = _along(epsilon, z, now, following)
            epsilon = (epsilon + clean_and_noise(denoiser, there, upcoming, following, prediction)[1]) / 2
        else:
            epsilon = sum(w * e for w, e in zip(ADAMS_BASHFORTH[len(past)], past))
        z = _along(epsilon, z, now, following)
    yield Step(stop, z, z if stop < 0 else z0)


@_in_single
def dpm_solver(
    denoiser: Denoiser,
    noise: Tensor,
    alphas_cumprod: Tensor,
    timesteps: Sequence[int],
    prediction: str = "eps",
    stop: int = -1,
    lower_order_final: bool = False,
) -> Iterator[Step]:
    """DPM-Solver++(2M) (Lu et al. 2022, "DPM-Solver++", algorithm 2): second order in λ = ½ log SNR, one call a step.

    The first step is of first order (DDIM's), and so is one that ends at the clean latent: λ is infinite there,
    and no finite past can be extended to it.

    Args:
        lower_order_final: the last step is of first order at any level; steadier with few steps.
    """
    z = z0 = noise
    before, width_before = None, 0.0
    levels = _levels(alphas_cumprod, timesteps, stop, prediction)
    for i, (t, now, following) in enumerate(levels, start=1):
        z0, _ = clean_and_noise(denoiser, z, t, now, prediction)
        yield Step(t, z, z0)
        # e^{-h}, where h is the step's width in λ: 0 where the step leads to the clean latent
        decay = (now / following * (1 - following) / (1 - now)) ** 0.5
        width = -math.log(decay) if decay > 0 else math.inf
        direction = z0
        if before is not None and width < math.inf and not (lower_order_final and i == len(levels)):
            direction = z0 + (z0 - before) * width / (2 * width_before)
        z = ((1 - following) / (1 - now)) ** 0.5 * z + following**0.5 * (1 - decay) * direction
        before, width_before = z0, width
    yield Step(stop, z, z if stop < 0 else z0)


def fresh_noise(draw: Draw, z: Tensor) -> Tensor:
    """Noise of the shape of `z`, from a `draw` that is checked to give as much."""
    noise = draw(z.shape[1:])
    if noise.shape != z.shape:
        raise UserError(f"draw must give noise for the whole batch, {tuple(z.shape)}; it gave {tuple(noise.shape)}.")
    return noise.to(z)


def clean_and_noise(
    denoiser: Denoiser, z: Tensor, t: int, level: float, prediction: str
) -> tuple[Tensor, Tensor]:
    """Ask the denoiser: the clean latent and the noise that it sees in z, whose ᾱ is `level`."""
    output = denoiser(z, torch.full((len(z),), t, device=z.device))
    if output.shape != z.shape:
        raise UserError(
            f"The denoiser must answer in the shape of z, {tuple(z.shape)}; its answer is {tuple(output.shape)}."
        )
    exact = torch.promote_types(z.dtype, torch.float32)  # half precision would round an ᾱ of nearly 1 to 1
    z0, noise = split_prediction(prediction, output.to(exact), z.to(exact), torch.tensor(level, dtype=exact))
    return z0.to(z.dtype), noise.to(z.dtype)


def _levels(
    alphas_cumprod: Tensor, timesteps: Sequence[int], stop: int, prediction: str
) -> list[tuple[int, float, float]]:
    """Each timestep with its ᾱ, and the ᾱ that its step leads to; the last step leads to `stop`'s, or to 1."""
    if not isinstance(alphas_cumprod, Tensor):
        raise UserError(f"alphas_cumprod is a tensor (T,), a schedule's .alphas_cumprod; this is {alphas_cumprod!r}.")
    try:
        timesteps, stop = [operator.index(t) for t in timesteps], operator.index(stop)
    except TypeError as error:
        raise UserError(f"Timesteps and stop are integers, indices into alphas_cumprod, but {error}.") from error
    last = len(alphas_cumprod) - 1
    if not timesteps or not 0 <= min(timesteps) <= max(timesteps) <= last or not -1 <= stop <= last:
        raise UserError(
            f"There must be at least one timestep, all between 0 and {last}, and stop between -1 and {last}; "
            f"the timesteps are {timesteps}, stop is {stop}."
        )
    levels = alphas_cumprod[timesteps].tolist()
    levels.append(1.0 if stop < 0 else alphas_cumprod[stop].item())
    for t, (now, following) in zip(timesteps, pairwise(levels)):
        if not 0 <= now < following <= 1:
            raise UserError(
                f"A sampler goes from noise to the clean latent: timesteps fall, and ᾱ rises with each step. "
                f"The step from t = {t} leads from ᾱ = {now:.6g} to {following:.6g}."
            )
    if levels[0] == 0 and prediction == "eps":
        raise UserError(
            f"At t = {timesteps[0]} there is no signal (ᾱ = 0), and the noise alone does not lead to a clean latent. "
            "Take a model of x0 or v, and ddim, ddpm or dpm_solver."
        )
    return list(zip(timesteps, levels, levels[1:]))


def _along(epsilon: Tensor, z: Tensor, now: float, following: float) -> Tensor:
    """From one level to the next along a noise: DDIM's step at eta = 0."""
    return following**0.5 * (z - (1 - now) ** 0.5 * epsilon) / now**0.5 + (1 - following) ** 0.5 * epsilon
