"""SpatialTransformer: how a condition enters the UNet (section 3.3 and table 16)."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm_edu.layers import Attention
from ldm_edu.layers.attention import Context, repeated


class FeedForward(nn.Module):
    """Linear, GEGLU (value · gelu(gate), in this order), linear; four times as wide inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.widen = nn.Linear(channels, 8 * channels)
        self.narrow = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, channels)` to the same shape."""
        value, gate = self.widen(x).chunk(2, dim=-1)
        return self.narrow(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each behind a LayerNorm and added to its input.

    The order is the released code's; table 16 of the paper says self-attention, MLP, cross-attention.
    Without a context the second attention is a self-attention too.
    """

    def __init__(self, channels: int, heads: int, context_channels: int | None) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.self_attention = Attention(channels, heads)
        self.cross_attention = Attention(channels, heads, context_channels)
        self.feed_forward = FeedForward(channels)

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        """`x` (B, N, channels), `context` (B, M, context_channels): `(B, N, channels)`.

        Given the K and V of k * B contexts (`keys_and_values`), `(k * B, N, channels)`: its first attention needs none
        of them, and runs once for all k.
        """
        x = x + self.self_attention(self.norm1(x))
        if isinstance(context, dict):
            x = repeated(x, len(context[self.cross_attention][0]))
        x = x + self.cross_attention(self.norm2(x), context)
        return x + self.feed_forward(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A feature map as a sequence of its pixels, through transformer blocks, added back to the map.

    The last projection starts at zero: at first the UNet ignores its condition. The two projections are linear layers
    (as in Stable Diffusion 2); the 1×1 convolutions of the paper's models and of Stable Diffusion 1 are the same thing.
    """

    def __init__(
        self, channels: int, heads: int, context_channels: int | None = None, depth: int = 1, groups: int = 32
    ) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.project_in = nn.Linear(channels, channels)
        self.blocks = nn.ModuleList(TransformerBlock(channels, heads, context_channels) for _ in range(depth))
        self.project_out = nn.Linear(channels, channels)
        nn.init.zeros_(self.project_out.weight)
        nn.init.zeros_(self.project_out.bias)

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        """`x` (B, channels, H, W), `context` (B, M, context_channels): the shape of `x`."""
        height = x.shape[2]
        h = self.project_in(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        for block in self.blocks:
            h = block(h, context)
        return repeated(x, len(h)) + rearrange(self.project_out(h), "b (h w) c -> b c h w", h=height)
