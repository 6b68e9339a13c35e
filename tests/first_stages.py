"""Small first stages with weights that hide nothing, and how they are compared with other people's."""

import torch
from torch import Tensor, nn

from ldm_edu.autoencoder import AutoencoderConfig, AutoencoderKL, AutoencoderVQ, FirstStage, VQConfig

SMALL = AutoencoderConfig(latent_channels=2, channels=8, channel_multipliers=(1, 2, 2), blocks=1, groups=4)
VQ = VQConfig(latent_channels=3, channels=8, channel_multipliers=(1, 2), blocks=2, groups=4, codebook_size=50)


def stirred(model: nn.Module, seed: int = 0) -> nn.Module:
    """Norms and biases moved, which are alike at first and would hide a mix-up; codes drawn from N(0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight += 0.2 * torch.randn(weight.shape, generator=generator)
            elif "embedding" in name or "codebook" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator))
    return model.eval()


def ours(config: AutoencoderConfig) -> FirstStage:
    torch.manual_seed(0)
    return stirred(AutoencoderVQ(config) if isinstance(config, VQConfig) else AutoencoderKL(config))


def close(mine: Tensor, other: Tensor) -> None:
    """Equal to 1e-6 of the largest value in float64, 1e-4 in float32."""
    assert mine.dtype == other.dtype and mine.shape == other.shape
    assert (mine - other).abs().max() <= (1e-6 if mine.dtype == torch.float64 else 1e-4) * other.abs().max()


@torch.no_grad()
def same_outputs(mine: FirstStage, encode, decode, side: int = 16, dtypes=(torch.float32, torch.float64)) -> None:
    """`encode` gives moments or the latent before quantisation, `decode` the picture of what D gets."""
    for dtype in dtypes:
        mine.to(dtype)
        g = torch.Generator().manual_seed(1)
        images = torch.randn(2, mine.config.image_channels, side, side + mine.f, generator=g)
        moments = mine.moments(images.to(dtype))
        close(moments, encode(images.to(dtype)))
        if isinstance(mine, AutoencoderVQ):
            codes = mine.quantizer.codes(moments)
            close(mine.decode_codes(codes), decode(mine.quantizer.lookup(codes)))
        else:
            latent = moments[:, : mine.config.latent_channels]
            close(mine.decode(latent), decode(latent))


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].shape == b[n].shape and torch.equal(a[n], b[n]) for n in a)
