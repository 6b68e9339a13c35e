"""Small UNets with weights that hide nothing, and how they are compared with other people's."""

from collections.abc import Callable

import torch
from first_stages import close
from torch import Tensor, nn

from ldm_edu.unet import UNet, UNetConfig


def stirred(model: nn.Module, seed: int = 0) -> nn.Module:
    """Norms and biases moved, which are alike at first; what is zero at first, drawn like the rest."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight += 0.2 * noise
            elif not weight.any():
                weight.copy_(noise / weight[0].numel() ** 0.5)
    return model.eval()


def ours(config: UNetConfig) -> UNet:
    torch.manual_seed(0)
    return stirred(UNet(config))


def inputs(config: UNetConfig, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """A latent, timesteps, and context and labels where the network has them."""
    g = torch.Generator().manual_seed(1)
    side = 2 ** len(config.widths)
    z, context = torch.randn(2, config.in_channels, side, side + side // 2, generator=g), None
    if config.context_channels:
        context = torch.randn(2, 5, config.context_channels, generator=g).to(dtype)
    return z.to(dtype), torch.tensor([3, 961]), context, torch.tensor([1, 0]) if config.num_classes else None


@torch.no_grad()
def same_outputs(
    mine: UNet, theirs: nn.Module, call: Callable, dtypes: tuple = (torch.float32, torch.float64)
) -> None:
    """`call(theirs, z, t, context, labels)` is what `mine` answers, to 1e-6 in float64 and 1e-4 in float32."""
    for dtype in dtypes:
        given = inputs(mine.config, dtype)
        answer = mine.to(dtype)(*given)
        assert answer.std() > 0.05, "the outputs hide what comes before them"
        close(answer, call(theirs.to(dtype), *given))
    mine.float(), theirs.float()
