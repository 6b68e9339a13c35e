"""Samplers: from noise to a latent, step by step.

Each is a generator of `Step`s. The progress bar, the timestep slider and the tests all read the same stream.
A sampler takes any denoiser `(z, t) -> prediction`; conditions and guidance are bound around the network before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ldm_edu.diffusion.parametrisation import split_prediction
from ldm_edu.runtime import UserError

Denoiser = Callable[[Tensor, Tensor], Tensor]
Draw = Callable[[Sequence[int]], Tensor]


class Step(NamedTuple):
    """One step of a sampler: `z` at the noise level of timestep `t`, and `z0`, the clean latent predicted from it.

    The first step holds the noise; the last has t = -1 and z = z0.
    """

    t: int
    z: Tensor
    z0: Tensor


def spaced_timesteps(T: int, num_steps: int) -> list[int]:
    """`num_steps` timesteps, evenly spaced from T-1 down ("trailing" spacing: the first is always the noisiest).

    Raises:
        UserError: a number of steps outside 1 .. T.
    """
    if not 1 <= num_steps <= T:
        raise UserError(f"The number of steps lies between 1 and {T}; it is {num_steps}.")
    return [round(T * (1 - i / num_steps)) - 1 for i in range(num_steps)]


def ddim(
    denoiser: Denoiser,
    noise: Tensor,
    alphas_cumprod: Tensor,
    timesteps: Sequence[int],
    prediction: str = "eps",
    eta: float = 0.0,
    draw: Draw | None = None,
) -> Iterator[Step]:
    """DDIM (Song et al. 2021, equation 12): deterministic at eta = 0, ancestral sampling at eta = 1.

    Args:
        noise: `(B, c, h, w)`, the start.
        alphas_cumprod: `(T,)` of the schedule, or of any other falling sequence.
        timesteps: falling indices into it, where the denoiser is called.
        draw: gives fresh noise for a batch, `(c, h, w) -> (B, c, h, w)`; needed where eta > 0.
    """
    if eta > 0 and draw is None:
        raise UserError(f"With eta = {eta} each step adds noise: say where it comes from (draw=...).")
    z = noise
    for t, now, following in _levels(alphas_cumprod, timesteps):
        z0, epsilon = _predict(denoiser, z, t, now, prediction)
        yield Step(t, z, z0)
        # Equation 16 of Song et al.: eta = 1 gives the posterior's own standard deviation.
        sigma = eta * ((1 - following) / (1 - now) * (1 - now / following)) ** 0.5
        z = following**0.5 * z0 + max(1 - following - sigma**2, 0.0) ** 0.5 * epsilon
        if sigma > 0:
            z = z + sigma * draw(z.shape[1:]).to(z)
    yield Step(-1, z, z)


def ddpm(
    denoiser: Denoiser,
    noise: Tensor,
    alphas_cumprod: Tensor,
    timesteps: Sequence[int],
    prediction: str = "eps",
    variance: str = "posterior",
    draw: Draw | None = None,
) -> Iterator[Step]:
    """Ancestral sampling (Ho et al. 2020, algorithm 2 and equation 7), on all timesteps or any subset of them.

    Args:
        variance: "posterior" for β̃_t, "beta" for β_t, the two choices of Ho et al. (section 3.2).
        Others as in `ddim`.
    """
    if draw is None:
        raise UserError("Ancestral sampling adds noise at each step: say where it comes from (draw=...).")
    if variance not in ("posterior", "beta"):
        raise UserError(f"The variance is 'posterior' or 'beta', not {variance!r}.")
    z = noise
    for t, now, following in _levels(alphas_cumprod, timesteps):
        z0, _ = _predict(denoiser, z, t, now, prediction)
        yield Step(t, z, z0)
        alpha = now / following
        beta = 1 - alpha
        # The mean of q(z_following | z_t, z_0), equation 7 of Ho et al.
        z = following**0.5 * beta / (1 - now) * z0 + alpha**0.5 * (1 - following) / (1 - now) * z
        sigma2 = beta * (1 - following) / (1 - now) if variance == "posterior" else beta
        if following < 1 and sigma2 > 0:
            z = z + sigma2**0.5 * draw(z.shape[1:]).to(z)
    yield Step(-1, z, z)


def _levels(alphas_cumprod: Tensor, timesteps: Sequence[int]) -> Iterator[tuple[int, float, float]]:
    """Each timestep with its ᾱ, and the ᾱ that its step leads to; the last step leads to 1, no noise."""
    levels = [*alphas_cumprod[list(timesteps)].tolist(), 1.0]
    return zip(timesteps, levels, levels[1:])


def _predict(denoiser: Denoiser, z: Tensor, t: int, level: float, prediction: str) -> tuple[Tensor, Tensor]:
    """Ask the denoiser: the clean latent and the noise that it sees in z, whose ᾱ is `level`."""
    output = denoiser(z, torch.full((len(z),), t, device=z.device))
    return split_prediction(prediction, output, z, torch.tensor(level, dtype=z.dtype, device=z.device))
