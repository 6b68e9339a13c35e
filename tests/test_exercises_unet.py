"""The checks of the exercises on the UNet: each takes the solution, and names the mistake of a wrong one."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from graded import refusals
from torch import Tensor, nn

from ldm_edu.exercises.unet import check_skip_channels, check_timestep_embedding, check_zero_output
from ldm_edu.layers import ResidualBlock

CHECKS = {
    check_timestep_embedding: "timestep embedding",
    check_zero_output: "zero output",
    check_skip_channels: "skip channels",
}


# The right solutions, written as a learner would: with nothing of the package.


def angles(t: Tensor, channels: int) -> Tensor:
    return torch.outer(t.float(), torch.tensor([10_000 ** (-2 * i / channels) for i in range(channels // 2)]))


def embedding(t: Tensor, channels: int) -> Tensor:
    return torch.hstack([torch.cos(angles(t, channels)), torch.sin(angles(t, channels))])


def both(t: Tensor, place: Tensor) -> Tensor:
    return torch.cat([f(t[:, None] * torch.exp(-math.log(1e4) * place)) for f in (torch.cos, torch.sin)], 1)


def zeroed(block: nn.Module, *names: str) -> nn.Module:
    for name in names:
        block.get_parameter(name).data.fill_(0)
    return block


def last(block: nn.Module) -> nn.Module:
    return zeroed(block, "conv2.weight", "conv2.bias")


def frozen(block: nn.Module) -> nn.Module:
    return last(block).requires_grad_(False)


def everything(block: nn.Module) -> nn.Module:
    return zeroed(block, *dict(block.named_parameters()))


def almost(block: nn.Module) -> nn.Module:
    nn.init.normal_(last(block).conv2.weight, std=1e-9)
    return block


def another(block: nn.Module) -> nn.Module:
    """New weights, and a shortcut that is the old one's."""
    new = ResidualBlock(block.conv1.in_channels, block.conv1.out_channels, 6, groups=2, zero_out=True)
    new.shortcut = block.shortcut
    return new


def shortcut_alone(block: nn.Module) -> nn.Module:
    block.forward = lambda x, time: block.shortcut(x)
    return block


def without_no_grad(block: nn.Module) -> nn.Module:
    block.conv2.weight *= 0
    return block


def no_shortcut(block: nn.Module) -> nn.Module:
    return zeroed(last(block), *(n for n, _ in block.named_parameters() if "shortcut" in n))


def made(channels: int, multipliers: tuple[int, ...], blocks: int) -> list[int]:
    """The widths of all skip connections, in the order in which they are made, as a learner would count them."""
    widths = [channels]
    for level, m in enumerate(multipliers):
        widths.extend([channels * m] * blocks)
        if level + 1 < len(multipliers):
            widths.append(channels * m)
    return widths


def solution(channels: int, multipliers: tuple[int, ...], blocks: int) -> list[int]:
    skips, h, found = made(channels, multipliers, blocks), channels * multipliers[-1], []
    for m in multipliers[::-1]:
        for _ in range(blocks + 1):
            found.append(h + skips.pop())
            h = channels * m
    return found


def same_level(channels: int, multipliers: tuple[int, ...], blocks: int) -> list[int]:
    found, h = [], channels * multipliers[-1]
    for m in multipliers[::-1]:
        for _ in range(blocks + 1):
            found.append(h + channels * m)
            h = channels * m
    return found


def oldest_first(channels: int, multipliers: tuple[int, ...], blocks: int) -> list[int]:
    skips = made(channels, multipliers, blocks)
    h = [channels * m for m in multipliers[::-1] for _ in range(blocks + 1)]
    return [a + b for a, b in zip([h[0], *h[:-1]], skips, strict=True)]


def added(channels: int, multipliers: tuple[int, ...], blocks: int) -> list[int]:
    h = [channels * m for m in multipliers[::-1] for _ in range(blocks + 1)]
    return [h[0], *h[:-1]]


def never_narrower(channels: int, multipliers: tuple[int, ...], blocks: int) -> list[int]:
    skips, h, found = made(channels, multipliers, blocks), channels * multipliers[-1], []
    for m in multipliers[::-1]:
        found += [h + skips.pop() for _ in range(blocks + 1)]
        h = channels * m
    return found


