"""Solutions of notebook 02, KL or VQ. Run this file, and the checks say whether they are right."""

import torch
from torch import Tensor

from ldm_edu.exercises.regularisers import check_gaussian_kl, check_straight_through, check_vq_loss


def gaussian_kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, σ²) ‖ N(0, I)) of latents `(B, c, h, w)`, in nats, one number for each picture: `(B,)`.

    The price of one number is ½ (μ² + σ² - 1 - log σ²). With log σ² given, σ² is its exponential, and the logarithm is
    there already. The numbers are independent, so a picture's KL is the sum over all of them, and not their mean.
    """
    each = 0.5 * (mean**2 + logvar.exp() - 1 - logvar)
    return each.sum(dim=(1, 2, 3))


def straight_through(latent: Tensor, codebook: Tensor) -> Tensor:
    """The nearest vectors of the codebook `(n, c)` for latents `(B, c, h, w)`, with the latent's gradient.

    A vector is what lies at one place, so the channels go last before distances are taken, and back afterwards. The
    detached difference brings the value; the gradient sees only the latent in front of it.
    """
    codes = torch.cdist(latent.movedim(1, -1), codebook).argmin(dim=-1)
    nearest = codebook[codes].movedim(-1, 1)
    return latent + (nearest - latent).detach()


def vq_loss(latent: Tensor, quantized: Tensor, commitment_weight: float) -> Tensor:
    """Both terms of the VQ loss, each a mean: the codebook moves to the latent, the latent a little to the codebook.

    In each term the side that stays is detached; β stands in front of the term that moves the encoder.
    """
    to_codebook = (latent.detach() - quantized).square().mean()
    to_encoder = (latent - quantized.detach()).square().mean()
    return to_codebook + commitment_weight * to_encoder


if __name__ == "__main__":
    check_gaussian_kl(gaussian_kl)
    check_straight_through(straight_through)
    check_vq_loss(vq_loss)
