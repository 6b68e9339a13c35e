"""Solutions of notebook 06, latent diffusion. Run this file, and the checks say whether they are right."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_edu.exercises.latents import (
    check_condition_dropout,
    check_latent_scale,
    check_to_image,
    check_training_loss,
)


def latent_scale(latents: Tensor) -> Tensor:
    """The number that brings latents `(B, c, h, w)` to a standard deviation of 1.

    One number, from all pictures, channels and places together. How large a channel is compared with another one, and
    how pictures differ, is information; the scale must leave it alone.
    """
    return 1 / latents.std()


def to_image(decode: Callable[[Tensor], Tensor], z: Tensor, scale: float) -> Tensor:
    """The pictures of scaled latents: on the way in they were multiplied, so divide, and then decode.

    The decoder is not linear. To divide its picture instead is no way back.
    """
    return decode(z / scale)


def drop_conditions(tokens: Tensor, empty: Tensor, p: float, generator: torch.Generator) -> Tensor:
    """Tokens `(B, M)`, each caption replaced as a whole by the empty one `(1, M)` with chance p.

    One coin for each caption, `(B, 1)`: broadcast over its tokens, they all go or all stay.
    """
    dropped = torch.rand(len(tokens), 1, generator=generator) < p
    return torch.where(dropped, empty, tokens)


def training_loss(
    denoiser: Callable[[Tensor, Tensor], Tensor], z0: Tensor, noise: Tensor, t: Tensor, alphas_cumprod: Tensor
) -> Tensor:
    """Equation 2, as a mean over all numbers: mix, ask for the noise, compare. Latents `(B, c, h, w)`, `t` `(B,)`.

    Signal and noise add up in variance, so it is their roots that are mixed; and each latent has its own level.
    """
    level = alphas_cumprod[t].view(-1, 1, 1, 1)
    z_t = level.sqrt() * z0 + (1 - level).sqrt() * noise
    return F.mse_loss(denoiser(z_t, t), noise)


if __name__ == "__main__":
    check_latent_scale(latent_scale)
    check_to_image(to_image)
    check_condition_dropout(drop_conditions)
    check_training_loss(training_loss)
