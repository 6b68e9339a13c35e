"""Solutions of notebook 03, the DDPM objective. Run this file, and the checks say whether they are right."""

import torch
from torch import Tensor

from ldm_edu.exercises.diffusion import check_noising, check_posterior_variance, check_v


def noised(z0: Tensor, noise: Tensor, alphas_cumprod: Tensor, t: Tensor) -> Tensor:
    """z_t for latents `(B, c, h, w)`, their noise, ᾱ `(T,)` and a timestep for each `(B,)`.

    ᾱ is a share of the variance, so signal and noise get the roots. Each picture has its own timestep: indexing with
    `t` gives one ᾱ for each, and three more axes let it multiply a picture.
    """
    level = alphas_cumprod[t][:, None, None, None]
    return level.sqrt() * z0 + (1 - level).sqrt() * noise


def posterior_variance(betas: Tensor) -> Tensor:
    """β̃_t of q(z_{t-1} | z_t, z_0) for all timesteps: `(T,)` from β `(T,)`.

    The level before the first is that of the clean latent, ᾱ = 1. So the first value is 0: before t = 0 comes z_0,
    which is given.
    """
    now = torch.cumprod(1 - betas, dim=0)
    before = torch.cat([now.new_ones(1), now[:-1]])
    return (1 - before) / (1 - now) * betas


def velocity(epsilon: Tensor, z: Tensor, level: Tensor) -> Tensor:
    """v from the predicted noise at z = z_t, where ᾱ_t is `level`.

    v is made of ε and z_0, and z_0 follows from ε and z_t. (In one line: (ε - √(1-ᾱ) z_t) / √ᾱ.)
    """
    signal, sigma = level.sqrt(), (1 - level).sqrt()
    z0 = (z - sigma * epsilon) / signal
    return signal * epsilon - sigma * z0


if __name__ == "__main__":
    check_noising(noised)
    check_posterior_variance(posterior_variance)
    check_v(velocity)
