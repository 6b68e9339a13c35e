"""Classifier-free guidance (Ho and Salimans 2022; section 4.3 of the paper)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm_edu.runtime import UserError


def guided(
    predict: Callable[[Tensor, Tensor, Tensor], Tensor], context: Tensor, null_context: Tensor, scale: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """A denoiser that answers e_u + s (e_c - e_u): away from the prediction without the condition.

    Both predictions are made in one batch. At scale 1 the second one is not needed, and not made.

    Args:
        predict: the network, `(z, t, context) -> prediction`. One that `shares` (`ldm_edu.unet.fast.Denoiser`) is given
            each latent once, with both contexts, (2, B, M, d).
        context, null_context: both `(B, M, d)`, with the condition and without. (Or with another one to go away from:
            a *negative prompt*.)
        scale: s; 1 is no guidance.

    Raises:
        UserError: contexts of two shapes.
    """
    if scale == 1:
        return lambda z, t: predict(z, t, context)
    if context.shape != null_context.shape:
        raise UserError(
            f"Guidance takes two contexts of one shape; with the condition it is {tuple(context.shape)}, without it "
            f"{tuple(null_context.shape)}. Fill captions up to one length."
        )
    shares = getattr(predict, "shares", False)
    both = (torch.stack if shares else torch.cat)([null_context, context])

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        once = (z, t) if shares else (torch.cat([z, z]), torch.cat([t, t]))
        without, with_condition = predict(*once, both).chunk(2)
        return without + scale * (with_condition - without)

    return denoise
