"""The check of the exercise on skip connections: it takes the solution, and names the mistake of a wrong one."""

from collections.abc import Callable

import pytest
from graded import refusals

from ldm_edu.exercises.unet import check_skip_channels

NAME = "skip channels"


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


@pytest.mark.parametrize("answer", [solution, lambda *a: tuple(solution(*a))])
def test_a_right_solution_passes(answer: Callable, capsys: pytest.CaptureFixture):
    assert check_skip_channels(answer) is None
    assert capsys.readouterr().out == f"ok: {NAME}\n"


WRONG = {
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
    {check_skip_channels: NAME}, [WRONG]
)
