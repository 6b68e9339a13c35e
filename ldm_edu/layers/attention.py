"""Attention: softmax(Q Kᵀ / √d) V, section 3.3 of the paper, over sequences and over feature maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm_edu.runtime import UserError

KeyValue = tuple[Tensor, Tensor]
# What an attention reads: a sequence, the K and V that were made of it beforehand (for each layer), or itself.
Context = Tensor | dict[nn.Module, KeyValue] | None


def repeated(x: Tensor, batch: int) -> Tensor:
    """`x` (B, ...), the same for several conditions, once for each of them: `(batch, ...)`."""
    return x if len(x) >= batch else torch.cat([x] * (batch // len(x)))  # keeps channels_last


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v for `q` (B, heads, N, d), `k` and `v` (B, heads, M, d): `(B, heads, N, d)`.

    Every attention of the package goes through this one function.
    """
    if q.device.type == "cpu" and q.requires_grad and q.dtype == torch.bfloat16:
        # Here the fused kernel is slow backwards: a whole training step would take 1.4 times as long with it.
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head attention of a sequence to a context, or to itself where there is none.

    Q = W_Q · φ(z), K = W_K · τθ(y), V = W_V · τθ(y) (section 3.3). As in the released code, the three projections
    have no bias unless `bias` is set; the output projection always has one.

    Args:
        channels: width of the sequence.
        context_channels: width of the context; None for self-attention.
        heads: number of heads; `channels` is divided among them.

    Raises:
        UserError: they cannot be.
    """

    def __init__(
        self, channels: int, heads: int, context_channels: int | None = None, bias: bool = False
    ) -> None:
        super().__init__()
        if heads < 1 or channels % heads:
            raise UserError(f"{channels} channels cannot be divided among {heads} heads.")
        self.heads = heads
        source = context_channels or channels
        self.query = nn.Linear(channels, channels, bias=bias)
        self.key = nn.Linear(source, channels, bias=bias)
        self.value = nn.Linear(source, channels, bias=bias)
        self.out = nn.Linear(channels, channels)

    def split(self, sequence: Tensor) -> Tensor:
        """`(B, N, channels)` divided among the heads: `(B, heads, N, channels / heads)`."""
        return rearrange(sequence, "b n (h d) -> b h n d", h=self.heads)

    def project(self, context: Tensor) -> KeyValue:
        """K and V of a context `(B, M, context_channels)`, divided among the heads."""
        return self.split(self.key(context)), self.split(self.value(context))

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        """`x` (B, N, channels), `context` (B, M, context_channels): `(B, N, channels)`."""
        k, v = self.keys_and_values(x, context)
        return self.out(rearrange(attend(self.queries(x), k, v), "b h n d -> b n (h d)"))

    def queries(self, x: Tensor) -> Tensor:
        """Q of `x` (B, N, channels), divided among the heads."""
        return self.split(self.query(x))

    def keys_and_values(self, x: Tensor, context: Context = None) -> KeyValue:
        """K and V of what `x` attends to: of the context, kept from before or made now, or of `x` itself."""
        return context[self] if isinstance(context, dict) else self.project(x if context is None else context)


class AttentionBlock(nn.Module):
    """Self-attention over the pixels of a feature map, added to it: the autoencoder's, and a UNet's without context.

    Args:
        heads: one in the autoencoder.
        groups, eps: of the group norm (eps 1e-6 in the autoencoder, 1e-5 in the UNet).
        zero_out: the last projection starts at zero, so that the block starts as the identity (UNet).
    """

    def __init__(
        self, channels: int, heads: int = 1, groups: int = 32, eps: float = 1e-6, zero_out: bool = False
    ) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=eps)
        self.attention = Attention(channels, heads, bias=True)
        if zero_out:
            nn.init.zeros_(self.attention.out.weight)
            nn.init.zeros_(self.attention.out.bias)

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        """`(B, channels, H, W)` to the same shape. In the UNet it stands where a SpatialTransformer takes a context."""
        height = x.shape[2]
        sequence = rearrange(self.norm(x), "b c h w -> b (h w) c")
        return x + rearrange(self.attention(sequence), "b (h w) c -> b c h w", h=height)
