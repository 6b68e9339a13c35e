"""The normal distribution that a KL encoder gives for every number of the latent (section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class DiagonalGaussian:
    """q(z | x): an independent normal for every number of the latent."""

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> DiagonalGaussian:
        """From the encoder's output, `(B, 2c, h, w)`: means first, then log-variances, clamped to [-30, 20]."""
        mean, logvar = moments.float().chunk(2, dim=1)
        return cls(mean, logvar.clamp(-30.0, 20.0))

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + std · ε: the reparametrisation, so that gradients reach both."""
        epsilon = torch.randn(self.mean.shape, generator=generator).to(self.mean)
        return self.mean + (0.5 * self.logvar).exp() * epsilon

    def kl(self) -> Tensor:
        """KL(q ‖ N(0, I)) in nats, summed over the latent: `(B,)`."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).sum(dim=(1, 2, 3))
