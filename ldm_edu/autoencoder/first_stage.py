"""What KL and VQ first stages share: E, D, and how pictures go in and out (section 3.1)."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ldm_edu import checkpoint
from ldm_edu.autoencoder.config import AutoencoderConfig
from ldm_edu.autoencoder.encoder import Decoder, Encoder
from ldm_edu.autoencoder.gaussian import DiagonalGaussian
from ldm_edu.autoencoder.strips import decode_in_strips, fits_whole
from ldm_edu.parts import refuse_if_other
from ldm_edu.runtime import UserError, refuse_bytes


class FirstStage(nn.Module):
    """E and D with a 1×1 convolution on either side of the latent; what is between them is a subclass's business.

    Latents are unscaled: `LatentDiffusion` brings them to unit variance.

    Args:
        encoder_channels: how many numbers E gives for each place; 2c for KL (mean and log-variance), c for VQ.
    """

    kind: ClassVar[str] = "first stage"
    config_class: ClassVar[type[AutoencoderConfig]] = AutoencoderConfig

    def __init__(self, config: AutoencoderConfig, encoder_channels: int) -> None:
        super().__init__()
        self.config, c = config, config.latent_channels
        self.encoder = Encoder(config, encoder_channels)
        self.quant_conv = nn.Conv2d(encoder_channels, encoder_channels, 1)
        self.post_quant_conv = nn.Conv2d(c, c, 1)
        self.decoder = Decoder(config)

    @property
    def f(self) -> int:
        """The downsampling factor."""
        return self.config.f

    @property
    def device(self) -> torch.device:
        """Where the model is; the CPU for the identity."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def moments(self, images: Tensor) -> Tensor:
        """E's output for pictures `(B, 3, H, W)` in [-1, 1]: `(B, encoder_channels, H/f, W/f)`.

        Raises:
            UserError: sides that are no multiple of f, or another shape.
        """
        self.check(images)
        return self.quant_conv(self.encoder(images))

    def check(self, images: Tensor) -> None:
        """Refuse what is no batch of pictures with sides that are multiples of f."""
        refuse_bytes(images)
        if images.ndim != 4 or images.shape[1] != self.config.image_channels:
            raise UserError(
                f"Pictures come as (B, {self.config.image_channels}, H, W); this is {tuple(images.shape)}."
            )
        if images.shape[2] % self.f or images.shape[3] % self.f:
            raise UserError(
                f"This first stage shrinks by f = {self.f}: height and width must be multiples of it, not "
                f"{images.shape[2]} × {images.shape[3]}. Pad or crop first (ldm_edu.evaluation.pad_to_multiple)."
            )

    def posterior(self, images: Tensor) -> DiagonalGaussian:
        """q(z | x); where the encoder is deterministic, a normal distribution of almost no width."""
        latent = self.encode(images)
        return DiagonalGaussian(latent, torch.full_like(latent, -30.0))

    def encode(self, images: Tensor) -> Tensor:
        """Pictures `(B, 3, H, W)` in [-1, 1] to the latent `(B, c, H/f, W/f)` that a diffusion model works on."""
        raise NotImplementedError

    def decode(self, latent: Tensor) -> Tensor:
        """The picture `(B, 3, H, W)` of a latent; values can leave [-1, 1] slightly."""
        return self.to_picture(latent)

    def regularised(
        self, images: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """For training: what D gets, the regulariser's penalty (a mean), and the readings worth watching."""
        raise NotImplementedError

    def to_picture(self, latent: Tensor) -> Tensor:
        """D, on a latent as training gave it.

        A batch too large for the memory is decoded picture by picture, a picture too large in strips (`strips`).
        """
        latent = latent.to(self.post_quant_conv.weight.dtype)  # a KL latent is float32, also of half a model
        if torch.is_grad_enabled() or fits_whole(self.decoder, latent):
            return self.decoder(self.post_quant_conv(latent))
        if len(latent) > 1:
            return torch.cat([self.to_picture(one) for one in latent.split(1)])
        return decode_in_strips(self.decoder, self.post_quant_conv(latent))

    def save(self, folder: Path | str, card: str, history: str | None = None) -> None:
        """Write a checkpoint, whole or not at all."""
        checkpoint.write(folder, self.description(), self.state_dict(), card, history)

    def description(self) -> dict[str, Any]:
        """Kind and shape, as JSON.

        Raises:
            UserError: `FirstStage.load` would make another class of it; one of your own needs a `kind` of its own.
        """
        described = json.loads(checkpoint.to_json({"kind": self.kind, "autoencoder": asdict(self.config)}))
        refuse_if_other(self, lambda: FirstStage.from_description(described, Path()))
        return described

    @classmethod
    def from_description(cls, description: dict[str, Any], folder: Path) -> Self:
        """What `description` says, with untrained weights.

        Raises:
            UserError: another kind than this class, or unknown settings.
        """
        kinds = {cls.kind: cls} if cls is not FirstStage else _kinds()
        if description["kind"] not in kinds:
            raise checkpoint.CheckpointError(
                f"The checkpoint {folder} is a {description['kind']!r}; asked for was {' or '.join(kinds)}."
            )
        chosen = kinds[description["kind"]]
        return chosen(checkpoint.build(chosen.config_class, description["autoencoder"], folder))

    @classmethod
    def load(cls, name: str | Path) -> Self:
        """A checkpoint by name or folder, in evaluation mode, on the CPU. `FirstStage.load` takes every kind.

        Raises:
            UserError: none there, damaged, or of another kind.
        """
        folder = checkpoint.find(name)
        config, tensors = checkpoint.read(folder, kind=None if cls is FirstStage else cls.kind)
        with checkpoint.settings_of(folder):
            model = cls.from_description(config, folder)
        checkpoint.fill(model, tensors, folder)
        return model.eval()


def _kinds() -> dict[str, type[FirstStage]]:
    """Every subclass with a kind of its own; of one that was defined again, the last."""
    classes = FirstStage.__subclasses__()
    for one in classes:
        classes += one.__subclasses__()
    return {one.kind: one for one in classes if "kind" in vars(one)}


def spread(latent: Tensor) -> dict[str, Tensor]:
    """The latent's standard deviation, and those of its narrowest and widest channel."""
    each = latent.detach().transpose(0, 1).flatten(1).std(dim=1)
    return {"latent_std": latent.detach().std(), "latent_std_min": each.min(), "latent_std_max": each.max()}


class Identity(FirstStage):
    """f = 1: the latent is the picture, as in the paper's LDM-1, a diffusion model on pixels. Nothing to train.

    Raises:
        UserError: the config shrinks pictures, or its latent has another number of channels than they have.
    """

    kind = "identity"

    def __init__(self, config: AutoencoderConfig | None = None) -> None:
        nn.Module.__init__(self)
        self.config = config or AutoencoderConfig(latent_channels=3, channel_multipliers=(1,))
        if self.f != 1 or self.config.latent_channels != self.config.image_channels:
            raise UserError(
                f"The identity keeps pictures as they are (f = 1); this config has f = {self.f} and "
                f"{self.config.latent_channels} latent channels for {self.config.image_channels}."
            )

    def encode(self, images: Tensor) -> Tensor:
        """The pictures themselves."""
        self.check(images)
        return images

    def decode(self, latent: Tensor) -> Tensor:
        """The latents themselves."""
        return latent
