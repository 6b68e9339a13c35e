"""The residual block: norm, swish, convolution, twice, around a shortcut."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ldm_edu.layers.attention import repeated


class ResidualBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), with the timestep's embedding between the two halves.

    Args:
        in_channels, out_channels: where they differ, a 1×1 convolution carries the shortcut.
        time_channels: width of the timestep embedding; None in the autoencoder.
        groups, eps: of the group norms (eps 1e-6 in the autoencoder, 1e-5 in the UNet).
        scale_shift: the embedding scales and shifts the second norm instead of being added (ADM; off in the paper).
        zero_out: the last convolution starts at zero, so that the block starts as its shortcut (UNet).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_channels: int | None = None,
        groups: int = 32,
        eps: float = 1e-6,
        scale_shift: bool = False,
        zero_out: bool = False,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_channels, out_channels * (2 if scale_shift else 1)) if time_channels else None
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if zero_out:
            nn.init.zeros_(self.conv2.weight)
            nn.init.zeros_(self.conv2.bias)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """`x` (B, in_channels, H, W), `time` (B or B / k, time_channels): `(B, out_channels, H, W)`."""
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time is None:
            h = self.norm2(h)
        else:
            embedded = repeated(self.time(F.silu(time)), len(x))[:, :, None, None]
            if self.scale_shift:
                scale, shift = embedded.chunk(2, dim=1)
                h = self.norm2(h) * (1 + scale) + shift
            else:
                h = self.norm2(h + embedded)
        return self.shortcut(x) + self.conv2(F.silu(h))
