"""Section 3.1: perceptual compression. The first stage that turns pictures into latents and back."""

from ldm_edu.autoencoder.config import AutoencoderConfig
from ldm_edu.autoencoder.encoder import Decoder, Encoder
from ldm_edu.autoencoder.kl import AutoencoderKL, DiagonalGaussian
from ldm_edu.autoencoder.objective import FirstStageObjective

__all__ = [
    "AutoencoderConfig",
    "AutoencoderKL",
    "Decoder",
    "DiagonalGaussian",
    "Encoder",
    "FirstStageObjective",
]
