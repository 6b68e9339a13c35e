"""E and D of section 3.1: from a picture to a latent f times smaller a side, and back."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ldm_edu.autoencoder.config import AutoencoderConfig
from ldm_edu.layers import AttentionBlock, Downsample, ResidualBlock, Upsample


class Middle(nn.Sequential):
    """Residual block, attention, residual block, at the lowest resolution."""

    def __init__(self, config: AutoencoderConfig) -> None:
        width, groups = config.widths[-1], config.groups
        attention = AttentionBlock(width, groups=groups) if config.middle_attention else nn.Identity()
        super().__init__(
            ResidualBlock(width, width, groups=groups), attention, ResidualBlock(width, width, groups=groups)
        )


class Level(nn.Module):
    """The blocks of one resolution, then the step to the next one."""

    def __init__(
        self, config: AutoencoderConfig, level: int, in_channels: int, blocks: int, resample: nn.Module | None
    ) -> None:
        super().__init__()
        out_channels = config.widths[level]
        steps: list[nn.Module] = []
        for i in range(blocks):
            steps.append(
                ResidualBlock(out_channels if i else in_channels, out_channels, groups=config.groups)
            )
            if level in config.attention_levels:
                steps.append(AttentionBlock(out_channels, groups=config.groups))
        self.blocks = nn.Sequential(*steps)
        self.resample = nn.Identity() if resample is None else resample

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in_channels, H, W)` to `(B, out_channels, H', W')`."""
        return self.resample(self.blocks(x))


class Encoder(nn.Module):
    """E: a picture to `out_channels` numbers for each f×f patch (mean and log-variance, for KL)."""

    def __init__(self, config: AutoencoderConfig, out_channels: int) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(config.image_channels, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        width = config.channels
        for level, next_width in enumerate(widths):
            last = level == len(widths) - 1
            resample = None if last else Downsample(next_width, symmetric=False)
            self.down.append(Level(config, level, width, config.blocks, resample))
            width = next_width
        self.middle = Middle(config)
        self.norm_out = nn.GroupNorm(config.groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, 3, H, W)` to `(B, out_channels, H/f, W/f)`."""
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.middle(h))))


class Decoder(nn.Module):
    """D: a latent to a picture."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config, widths = config, config.widths
        width = widths[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.middle = Middle(config)
        self.up = nn.ModuleList()
        for level in reversed(range(len(widths))):
            resample = Upsample(widths[level]) if level else None
            self.up.append(Level(config, level, width, config.blocks + 1, resample))
            width = widths[level]
        self.norm_out = nn.GroupNorm(config.groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, config.image_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """`(B, c, h, w)` to `(B, 3, f·h, f·w)`."""
        h = self.middle(self.conv_in(z))
        for level in self.up:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))
