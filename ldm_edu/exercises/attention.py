"""The exercises of notebook 05: attention by hand, GEGLU, and where a word looks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ldm_edu.exercises.grading import Answer, Mistake, grade, grade_values
from ldm_edu.layers.attention import attend


def check_attention(answer: Answer) -> None:
    """Check `answer(q, k, v, heads)`: attention of `q` (B, N, C) to `k`, `v` (B, M, C) in `heads` heads: (B, N, C)."""

    def variant(scale: Answer = lambda size, heads: size**-0.5, axis: int | None = -1, before: str = "(h d)",
                after: str = "b n (h d)") -> Answer:  # fmt: skip
        def run(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
            q, k, v = (rearrange(x, f"b n {before} -> b h n d", h=heads) for x in (q, k, v))
            weights = q @ k.transpose(-2, -1) * scale(q.shape[-1], heads)
            out = (weights if axis is None else weights.softmax(axis)) @ v
            return out.reshape(len(q), q.shape[2], -1) if not after else rearrange(out, f"b h n d -> {after}")

        return run

    def right(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
        return rearrange(attend(q, k, v), "b h n d -> b n (h d)")

    def mixing(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        return attend(*(x.reshape(len(x), heads, x.shape[1], -1) for x in (q, k, v)))

    one_head = variant()
    places = "reshape alone mixes places: split the channels first, (B, N, heads, d), then transpose."
    mistakes: list[Mistake] = [
        ("your softmax runs over the queries; each query's weights over the keys sum to 1.", variant(axis=-2)),
        ("your softmax runs over the heads; each query's weights over the keys sum to 1.", variant(axis=1)),
        ("the softmax is missing.", variant(axis=None)),
        ("the scale is 1/√d with d the width of one head, C / heads, not C.", variant(lambda d, h: (d * h) ** -0.5)),
        ("the scale 1/√d is missing.", variant(lambda d, h: 1)),
        ("the scale is 1/√d, not 1/d.", variant(lambda d, h: 1 / d)),
        ("divide by √d; you multiply.", variant(lambda d, h: d**0.5)),
        ("you use one head of all channels; each head attends with its own.", lambda q, k, v, h: one_head(q, k, v, 1)),
        ("a head's channels lie side by side: the first C / heads are head 0's.", variant(before="(d h)")),
        ("put the heads back as you took them apart: head 0's channels come first.", variant(after="b n (d h)")),
        (places, lambda q, k, v, h: mixing(q, k, v, h).reshape(q.shape)),
        (places, lambda q, k, v, h: mixing(q, k, v, h).transpose(1, 2).reshape(q.shape)),
        ("swap heads and places back before you join the channels.", variant(after="")),
    ]
    draw = torch.Generator().manual_seed(0)
    q, k, v = (2 * torch.randn(2, n, 8, generator=draw) for n in (5, 3, 3))
    grade("attention", answer, right, [(q, k, v, 2), (q, k, v, 4), (q, k, v, 1)], mistakes)


def check_geglu(answer: Answer) -> None:
    """Check `answer(h)`: value times gelu of gate, from `h` (B, N, 2 C), which holds the value first: (B, N, C)."""

    def variant(turn: Answer = F.gelu, first: bool = False, other: Answer = lambda x: x) -> Answer:
        def run(h: Tensor) -> Tensor:
            value, gate = reversed(h.chunk(2, dim=-1)) if first else h.chunk(2, dim=-1)
            return other(value) * turn(gate)

        return run

    def taking_turns(h: Tensor) -> Tensor:
        return h[..., ::2] * F.gelu(h[..., 1::2])

    mistakes: list[Mistake] = [
        ("your gate is the first half; here the value comes first and the gate second.", variant(first=True)),
        ("value and gate lie one after the other, C channels each; you take every other channel.", taking_turns),
        ("a GLU's gate is a sigmoid; GEGLU's is a GELU.", variant(torch.sigmoid)),
        ("your gate is a ReLU; GEGLU's is a GELU.", variant(F.relu)),
        ("your gate is a swish, x · sigmoid(x); GEGLU's is a GELU.", variant(F.silu)),
        ("that is the GELU by tanh, close but not equal; the released code uses the exact one.",
         variant(lambda x: F.gelu(x, approximate="tanh"))),
        ("only the gate goes through the GELU; the value stays as it is.", variant(other=F.gelu)),
        ("the gate must go through a GELU; you multiply the halves as they are.", variant(lambda x: x)),
        ("value and gate are multiplied, not added.", lambda h: h.chunk(2, -1)[0] + F.gelu(h.chunk(2, -1)[1])),
        ("the value is missing: GEGLU multiplies it by the gelu of the gate.", lambda h: F.gelu(h.chunk(2, -1)[1])),
    ]  # fmt: skip
    h = 2 * torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    grade("geglu", answer, variant(), [(h,), (h[..., :4],)], mistakes)


def check_word_overlap(answer: Answer) -> None:
    """Check `answer(probabilities, token, box)`: the share of a word's attention in a box over the box's own share.

    `probabilities` (heads, N, M) sum to 1 over the M words, `token` is the word's place, `box` (N,) how much of each
    place the box covers, 0 to 1. The heads are averaged first. The answer is one number.
    """

    def ratio(weights: Tensor, box: Tensor) -> Tensor:
        return (weights * box).sum(-1) / weights.sum(-1) / box.mean()

    def of_word(rule: Answer) -> Answer:
        return lambda probabilities, token, box: rule(probabilities[..., token].mean(0), box)

    right = of_word(ratio)
    mistakes: list[Mistake] = [
        ("average the heads' maps first: a mean of ratios counts a head that hardly reads the word as much as one that "
         "reads nothing else.", lambda p, token, box: ratio(p[..., token], box).mean()),
        ("that is the share alone; divide it by the box's share of the picture.",
         of_word(lambda w, box: (w * box).sum() / w.sum())),
        ("divide by all the attention that the word gets: the weights sum to 1 over the words, not over the places.",
         of_word(lambda w, box: (w * box).sum() / box.mean())),
        ("divide by all the attention that the word gets; you divide by the number of places.",
         of_word(lambda w, box: (w * box).mean() / box.mean())),
        ("no softmax over the places: these are weights already.", of_word(lambda w, box: ratio(w.softmax(0), box))),
        ("divide by the sum of the weights, not by the largest.",
         of_word(lambda w, box: (w * box).sum() / w.max() / box.mean())),
        ("that compares inside with outside; compare with the whole picture.",
         of_word(lambda w, box: ((w * box).sum() / box.sum()) / ((w * (1 - box)).sum() / (1 - box).sum()))),
        ("a place half in the box counts half; you count it whole.", of_word(lambda w, box: ratio(w, box.ceil()))),
    ]  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    probabilities = (2 * torch.randn(2, 6, 3, generator=draw)).softmax(-1)
    boxes = torch.tensor([[0, 1, 0.5, 0, 0.25, 0], [0, 0, 0, 1, 1, 0.5]])
    cases = [(probabilities, token, box) for token, box in zip((0, 2), boxes, strict=True)]
    grade_values("word overlap", answer, right, cases, mistakes)
