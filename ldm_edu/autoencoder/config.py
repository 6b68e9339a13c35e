"""What describes an autoencoder, and the paper's own first stages in those terms."""

from __future__ import annotations

from dataclasses import dataclass

from ldm_edu.layers import check_counts, check_levels
from ldm_edu.runtime import UserError


@dataclass(frozen=True)
class AutoencoderConfig:
    """The shape of an encoder and decoder; the downsampling factor is f = 2 ** (len(channel_multipliers) - 1).

    Args:
        latent_channels: c, the channels of the latent.
        channels: the width at full resolution; level i is `channels * channel_multipliers[i]` wide.
        blocks: residual blocks a level in the encoder; the decoder has one more.
        attention_levels: levels (0 is full resolution) with attention after each residual block.
        middle_attention: attention between the two residual blocks of the middle.
        groups: of every group norm; 32 in the paper.
        image_channels: 3.

    Raises:
        UserError: values that do not fit one another, such as a width that is no multiple of `groups`.
    """

    latent_channels: int = 4
    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    attention_levels: tuple[int, ...] = ()
    middle_attention: bool = True
    groups: int = 32
    image_channels: int = 3

    def __post_init__(self) -> None:
        check_levels(self)
        check_counts(self, "latent_channels", "channels", "blocks", "groups", "image_channels")
        if any(width % self.groups for width in self.widths):
            raise UserError(f"Every level's width, {self.widths}, must be a multiple of the {self.groups} groups.")

    @property
    def f(self) -> int:
        """The downsampling factor."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def widths(self) -> list[int]:
        """The width of each level, full resolution first."""
        return [self.channels * m for m in self.channel_multipliers]
