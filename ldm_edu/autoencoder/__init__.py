"""Section 3.1: perceptual compression. The first stage that turns pictures into latents and back."""

from ldm_edu.autoencoder.config import AutoencoderConfig
from ldm_edu.autoencoder.discriminator import PatchDiscriminator, adaptive_weight, hinge_loss
from ldm_edu.autoencoder.encoder import Decoder, Encoder
from ldm_edu.autoencoder.first_stage import FirstStage, Identity
from ldm_edu.autoencoder.gaussian import DiagonalGaussian
from ldm_edu.autoencoder.kl import AutoencoderKL
from ldm_edu.autoencoder.objective import FirstStageObjective
from ldm_edu.autoencoder.perceptual import PerceptualConfig, PerceptualLoss, PerceptualNetwork, lpips_vgg
from ldm_edu.autoencoder.vq import AutoencoderVQ, VectorQuantizer, VQConfig, perplexity, usage

__all__ = [
    "AutoencoderConfig",
    "AutoencoderKL",
    "AutoencoderVQ",
    "Decoder",
    "DiagonalGaussian",
    "Encoder",
    "FirstStage",
    "FirstStageObjective",
    "Identity",
    "PatchDiscriminator",
    "PerceptualConfig",
    "PerceptualLoss",
    "PerceptualNetwork",
    "VQConfig",
    "VectorQuantizer",
    "adaptive_weight",
    "hinge_loss",
    "lpips_vgg",
    "perplexity",
    "usage",
]
