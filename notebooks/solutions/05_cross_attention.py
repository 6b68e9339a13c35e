"""Solutions of notebook 05, cross-attention. Run this file, and the checks say whether they are right."""

import torch
from torch import Tensor

from ldm_edu.exercises.attention import check_attention, check_geglu, check_word_overlap


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q kᵀ / √d) v in each head: q (B, N, C), k and v (B, M, C) to (B, N, C).

    The first C / heads channels are head 0's: a view as (heads, d), then heads before places. d is the width of one
    head. The softmax runs over the M keys. The way back is the way there in reverse.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).flatten(-2)


def geglu(h: Tensor) -> Tensor:
    """The value times the gelu of the gate: h (B, N, 2 C) to (B, N, C).

    The value is the first half, the gate the second. GELU(g) is g times the chance that a standard normal number is
    below g.
    """
    value, gate = h.chunk(2, dim=-1)
    return value * gate * 0.5 * (1 + torch.erf(gate / 2**0.5))


def word_overlap(probabilities: Tensor, token: int, box: Tensor) -> Tensor:
    """The share of a token's attention in a box over the box's share of the places: one number.

    The weights sum to 1 over the tokens, so what a token gets in all is a sum over the places, to be divided by.
    A place half in the box counts half, on both sides.
    """
    weights = probabilities[:, :, token].mean(dim=0)
    share_of_attention = (weights * box).sum() / weights.sum()
    share_of_places = box.mean()
    return share_of_attention / share_of_places


if __name__ == "__main__":
    check_attention(attention)
    check_geglu(geglu)
    check_word_overlap(word_overlap)
