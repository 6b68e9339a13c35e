"""The checks of the exercises on attention: each takes the solution, and names the mistake of a wrong one."""

import math
from collections.abc import Callable

import pytest
import torch
from graded import refusals
from torch import Tensor, nn

from ldm_edu.exercises.attention import check_attention, check_geglu, check_word_overlap

CHECKS = {
    check_attention: "attention",
    check_geglu: "geglu",
    check_word_overlap: "word overlap",
}


# The right solutions, written as a learner would: with nothing of the package.


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float | None = None, weigh: Callable | None = None):
    """Head by head."""
    size, done = q.shape[2] // heads, []
    for h in range(heads):
        mine = slice(h * size, (h + 1) * size)
        logits = q[..., mine] @ k[..., mine].mT * (size**-0.5 if scale is None else scale)
        done.append((weigh or (lambda x: x.softmax(2)))(logits) @ v[..., mine])
    return torch.cat(done, 2)


def all_heads(q: Tensor, k: Tensor, v: Tensor, heads: int, interleaved: bool = False) -> Tensor:
    """(B, heads, N, d)."""
    split = [x.unflatten(2, (-1, heads) if interleaved else (heads, -1)) for x in (q, k, v)]
    q, k, v = (x.permute(0, 3, 1, 2) if interleaved else x.transpose(1, 2) for x in split)
    return (q @ k.mT / math.sqrt(q.shape[3])).softmax(3) @ v


