"""The exercises of notebook 04: the timestep's embedding, a block that starts as nothing, the widths on the way up."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ldm_edu.exercises.grading import Answer, ExerciseError, Mistake, grade, grade_values
from ldm_edu.layers import ResidualBlock
from ldm_edu.unet import UNet, UNetConfig, timestep_embedding


def check_timestep_embedding(answer: Answer) -> None:
    """Check `answer(t, channels)`: the sinusoids of timesteps `(B,)`, cosines first: `(B, channels)`."""

    def pair(angles: Tensor) -> Tensor:
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def variant(place: float = 1, factor: float = 1, less: int = 0, join: Answer = pair) -> Answer:
        def embed(t: Tensor, channels: int) -> Tensor:
            half = channels // 2
            return join(factor * t.float()[:, None] * 1e4 ** (-place * torch.arange(half) / (half - less)))

        return embed

    mistakes: list[Mistake] = [
        ("sines come first in your answer; the released code puts the cosines first.",
         variant(join=lambda a: torch.cat([a.sin(), a.cos()], dim=-1))),
        ("cosines and sines take turns in your answer; put all cosines first, then all sines.",
         variant(join=lambda a: torch.stack([a.cos(), a.sin()], dim=-1).flatten(1))),
        ("your slowest frequency is 1/10000 itself: that is DDPM's code. Divide i by the number of frequencies, not by "
         "one less.", variant(less=1)),
        ("i runs over channels / 2 frequencies: divide it by that, not by channels.", variant(place=0.5)),
        ("t goes in as it is, 0 to 999, not divided by 1000.", variant(factor=1e-3)),
        ("no 2π here: the angle is t times the frequency.", variant(factor=2 * math.pi)),
    ]  # fmt: skip
    cases = [(torch.tensor([0, 1, 4, 10]), channels) for channels in (8, 12)]
    grade_values("timestep embedding", answer, timestep_embedding, cases, mistakes)


def check_zero_output(answer: Answer) -> None:
    """Check `answer(block)`: the same `ResidualBlock`, with conv2 at zero: it starts as its shortcut and learns."""

    def measured(rule: Answer) -> Answer:
        def run(x: Tensor, time: Tensor, out_channels: int) -> Tensor | None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                fresh = ResidualBlock(x.shape[1], out_channels, time.shape[1], groups=2)
                shortcut = fresh.shortcut(x).detach()
                before = {name: weight.detach().clone() for name, weight in fresh.named_parameters()}
                block = rule(fresh)
            if block is None:
                return None
            output = block(x, time)
            if not all(weight.requires_grad for weight in block.parameters()):
                raise ExerciseError("all must still learn: only set conv2 to zero, and leave requires_grad alone.")
            last = block.conv2.weight, block.norm2.weight
            gradients = torch.autograd.grad(output.square().sum(), last, allow_unused=True)
            if any(gradient is None for gradient in gradients):
                raise ExerciseError("conv2 has no part in the output any more: leave forward alone, set conv2 to zero.")
            learns = torch.tensor([float(gradient.abs().max() > 1e-4) for gradient in gradients])
            added = (output - shortcut).detach().flatten()  # what the block adds; and whether conv2 and norm2 learn
            if learns[0] and added.abs().max() < 1e-6:
                after = dict(block.named_parameters())
                for name, weight in before.items():
                    wanted = 0 * weight if name.startswith("conv2") else weight
                    if name not in after or not torch.equal(after[name], wanted):
                        raise ExerciseError(f"look at {name}: all of conv2 should be 0, and all the rest as it was.")
            return torch.cat([added, learns])

        return run

    def zeroed(*names: str) -> Answer:
        def change(block: nn.Module) -> nn.Module:
            for name, weight in block.named_parameters():
                if name.startswith(names):
                    nn.init.zeros_(weight)
            return block

        return measured(change)

    mistakes = [
        ("the bias of conv2 is still added: set it to zero too.", zeroed("conv2.weight")),
        ("the weight of conv2 is still there: set it to zero too.", zeroed("conv2.bias")),
        ("that is the first convolution; what the block adds comes out of the last, conv2.", zeroed("conv1")),
        ("a norm at zero leaves conv2's bias in the sum; set conv2 to zero.", zeroed("norm2")),
        ("nothing reaches conv2 any more, so it cannot learn: set conv2 alone to zero.", zeroed("")),
        ("nothing reaches conv2 any more, so it cannot learn: set conv2 alone to zero.", zeroed("conv2", "norm2")),
        ("it starts as its shortcut, but conv2 has no gradient in the first step: leave the norm, set conv2 to zero.",
         zeroed("norm2", "conv2.bias")),
        ("the shortcut must stay: without it the block lets nothing through.", zeroed("conv2", "shortcut")),
        ("nothing has changed.", zeroed("none")),
    ]
    draw = torch.Generator().manual_seed(0)
    x, time = torch.randn(2, 4, 3, 3, generator=draw), torch.randn(2, 6, generator=draw)
    grade("zero output", measured(answer), zeroed("conv2"), [(x, time, 4), (x, time, 6)], mistakes)


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