def as_many_as_down(channels: int, multipliers: tuple[int, ...], blocks: int) -> list[int]:
    skips, h, found = made(channels, multipliers, blocks), channels * multipliers[-1], []
    for m in multipliers[::-1]:
        for _ in range(blocks):
            found.append(h + skips.pop())
            h = channels * m
    return found


def conv_in_as_wide_as_the_first_level(channels: int, multipliers: tuple[int, ...], blocks: int) -> list[int]:
    found = solution(channels, multipliers, blocks)
    return [*found[:-1], found[-1] + channels * (multipliers[0] - 1)]


@pytest.mark.parametrize(
    "check, answer",
    [
        (check_timestep_embedding, embedding), (check_zero_output, last), (check_skip_channels, solution),
        (check_skip_channels, lambda *a: tuple(solution(*a))),
        (check_timestep_embedding, lambda t, c: embedding(t, c).numpy()),
        (check_timestep_embedding, lambda t, c: embedding(t, c).tolist()),
        (check_timestep_embedding, lambda t, c: embedding(t, c) * nn.Parameter(torch.ones(c))),  # learned frequencies
        (check_zero_output, lambda block: last(copy.deepcopy(block))),
    ],
)  # fmt: skip
def test_a_right_solution_passes(check: Callable, answer: Callable, capsys: pytest.CaptureFixture):
    assert check(answer) is None
    assert capsys.readouterr().out == f"ok: {CHECKS[check]}\n"


EMBEDDING = {
    "sines come first": lambda t, c: torch.hstack([angles(t, c).sin(), angles(t, c).cos()]),
    "take turns": lambda t, c: torch.stack([angles(t, c).cos(), angles(t, c).sin()], 2).flatten(1),
    "one less": lambda t, c: both(t, torch.arange(c // 2) / (c // 2 - 1)),
    "not by channels": lambda t, c: both(t, torch.arange(c // 2) / c),
    "not divided by 1000": lambda t, c: embedding(t / 1000, c),
    "no 2π": lambda t, c: embedding(2 * math.pi * t, c),
    r"for channels = 8 is nan; it should be": lambda t, c: embedding(t, c) * math.nan,
    r"shape \(4, 4\); it should be \(4, 8\)": angles,
}  # fmt: skip
ZERO = {
    "the bias of conv2": lambda block: zeroed(block, "conv2.weight"),
    "the weight of conv2": lambda block: zeroed(block, "conv2.bias"),
    "first convolution": lambda block: zeroed(block, "conv1.weight", "conv1.bias"),
    "a norm at zero": lambda block: zeroed(block, "norm2.weight", "norm2.bias"),
    "reaches conv2 any more": everything,
    "nothing reaches conv2": lambda block: zeroed(last(block), "norm2.weight", "norm2.bias"),
    "no gradient in the first step": lambda block: zeroed(block, "norm2.weight", "norm2.bias", "conv2.bias"),
    "shortcut must stay": no_shortcut,
    "nothing has changed": lambda block: block,
    "must still learn": frozen,
    "at time.weight: all of conv2 should be 0, and all the rest as it": lambda b: zeroed(last(b), "time.weight"),
    "at conv1.bias": lambda block: zeroed(last(block), "conv1.bias"),
    "at norm1.weight": lambda block: zeroed(last(block), "norm1.weight", "norm1.bias"),
    "at conv1.weight": another,
    "at conv2.weight": almost,
    "conv2 has no part in the output": shortcut_alone,
    "under torch.no_grad": without_no_grad,
}
SKIPS = {
    "came from above": same_level,
    "the last one made is taken first": oldest_first,
    "concatenated": added,
    "no longer as wide": never_narrower,
    "one block more": as_many_as_down,
    r"shape \(4,\); it should be \(6,\)": lambda *a: solution(*a)[2:],
    "is 128; it should be 256": lambda *a: solution(*a)[::-1],
    "is 128; it should be 96": conv_in_as_wide_as_the_first_level,
    "IndexError": lambda c, m, b: made(c, m, b)[99],
}
test_a_wrong_solution_is_refused_in_words, test_what_a_learner_leaves_undone_is_refused_in_words = refusals(
    CHECKS, (EMBEDDING, ZERO, SKIPS)
)
