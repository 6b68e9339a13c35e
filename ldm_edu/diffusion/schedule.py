"""The noise schedule: how much of the latent is left at each timestep (section 3.2, appendix B)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm_edu.runtime import UserError, refuse_bytes


def linear(T: int, start: float, end: float) -> Tensor:
    """β linear in t (DDPM)."""
    return torch.linspace(start, end, T, dtype=torch.float64)


def sqrt_linear(T: int, start: float, end: float) -> Tensor:
    """√β linear in t: what the released code of latent diffusion calls "linear", and diffusers "scaled_linear"."""
    return torch.linspace(start**0.5, end**0.5, T, dtype=torch.float64) ** 2


def cosine(T: int, start: float, end: float) -> Tensor:
    """ᾱ a squared cosine (Nichol and Dhariwal 2021, equation 17), each β at most `end`; `start` is not used."""
    level = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - level[1:] / level[:-1]).clamp(max=end)


SCHEDULES = {"linear": linear, "sqrt_linear": sqrt_linear, "cosine": cosine}
# Each one's own first and last β: of DDPM; of the paper's text-to-image model; of Nichol and Dhariwal.
RANGES = {"linear": (1e-4, 0.02), "sqrt_linear": (0.00085, 0.012), "cosine": (0.0, 0.999)}


class Schedule:
    """β_t, and ᾱ_t = Π (1 - β_s) up to t, for t = 0 .. T-1: t = 0 is the cleanest (the paper's t = 1).

    Computed in double precision, on the CPU. `alphas_cumprod` (T,) falls as t rises.

    Args:
        kind: "linear", "sqrt_linear" (the paper's models) or "cosine".
        T: number of timesteps.
        start, end: the first and the last β ("cosine": the largest β); by default those of who introduced the kind.

    Raises:
        UserError: an unknown kind, or values that are no schedule.
    """

    def __init__(
        self, kind: str = "sqrt_linear", T: int = 1000, start: float | None = None, end: float | None = None
    ) -> None:
        if kind not in SCHEDULES:
            raise UserError(f"There is no schedule {kind!r}; there are {', '.join(SCHEDULES)}.")
        start = RANGES[kind][0] if start is None else start
        end = RANGES[kind][1] if end is None else end
        if T < 1 or not 0 <= start <= end < 1 or (start == 0 and kind != "cosine") or end == 0:
            raise UserError(
                f"A schedule needs T ≥ 1 and 0 < start ≤ end < 1, not T={T}, start={start}, end={end}."
            )
        self.kind, self.T, self.start, self.end = kind, T, start, end
        self.betas = SCHEDULES[kind](T, start, end)
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)

    def config(self) -> dict[str, str | int | float]:
        """The arguments that make this schedule again."""
        return {"kind": self.kind, "T": self.T, "start": self.start, "end": self.end}

    def add_noise(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """A sample of q(z_t | z_0) = N(√ᾱ_t z_0, (1 - ᾱ_t) I), from its noise; `t` (B,) integers.

        Raises:
            UserError: noise that is not of z_0's shape, a z_0 of integers, and the errors of `at`.
        """
        refuse_bytes(z0)
        if noise.shape != z0.shape:
            raise UserError(f"Give noise of z_0's shape, {tuple(z0.shape)}, not {tuple(noise.shape)}.")
        signal = self.at(t, z0)
        return (signal.sqrt() * z0 + (1 - signal).sqrt() * noise).to(z0.dtype)

    def at(self, t: Tensor, like: Tensor) -> Tensor:
        """ᾱ_t for each picture of a batch, shaped to multiply `like`; at least in single precision.

        Raises:
            UserError: anything but a tensor of integers from 0 to T-1. (A step's t = -1, the clean latent, is none.)
        """
        if not isinstance(t, Tensor) or t.is_floating_point():
            kind = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise UserError(f"Timesteps are a tensor of integers from 0 to {self.T - 1}, not of type {kind}.")
        t = t.cpu()
        self.check(t)
        level = self.alphas_cumprod[t].to(torch.promote_types(like.dtype, torch.float32)).to(like.device)
        return level.view(-1, *[1] * (like.ndim - 1))

    def check(self, t: Tensor) -> None:
        """Refuse timesteps outside 0 .. T-1."""
        if ((t < 0) | (t >= self.T)).any():
            raise UserError(f"Timesteps are integers from 0 to {self.T - 1}; these go from {t.min()} to {t.max()}.")
