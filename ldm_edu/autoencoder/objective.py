"""The first stage's objective (appendix G of the paper): reconstruction and a slight KL penalty.

The paper's reconstruction term is L1 + perceptual. Here L2 can stand in for the perceptual part: squaring makes the few
pixels of a sharp edge count for more than a faint texture everywhere.

Convention: everything is a mean over the picture's C·H·W numbers. The released code sums over them instead, which
scales both terms alike; what goes wrong is to average one and to sum the other.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm_edu.autoencoder.kl import AutoencoderKL


class FirstStageObjective(nn.Module):
    """L1 + `l2_weight` · L2 + `kl_weight` · KL, as a module: batch to loss.

    Args:
        l2_weight: weight of the squared error.
        kl_weight: 1e-6 in the paper; with the mean convention above the same number means the same thing.
    """

    def __init__(self, model: AutoencoderKL, kl_weight: float = 1e-6, l2_weight: float = 0.0) -> None:
        super().__init__()
        self.model, self.kl_weight, self.l2_weight = model, kl_weight, l2_weight

    def forward(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Pictures `(B, 3, H, W)` in [-1, 1] to the loss and the readings worth watching."""
        posterior = self.model.posterior(images)
        reconstruction = self.model.decode(posterior.sample(generator)).float()
        error = reconstruction - images
        l1, l2 = error.abs().mean(), error.square().mean()
        kl = posterior.kl().mean() / images[0].numel()
        mse = (reconstruction.detach().clamp(-1, 1) - images).square().mean()
        readings = {
            "l1": l1.detach(),
            "kl": kl.detach(),
            "psnr": 10 * torch.log10(4 / mse),
            "latent_std": posterior.mean.detach().std(),
        }
        return l1 + self.l2_weight * l2 + self.kl_weight * kl, readings
