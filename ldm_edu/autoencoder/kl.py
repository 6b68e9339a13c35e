"""The first stage with a slight KL penalty towards a standard normal latent (section 3.1)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm_edu import checkpoint
from ldm_edu.autoencoder.config import AutoencoderConfig
from ldm_edu.autoencoder.encoder import Decoder, Encoder
from ldm_edu.runtime import UserError


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


class AutoencoderKL(nn.Module):
    """Encoder, diagonal Gaussian, decoder. Latents are unscaled: `LatentDiffusion` brings them to unit variance."""

    kind = "autoencoder-kl"

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config, c = config, config.latent_channels
        self.encoder = Encoder(config, 2 * c)
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1)
        self.post_quant_conv = nn.Conv2d(c, c, 1)
        self.decoder = Decoder(config)

    @property
    def f(self) -> int:
        """The downsampling factor."""
        return self.config.f

    def start_with_small_variance(self, logvar: float = -6.0) -> None:
        """Begin training at a small posterior variance: from unit variance a short training never gets anywhere."""
        c = self.config.latent_channels
        with torch.no_grad():
            self.quant_conv.weight[c:] *= 0.1
            self.quant_conv.bias[c:] = logvar

    def posterior(self, images: Tensor) -> DiagonalGaussian:
        """q(z | x) for pictures `(B, 3, H, W)` in [-1, 1].

        Raises:
            UserError: sides that are no multiple of f, or another shape.
        """
        if images.ndim != 4 or images.shape[1] != self.config.image_channels:
            raise UserError(
                f"Pictures come as (B, {self.config.image_channels}, H, W); this is {tuple(images.shape)}."
            )
        if images.shape[2] % self.f or images.shape[3] % self.f:
            raise UserError(
                f"This first stage shrinks by f = {self.f}: height and width must be multiples of it, not "
                f"{images.shape[2]} × {images.shape[3]}. Pad or crop first (ldm_edu.evaluation.pad_to_multiple)."
            )
        return DiagonalGaussian.from_moments(self.quant_conv(self.encoder(images)))

    def encode(self, images: Tensor) -> Tensor:
        """The latent, its posterior's mean: `(B, c, H/f, W/f)`."""
        return self.posterior(images).mean

    def decode(self, latent: Tensor) -> Tensor:
        """The picture `(B, 3, H, W)`; values can leave [-1, 1] slightly."""
        return self.decoder(self.post_quant_conv(latent))

    def save(self, folder: Path | str, card: str, history: str | None = None) -> None:
        """Write a checkpoint, whole or not at all."""
        config = {"kind": self.kind, "autoencoder": asdict(self.config)}
        checkpoint.write(folder, config, self.state_dict(), card, history)

    @classmethod
    def load(cls, name: str | Path) -> AutoencoderKL:
        """A checkpoint by name or folder, in evaluation mode, on the CPU.

        Raises:
            UserError: none there, damaged, or of another kind.
        """
        folder = checkpoint.find(name)
        config, tensors = checkpoint.read(folder, kind=cls.kind)
        with checkpoint.settings_of(folder):
            model = cls(checkpoint.build(AutoencoderConfig, config["autoencoder"], folder))
        checkpoint.fill(model, tensors, folder)
        return model.eval()
