"""Solutions of notebook 04, the UNet. Run this file, and the checks say whether they are right."""

import math

import torch
from torch import Tensor, nn

from ldm_edu.exercises.unet import check_skip_channels, check_timestep_embedding, check_zero_output


def timestep_vector(t: Tensor, channels: int) -> Tensor:
    """The sinusoids of timesteps `(B,)`, cosines first: `(B, channels)`.

    The frequencies fall from 1 by the same factor each time, and would reach 1/10,000 one place after the last: i is
    divided by their number, not by one less.
    """
    half = channels // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def start_as_shortcut(block: nn.Module) -> nn.Module:
    """The same block, changed so that it starts as its shortcut.

    What the block adds is what conv2 gives, so conv2 must give zero: weight and bias. It still has a gradient, for what
    comes *into* it is not zero. A second zero before it (in norm2, say) would cut that gradient off for ever.
    """
    nn.init.zeros_(block.conv2.weight)
    nn.init.zeros_(block.conv2.bias)
    return block


def skip_channels(channels: int, multipliers: tuple[int, ...], blocks: int) -> list[int]:
    """The input channels of each residual block on the way up, in the order in which they run.

    Walk down as the network does and note how wide each skip connection is; then walk up and take the last one first.
    """
    widths = [channels * m for m in multipliers]
    skips = [channels]  # conv_in
    for level, width in enumerate(widths):
        skips += [width] * blocks
        if level < len(widths) - 1:
            skips.append(width)  # the halving, as wide as the level that it leaves
    inputs, came = [], widths[-1]  # the middle
    for width in reversed(widths):
        for _ in range(blocks + 1):
            inputs.append(came + skips.pop())
            came = width
    return inputs


if __name__ == "__main__":
    check_timestep_embedding(timestep_vector)
    check_zero_output(start_as_shortcut)
    check_skip_channels(skip_channels)
