"""The shape of a UNet."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral

from ldm_edu.layers import check_counts, check_levels
from ldm_edu.runtime import UserError


@dataclass(frozen=True)
class UNetConfig:
    """The shape of a UNet; the defaults are Stable Diffusion 1's.

    Args:
        in_channels: of the latent, with whatever is concatenated to it.
        out_channels: of the prediction.
        channels: width of the first level; level i is `channels * channel_multipliers[i]` wide.
        blocks: residual blocks a level on the way down; one more on the way up.
        attention_levels: levels (0 is the latent's resolution) with attention after each residual block; the middle,
            at the lowest resolution, always has it.
        heads: of every attention, unless `head_channels` is given.
        context_channels: width of the condition's sequence, which SpatialTransformers read. None without one: then
            attention is an AttentionBlock, of the pixels to one another.
        transformer_depth: transformer blocks in each SpatialTransformer, or a number for each level; the middle has
            the last level's.
        groups: of every group norm.
        scale_shift: the timestep scales and shifts the residual blocks' norms (ADM) instead of being added.
        head_channels: width of every head (ADM): wider levels have more heads.
        num_classes: of the labels, whose embedding is added to the timestep's; None without labels.

    Raises:
        UserError: values that do not fit one another, such as heads that do not divide the width of a level.
    """

    in_channels: int = 4
    out_channels: int = 4
    channels: int = 320
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    attention_levels: tuple[int, ...] = (0, 1, 2)
    heads: int = 8
    context_channels: int | None = 768
    transformer_depth: int | tuple[int, ...] = 1
    groups: int = 32
    scale_shift: bool = False
    head_channels: int | None = None
    num_classes: int | None = None

    def __post_init__(self) -> None:
        check_levels(self)
        optional = ("context_channels", "head_channels", "num_classes")
        check_counts(self, "in_channels", "out_channels", "channels", "blocks", "heads", "groups", optional=optional)
        if isinstance(self.transformer_depth, Iterable):
            object.__setattr__(self, "transformer_depth", tuple(self.transformer_depth))
        if self.channels % 2 or any(width % self.groups for width in self.widths):
            raise UserError(
                f"channels must be even, half cosines and half sines of the timestep, and every level's width, "
                f"{self.widths}, a multiple of the {self.groups} groups."
            )
        for level in {*self.attention_levels, len(self.widths) - 1}:
            self.heads_at(level)
            if not isinstance(depth := self.depth_at(level), Integral) or depth < 1:
                raise UserError(
                    f"transformer_depth must be at least 1 at every level, an integer; it is {self.transformer_depth}."
                )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.channels * m for m in self.channel_multipliers)

    def heads_at(self, level: int) -> int:
        """How many heads each attention of a level has.

        Raises:
            UserError: the level's width is no multiple of `head_channels`, or of `heads`.
        """
        width, head = self.widths[level], self.head_channels
        if head and width % head:
            raise UserError(f"Level {level}, {width} channels wide, cannot be divided into heads of {head} channels.")
        if not head and width % self.heads:
            raise UserError(f"Level {level}, {width} channels wide, cannot be divided among {self.heads} heads.")
        return width // head if head else self.heads

    def depth_at(self, level: int) -> int:
        """How many transformer blocks each SpatialTransformer of a level has.

        Raises:
            UserError: there is not one `transformer_depth` for each level.
        """
        depth = self.transformer_depth
        if not isinstance(depth, tuple):
            return depth
        if len(depth) != len(self.widths):
            raise UserError(f"transformer_depth {depth} must have a number for each of {len(self.widths)} levels.")
        return depth[level]
