"""Fewer steps than the schedule has: which timesteps to visit, and the schedule that they make."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from ldm_edu.runtime import UserError

SPACINGS = ("trailing", "uniform", "quadratic")


def spaced_timesteps(T: int, num_steps: int, spacing: str = "trailing") -> list[int]:
    """`num_steps` falling timesteps out of 0 .. T-1.

    Args:
        spacing: "trailing", even, and the first is always the noisiest, T-1 (Lin et al. 2023, table 2);
            "uniform", even from 1 up by T // num_steps, as in the paper's released code. With few steps its first is
            well below T-1 (with one step it is t = 1), the more so where T is no multiple of num_steps: that code
            then adds steps, this one does not.
            "quadratic", dense where it is clean (Song et al. 2021, appendix D.2), up to 0.8 T as in both released
            codes. Where their timesteps coincide (from 30 of 1000 on) this one moves them apart.

    Raises:
        UserError: a number of steps outside 1 .. T, or an unknown spacing.
    """
    if not (isinstance(num_steps, Real) and 1 <= num_steps <= T and num_steps == int(num_steps)):
        raise UserError(f"The number of steps is a plain integer between 1 and {T}; it is {num_steps!r}.")
    num_steps = int(num_steps)
    if spacing == "trailing":
        return [round(T * (1 - i / num_steps)) - 1 for i in range(num_steps)]
    if spacing == "uniform":
        rising = list(range(0, T, T // num_steps))[:num_steps]
    elif spacing == "quadratic":
        rising = []
        for t in (np.linspace(0, np.sqrt(0.8 * T), num_steps) ** 2).astype(int).tolist():
            rising.append(max(t, rising[-1] + 1) if rising else t)
    else:
        raise UserError(f"There is no spacing {spacing!r}; there are {', '.join(SPACINGS)}.")
    # The released code begins at 1, not 0; with all T timesteps that would end outside.
    offset = 1 if rising[-1] + 1 < T else 0
    return [t + offset for t in reversed(rising)]


def respaced_betas(alphas_cumprod: Tensor, timesteps: Sequence[int]) -> Tensor:
    """The β of the schedule that visits these timesteps only (Nichol and Dhariwal 2021, section 4, equation 19).

    Ancestral sampling on a subset of timesteps is ancestral sampling on all steps of this schedule.

    Args:
        alphas_cumprod: `(T,)`, falling.
        timesteps: in any order.

    Returns:
        `(len(timesteps),)`, the cleanest first.

    Raises:
        UserError: timesteps outside 0 .. T-1, or twice the same. (A step's t = -1, the clean latent, is none.)
    """
    rising, last = sorted({int(t) for t in timesteps}), len(alphas_cumprod) - 1
    if len(rising) < max(len(timesteps), 1) or not 0 <= rising[0] <= rising[-1] <= last:
        raise UserError(f"Timesteps are different integers between 0 and {last}; these are {list(timesteps)}.")
    levels = alphas_cumprod[rising]
    return 1 - levels / torch.cat([levels.new_ones(1), levels[:-1]])
