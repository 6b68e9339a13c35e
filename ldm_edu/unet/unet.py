"""The time-conditional UNet εθ(z_t, t, τθ(y)) of equations 2 and 3."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_edu.layers import Downsample, ResidualBlock, Upsample
from ldm_edu.unet.transformer import SpatialTransformer


@dataclass(frozen=True)
class UNetConfig:
    """The shape of a UNet; the defaults are Stable Diffusion 1's.

    Args:
        in_channels: of the latent, with whatever is concatenated to it.
        out_channels: of the prediction.
        channels: width of the first level; level i is `channels * channel_multipliers[i]` wide.
        blocks: residual blocks a level on the way down; one more on the way up.
        attention_levels: levels (0 is the latent's resolution) with a SpatialTransformer after each residual block.
        heads: of every attention.
        context_channels: width of the condition's sequence; None without one.
        transformer_depth: transformer blocks in each SpatialTransformer.
        groups: of every group norm.
        scale_shift: the timestep scales and shifts the residual blocks' norms (ADM) instead of being added.
    """

    in_channels: int = 4
    out_channels: int = 4
    channels: int = 320
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    attention_levels: tuple[int, ...] = (0, 1, 2)
    heads: int = 8
    context_channels: int | None = 768
    transformer_depth: int = 1
    groups: int = 32
    scale_shift: bool = False


def timestep_embedding(t: Tensor, channels: int, slowest: float = 10_000.0) -> Tensor:
    """[cos, sin] of t at `channels / 2` frequencies from 1 down to 1/slowest: `(B, channels)`.

    As in the released code: cosines first, and no shift of the frequencies.
    """
    half = channels // 2
    frequencies = torch.exp(
        -math.log(slowest) * torch.arange(half, device=t.device, dtype=torch.float32) / half
    )
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """The timestep as a vector four times as wide as the UNet: sinusoids, linear, swish, linear."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.linear1 = nn.Linear(channels, 4 * channels)
        self.linear2 = nn.Linear(4 * channels, 4 * channels)

    def forward(self, t: Tensor) -> Tensor:
        """`(B,)` integers to `(B, 4 * channels)`."""
        embedded = timestep_embedding(t, self.channels).to(self.linear1.weight.dtype)
        return self.linear2(F.silu(self.linear1(embedded)))


class Block(nn.Module):
    """A residual block, and a SpatialTransformer where the level has attention."""

    def __init__(self, config: UNetConfig, level: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.residual = _residual(config, in_channels, out_channels)
        self.transformer = _transformer(config, out_channels) if level in config.attention_levels else None

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None) -> Tensor:
        """`x` (B, in_channels, H, W): `(B, out_channels, H, W)`."""
        x = self.residual(x, time)
        return x if self.transformer is None else self.transformer(x, context)


class DownLevel(nn.Module):
    """The blocks of one resolution on the way down, then the step to half of it."""

    def __init__(
        self, config: UNetConfig, level: int, in_channels: int, out_channels: int, last: bool
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * config.blocks
        self.blocks = nn.ModuleList(
            Block(config, level, a, b) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.downsample = None if last else Downsample(out_channels, symmetric=True)

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None) -> list[Tensor]:
        """Every output along the way, for the skip connections; the last one leads on."""
        outputs = []
        for block in self.blocks:
            x = block(x, time, context)
            outputs.append(x)
        if self.downsample is not None:
            outputs.append(self.downsample(x))
        return outputs


class UpLevel(nn.Module):
    """The blocks of one resolution on the way up, each fed its skip connection, then the step to twice of it."""

    def __init__(
        self,
        config: UNetConfig,
        level: int,
        in_channels: int,
        out_channels: int,
        skips: list[int],
        last: bool,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for skip in skips:
            self.blocks.append(Block(config, level, in_channels + skip, out_channels))
            in_channels = out_channels
        self.upsample = None if last else Upsample(out_channels)

    def forward(self, x: Tensor, skips: list[Tensor], time: Tensor, context: Tensor | None) -> Tensor:
        """Takes the skip connections that it needs from the end of `skips`."""
        for block in self.blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), time, context)
        return x if self.upsample is None else self.upsample(x)


class Middle(nn.Module):
    """Residual block, SpatialTransformer, residual block, at the lowest resolution."""

    def __init__(self, config: UNetConfig, channels: int) -> None:
        super().__init__()
        self.residual1 = _residual(config, channels, channels)
        self.transformer = _transformer(config, channels)
        self.residual2 = _residual(config, channels, channels)

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None) -> Tensor:
        """`(B, channels, H, W)` to the same shape."""
        return self.residual2(self.transformer(self.residual1(x, time), context), time)


class UNet(nn.Module):
    """The denoiser: a latent with noise, the timestep and the condition, to a prediction of the latent's shape."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.channels * m for m in config.channel_multipliers]
        top = len(widths) - 1
        self.time = TimeEmbedding(config.channels)
        self.conv_in = nn.Conv2d(config.in_channels, config.channels, 3, padding=1)
        self.down, skips, width = nn.ModuleList(), [config.channels], config.channels
        for level, out_channels in enumerate(widths):
            last = level == top
            self.down.append(DownLevel(config, level, width, out_channels, last))
            width = out_channels
            skips += [width] * (config.blocks + (not last))
        self.middle = Middle(config, width)
        self.up = nn.ModuleList()
        for level in reversed(range(len(widths))):
            taken = [skips.pop() for _ in range(config.blocks + 1)]
            self.up.append(UpLevel(config, level, width, widths[level], taken, last=level == 0))
            width = widths[level]
        self.norm_out = nn.GroupNorm(config.groups, width, eps=1e-5)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, z: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """`z` (B, in_channels, h, w), `t` (B,) integers, `context` (B, M, d): `(B, out_channels, h, w)`.

        h and w must be multiples of 2 ** (number of levels - 1).
        """
        time = self.time(t)
        h = self.conv_in(z)
        skips = [h]
        for level in self.down:
            outputs = level(h, time, context)
            skips += outputs
            h = outputs[-1]
        h = self.middle(h, time, context)
        for level in self.up:
            h = level(h, skips, time, context)
        return self.conv_out(F.silu(self.norm_out(h)))


def _residual(config: UNetConfig, in_channels: int, out_channels: int) -> ResidualBlock:
    return ResidualBlock(
        in_channels,
        out_channels,
        time_channels=4 * config.channels,
        groups=config.groups,
        eps=1e-5,
        scale_shift=config.scale_shift,
        zero_out=True,
    )


def _transformer(config: UNetConfig, channels: int) -> SpatialTransformer:
    return SpatialTransformer(
        channels, config.heads, config.context_channels, config.transformer_depth, config.groups
    )
