"""The exercise of notebook 04 on skip connections: how wide what comes in is, block by block on the way up."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ldm_edu.exercises.grading import Answer, Mistake, grade
from ldm_edu.unet import UNet, UNetConfig


def check_skip_channels(answer: Answer) -> None:
    """Check `answer(channels, multipliers, blocks)`: the input channels of each residual block on the way up, a list.

    In the order in which they run. `channels`, `multipliers` and `blocks` are as in `UNetConfig`.
    """

    def in_numbers(rule: Answer) -> Answer:
        def run(channels: int, multipliers: tuple[int, ...], blocks: int) -> Tensor | None:
            found = rule(channels, multipliers, blocks)
            return None if found is None else torch.as_tensor(list(found))

        return run

    def built(channels: int, multipliers: tuple[int, ...], blocks: int) -> list[int]:
        config = UNetConfig(channels=channels, channel_multipliers=multipliers, blocks=blocks, attention_levels=())
        with torch.device("meta"):
            unet = UNet(config)
        return [block.residual.conv1.in_channels for level in unet.up for block in level.blocks]

    def variant(own: bool = False, first: bool = False, add: bool = False, stays: bool = False,
                fewer: int = 0) -> Answer:  # fmt: skip
        def walk(channels: int, multipliers: tuple[int, ...], blocks: int) -> Iterator[int]:
            widths = [channels * m for m in multipliers]
            skips = [channels]
            for wide in widths:
                skips += [wide] * (blocks + 1)
            skips.pop()  # the lowest level has no downsampling
            before = widths[-1]
            for wide in reversed(widths):
                for i in range(blocks + 1 - fewer):
                    skip = wide if own else skips.pop(0 if first else -1)
                    yield before + (0 if add else skip)
                    before = wide if not stays or i == blocks - fewer else before

        return in_numbers(walk)

    mistakes: list[Mistake] = [
        ("each level takes one skip connection that came from above: what the downsampling before it gave, or conv_in, "
         "which has `channels`.", variant(own=True)),
        ("you take the skip connections in the order in which they were made; the last one made is taken first.",
         variant(first=True)),
        ("a skip connection is concatenated: its channels come on top.", variant(add=True)),
        ("after the first block of a level, h is as wide as this level, no longer as wide as what came from below.",
         variant(stays=True)),
        ("on the way up a level has one block more than on the way down.", variant(fewer=1)),
    ]  # fmt: skip
    cases = [(64, (1, 2, 2), 1), (32, (1, 2, 4), 2), (320, (1, 2, 4, 4), 2), (32, (2, 4), 3)]
    grade("skip channels", in_numbers(answer), in_numbers(built), cases, mistakes)