def mixed(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (x.reshape(x.shape[0], heads, x.shape[1], x.shape[2] // heads) for x in (q, k, v))
    return (q @ k.mT / math.sqrt(q.shape[3])).softmax(3) @ v


def over_heads(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return ((q @ k.mT / math.sqrt(q.shape[3])).softmax(1) @ v).transpose(1, 2).flatten(2)


def attention_in_place(q: Tensor, k: Tensor, v: Tensor, heads: int, of: Callable = lambda x: x) -> Tensor:
    q, k, v = (of(x).unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    q *= q.shape[3] ** -0.5
    return ((q @ k.mT).softmax(3) @ v).transpose(1, 2).flatten(2)


def geglu_in_place(h: Tensor) -> Tensor:
    value, gate = h.chunk(2, 2)
    value *= nn.functional.gelu(gate)
    return value


def geglu(h: Tensor) -> Tensor:
    half = h.shape[2] // 2
    gate = h[:, :, half:]
    return h[:, :, :half] * gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))


def word_overlap(probabilities: Tensor, token: int, box: Tensor) -> Tensor:
    """As a density: how much of the word a place in the box gets, over how much any place gets."""
    of_word = probabilities.sum(0)[:, token]
    return of_word @ box / box.sum() * len(box) / of_word.sum()


def on_map(rule: Callable) -> Callable:
    return lambda p, token, box: rule(p.mean(0)[:, token], box)


@pytest.mark.parametrize(
    "check, answer",
    [
        (check_geglu, geglu), (check_word_overlap, word_overlap),
        (check_word_overlap, torch.no_grad()(lambda *a: word_overlap(*a).item())),  # a measurement: no gradients asked
        (check_attention, attention),
        (check_attention, lambda *a: attention_in_place(*a, of=torch.clone)),  # its own tensors
        (check_attention, lambda q, k, v, h: all_heads(q, k, v, h).transpose(1, 2).flatten(2)),
    ],
)  # fmt: skip
def test_a_right_solution_passes(check: Callable, answer: Callable, capsys: pytest.CaptureFixture):
    assert check(answer) is None
    assert capsys.readouterr().out == f"ok: {CHECKS[check]}\n"


ATTENTION = {
    "reshape alone": lambda q, k, v, h: mixed(q, k, v, h).transpose(1, 2).reshape(q.shape),
    "reshape alone mixes": lambda q, k, v, h: mixed(q, k, v, h).reshape(q.shape),
    "over the queries": lambda *a: attention(*a, weigh=lambda x: x.softmax(1)),
    "over the heads": over_heads,
    "softmax is missing": lambda *a: attention(*a, weigh=lambda x: x),
    "d the width of one head": lambda q, k, v, h: attention(q, k, v, h, scale=q.shape[2] ** -0.5),
    "the scale 1/√d is missing": lambda *a: attention(*a, scale=1.0),
    "not 1/d": lambda q, k, v, h: attention(q, k, v, h, scale=h / q.shape[2]),
    "you multiply": lambda q, k, v, h: attention(q, k, v, h, scale=(q.shape[2] / h) ** 0.5),
    "one head of all channels": lambda q, k, v, h: attention(q, k, v, 1),
    "lie side by side": lambda *a: all_heads(*a, interleaved=True).transpose(1, 2).flatten(2),
    "as you took them apart": lambda *a: all_heads(*a).permute(0, 2, 3, 1).flatten(2),
    "swap heads and places": lambda q, k, v, h: all_heads(q, k, v, h).reshape(q.shape),
    "v does not get the gradient": lambda q, k, v, h: attention(q, k, v.detach(), h),
    r"shape \(2, 2, 5, 4\); it should be \(2, 5, 8\)": all_heads,
    r"in place.*x = x \* y makes a new": attention_in_place,
}
GEGLU = {
    "value comes first": lambda h: geglu(h.flip(2)).flip(2),
    "every other channel": lambda h: geglu(h.unflatten(2, (-1, 2)).transpose(2, 3).flatten(2)),
    "a sigmoid": lambda h: h[..., : h.shape[2] // 2] / (1 + torch.exp(-h[..., h.shape[2] // 2 :])),
    "a ReLU": lambda h: h[..., : h.shape[2] // 2] * h[..., h.shape[2] // 2 :].clamp(min=0),
    "a swish": lambda h: h.chunk(2, 2)[0] * nn.functional.silu(h.chunk(2, 2)[1]),
    "by tanh": lambda h: h.chunk(2, 2)[0] * nn.GELU("tanh")(h.chunk(2, 2)[1]),
    "only the gate": lambda h: nn.functional.gelu(h).chunk(2, 2)[0] * nn.functional.gelu(h).chunk(2, 2)[1],
    "as they are": lambda h: h.chunk(2, 2)[0] * h.chunk(2, 2)[1],
    "not added": lambda h: h.chunk(2, 2)[0] + nn.functional.gelu(h.chunk(2, 2)[1]),
    "value is missing": lambda h: nn.functional.gelu(h.chunk(2, 2)[1]),
    r"shape \(2, 3, 8\); it should be \(2, 3, 4\)": nn.functional.gelu,
    "in place.*your caller": geglu_in_place,
}
OVERLAP = {
    "heads' maps first": lambda p, token, box: sum(word_overlap(h[None], token, box) for h in p) / len(p),
    "the share alone": on_map(lambda w, box: w @ box / w.sum()),
    "not over the places": on_map(lambda w, box: w @ box / box.mean()),
    "the number of places": on_map(lambda w, box: w @ box / box.sum()),
    "no softmax over": on_map(lambda w, box: w.softmax(0) @ box / box.mean()),
    "not by the largest": on_map(lambda w, box: (w / w.max()) @ box / box.mean()),
    "inside with outside": on_map(lambda w, box: w @ box / box.sum() / (w @ (1 - box)) * (1 - box).sum()),
    "counts half": on_map(lambda w, box: w[box > 0].sum() / w.sum() / (box > 0).float().mean()),
    r"shape \(1,\); it should be \(\)": lambda *a: word_overlap(*a)[None],
}
test_a_wrong_solution_is_refused_in_words, test_what_a_learner_leaves_undone_is_refused_in_words = refusals(
    CHECKS, (ATTENTION, GEGLU, OVERLAP)
)
