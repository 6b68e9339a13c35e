"""Solutions of notebook 07, samplers. Run this file, and the checks say whether they are right."""

import torch
from torch import Tensor

from ldm_edu.exercises.diffusion import check_ddim_step, check_eta, check_second_order_step


def ddim_step(z: Tensor, epsilon: Tensor, now: Tensor, following: Tensor) -> Tensor:
    """From z_t at ᾱ = now, with the predicted noise, to z_s at ᾱ = following.

    First the clean latent that the noise means, with the level *now*. Then both are put together again in the shares
    of the level that *follows*.
    """
    z0 = (z - (1 - now).sqrt() * epsilon) / now.sqrt()
    return following.sqrt() * z0 + (1 - following).sqrt() * epsilon


def sigma_of(eta: Tensor, now: Tensor, following: Tensor) -> Tensor:
    """σ, the standard deviation of the fresh noise in a step from ᾱ = now to ᾱ = following.

    β is the noise between the two levels. The posterior's variance β̃ is β times the ratio of the noise that is left
    after the step to the noise before. Variances want a root, and η stands outside of it.
    """
    beta = 1 - now / following
    posterior = (1 - following) / (1 - now) * beta
    return eta * posterior.sqrt()


def second_order_step(
    z: Tensor, z0: Tensor, z0_before: Tensor, before: Tensor, now: Tensor, following: Tensor
) -> Tensor:
    """From z at ᾱ = now to ᾱ = following; z0 was predicted now, z0_before a step ago, at ᾱ = before.

    z0 went from z0_before to z0 in h_before. In the middle of the coming step, after h / 2, it will have gone on by
    h / (2 h_before) of that.
    """
    lambda_before, lambda_now, lambda_following = (
        0.5 * torch.log(level / (1 - level)) for level in (before, now, following)
    )
    h_before, h = lambda_now - lambda_before, lambda_following - lambda_now
    middle = z0 + h / (2 * h_before) * (z0 - z0_before)
    kept = ((1 - following) / (1 - now)).sqrt()
    return kept * z + following.sqrt() * (1 - torch.exp(-h)) * middle


if __name__ == "__main__":
    check_ddim_step(ddim_step)
    check_eta(sigma_of)
    check_second_order_step(second_order_step)
