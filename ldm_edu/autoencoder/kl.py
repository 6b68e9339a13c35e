"""The first stage with a slight KL penalty towards a standard normal latent (section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm_edu.autoencoder.config import AutoencoderConfig
from ldm_edu.autoencoder.first_stage import FirstStage, spread
from ldm_edu.autoencoder.gaussian import DiagonalGaussian


class AutoencoderKL(FirstStage):
    """Encoder, diagonal Gaussian, decoder."""

    kind = "autoencoder-kl"

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__(config, encoder_channels=2 * config.latent_channels)

    def start_with_small_variance(self) -> None:
        """Begin training at a small posterior variance: from unit variance a short training never gets anywhere."""
        c = self.config.latent_channels
        with torch.no_grad():
            self.quant_conv.weight[c:] *= 0.1
            self.quant_conv.bias[c:] = -6.0

    def posterior(self, images: Tensor) -> DiagonalGaussian:
        """q(z | x) for pictures `(B, 3, H, W)` in [-1, 1].

        Raises:
            UserError: sides that are no multiple of f, or another shape.
        """
        return DiagonalGaussian.from_moments(self.moments(images))

    def encode(self, images: Tensor) -> Tensor:
        """The latent, its posterior's mean: `(B, c, H/f, W/f)`."""
        return self.posterior(images).mean

    def regularised(
        self, images: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """A sample of q(z | x), and KL(q ‖ N(0, I)) divided by the picture's C·H·W numbers."""
        posterior = self.posterior(images)
        kl = posterior.kl().mean() / images[0].numel()
        readings = {"kl": kl.detach(), **spread(posterior.mean)}
        return posterior.sample(generator), kl, readings
