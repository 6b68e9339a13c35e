"""Halving and doubling the resolution, each with a learned 3×3 convolution."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Downsample(nn.Module):
    """A 3×3 convolution of stride 2.

    Args:
        symmetric: pad by one pixel on every side (UNet). Otherwise pad right and bottom only (autoencoder).
    """

    def __init__(self, channels: int, symmetric: bool) -> None:
        super().__init__()
        self.symmetric = symmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if symmetric else 0)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` to `(B, C, H/2, W/2)`."""
        return self.conv(x if self.symmetric else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Each pixel doubled in both directions, then a 3×3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` to `(B, C, 2H, 2W)`."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
