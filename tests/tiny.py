"""The smallest models of each kind, with weights that hide nothing: 16x16 pictures, 2x4x4 latents."""

import torch
from torch import nn

from ldm_edu.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm_edu.conditioning import TextConditioner
from ldm_edu.diffusion import Schedule
from ldm_edu.pipeline import LatentDiffusion
from ldm_edu.unet import UNet, UNetConfig

WORDS = ["a", "above", "blue", "circle", "red", "star"]
AUTOENCODER = AutoencoderConfig(
    latent_channels=2, channels=8, channel_multipliers=(1, 1, 2), blocks=1, groups=4, attention_levels=(2,)
)
UNET = UNetConfig(
    in_channels=2,
    out_channels=2,
    channels=8,
    channel_multipliers=(1, 2),
    blocks=1,
    attention_levels=(1,),
    heads=2,
    context_channels=16,
    groups=4,
)


def stirred(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every weight moved a little at random: some are zero at first, and would hide what comes before them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return model


def first_stage(seed: int = 0) -> AutoencoderKL:
    """f = 4, two latent channels."""
    torch.manual_seed(seed)
    return stirred(AutoencoderKL(AUTOENCODER)).eval()


def conditioner(seed: int = 0) -> TextConditioner:
    """Six words, eight tokens."""
    torch.manual_seed(seed)
    return TextConditioner.from_words(WORDS, length=8, channels=16, layers=2, heads=2)


def latent_diffusion(seed: int = 0, prediction: str = "eps") -> LatentDiffusion:
    """Text to 16x16 pictures."""
    torch.manual_seed(seed)
    unet = stirred(UNet(UNET))
    return LatentDiffusion(first_stage(seed), unet, conditioner(seed), Schedule(), 0.7, prediction, 4).eval()
