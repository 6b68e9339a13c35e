"""The time-conditional UNet εθ(z_t, t, τθ(y)) of equations 2 and 3."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_edu.layers import AttentionBlock, Downsample, ResidualBlock, Upsample
from ldm_edu.layers.attention import Context, repeated
from ldm_edu.runtime import UserError
from ldm_edu.unet.config import UNetConfig
from ldm_edu.unet.transformer import SpatialTransformer


def timestep_embedding(t: Tensor, channels: int) -> Tensor:
    """[cos, sin] of t at `channels / 2` frequencies, 10000^(-2i / channels) from i = 0 on: `(B, channels)`.

    As in the released code: cosines first, and the next frequency in the row, not the last, would be 1/10000.

    Raises:
        UserError: channels that are not even, or fewer than 2.
    """
    if channels < 2 or channels % 2:
        raise UserError(f"Half of the channels are cosines, half sines: give an even number from 2 on, not {channels}.")
    half = channels // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """The timestep as a vector four times as wide as the UNet: sinusoids, linear, swish, linear."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.linear1 = nn.Linear(channels, 4 * channels)
        self.linear2 = nn.Linear(4 * channels, 4 * channels)

    def forward(self, t: Tensor) -> Tensor:
        """Timesteps `(B,)` to `(B, 4 * channels)`."""
        embedded = timestep_embedding(t, self.channels).to(self.linear1.weight.dtype)
        return self.linear2(F.silu(self.linear1(embedded)))


class Block(nn.Module):
    """A residual block, and attention where the level has it."""

    def __init__(self, config: UNetConfig, level: int, in_channels: int) -> None:
        super().__init__()
        self.residual = _residual(config, in_channels, config.widths[level])
        self.transformer = _attention(config, level) if level in config.attention_levels else None

    def forward(self, x: Tensor, time: Tensor, context: Context) -> Tensor:
        """`x` (B, in_channels, H, W): as wide as the level, `(B, width, H, W)`."""
        x = self.residual(x, time)
        return x if self.transformer is None else self.transformer(x, context)


class DownLevel(nn.Module):
    """The blocks of one resolution on the way down, then the step to half of it."""

    def __init__(self, config: UNetConfig, level: int, in_channels: int) -> None:
        super().__init__()
        width = config.widths[level]
        inputs = [in_channels] + [width] * (config.blocks - 1)
        self.blocks = nn.ModuleList(Block(config, level, channels) for channels in inputs)
        lowest = level == len(config.widths) - 1
        self.downsample = None if lowest else Downsample(width, symmetric=True)

    def forward(self, x: Tensor, time: Tensor, context: Context) -> list[Tensor]:
        """Every output along the way, for the skip connections; the last one leads on."""
        outputs = []
        for block in self.blocks:
            x = block(x, time, context)
            outputs.append(x)
        if self.downsample is not None:
            outputs.append(self.downsample(x))
        return outputs


class UpLevel(nn.Module):
    """The blocks of one resolution on the way up, each fed its skip connection, then the step to twice of it."""

    def __init__(self, config: UNetConfig, level: int, in_channels: int, skips: list[int]) -> None:
        super().__init__()
        width = config.widths[level]
        inputs = [in_channels] + [width] * config.blocks
        self.blocks = nn.ModuleList(Block(config, level, a + b) for a, b in zip(inputs, skips, strict=True))
        self.upsample = Upsample(width) if level else None

    def forward(self, x: Tensor, skips: list[Tensor], time: Tensor, context: Context) -> Tensor:
        """Takes the skip connections that it needs from the end of `skips`."""
        for block in self.blocks:
            x = block(torch.cat([x, repeated(skips.pop(), len(x))], dim=1), time, context)
        return x if self.upsample is None else self.upsample(x)


class Middle(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        channels = config.widths[-1]
        self.residual1 = _residual(config, channels, channels)
        self.transformer = _attention(config, level=len(config.widths) - 1)
        self.residual2 = _residual(config, channels, channels)

    def forward(self, x: Tensor, time: Tensor, context: Context) -> Tensor:
        """`(B, channels, H, W)` to the same shape."""
        return self.residual2(self.transformer(self.residual1(x, time), context), time)


class UNet(nn.Module):
    """The denoiser: a latent with noise, the timestep and the condition, to a prediction of the latent's shape.

    The last convolution starts at zero, as does what each residual block and each attention adds: so a new UNet
    predicts 0, and its signal goes through unchanged but for the shortcuts.

    Raises:
        UserError: settings that do not fit one another (see `UNetConfig`).
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.time = TimeEmbedding(config.channels)
        self.label = nn.Embedding(config.num_classes, 4 * config.channels) if config.num_classes else None
        self.conv_in = nn.Conv2d(config.in_channels, config.channels, 3, padding=1)
        self.down, skips, width = nn.ModuleList(), [config.channels], config.channels
        for level in range(len(config.widths)):
            self.down.append(down := DownLevel(config, level, width))
            width = config.widths[level]
            skips += [width] * (config.blocks + (down.downsample is not None))
        self.middle = Middle(config)
        self.up = nn.ModuleList()
        for level in reversed(range(len(config.widths))):
            taken = [skips.pop() for _ in range(config.blocks + 1)]
            self.up.append(UpLevel(config, level, width, taken))
            width = config.widths[level]
        self.norm_out = nn.GroupNorm(config.groups, width, eps=1e-5)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, z: Tensor, t: Tensor, context: Context = None, labels: Tensor | None = None) -> Tensor:
        """`z` (B, in_channels, h, w), `t` and `labels` (B,), `context` (B, M, d): `(B, out_channels, h, w)`.

        h and w must be multiples of 2 ** (number of levels - 1). Labels are integers; timesteps may be floats. Which
        numbers they are is not checked (on a GPU that would mean to wait for it): `Schedule.at` refuses those outside.

        Raises:
            UserError: other shapes; a context or labels that the network has no use for, or none where it needs them.
        """
        self.check(z, t, context, labels)
        time = self.time(t) if self.label is None else self.time(t) + self.label(labels)
        h = self.conv_in(z)
        skips = [h]
        for level in self.down:
            outputs = level(h, time, context)
            skips += outputs
            h = outputs[-1]
        h = self.middle(h, time, context)
        for level in self.up:
            h = level(h, skips, time, context)
        return self.conv_out(F.silu(self.norm_out(h)))

    def check(self, z: Tensor, t: Tensor, context: Context = None, labels: Tensor | None = None) -> None:
        """The errors of `forward`, before anything is computed."""
        if z.ndim != 4 or z.shape[1] != self.config.in_channels:
            raise UserError(f"This UNet takes (B, {self.config.in_channels}, h, w), not {tuple(z.shape)}.")
        (height, width), step = z.shape[2:], 2 ** (len(self.down) - 1)
        if height % step or width % step:
            raise UserError(
                f"This UNet halves its input {len(self.down) - 1} times: height and width must be multiples of {step}, "
                f"not {height} × {width}."
            )
        wanted = {"context": self.config.context_channels, "labels": self.config.num_classes}
        for (name, width), given in zip(wanted.items(), (context, labels), strict=True):
            if (given is None) != (width is None):
                told = f"with {name}: give it {name}." if width else f"without {name}: give it none."
                raise UserError(f"This UNet was made {told}")
        numbered = {"t": t} if labels is None else {"t": t, "labels": labels}
        for name, numbers in numbered.items():
            if not isinstance(numbers, Tensor):
                raise UserError(f"{name} must be a tensor ({len(z)},), a number for each latent, not {numbers!r}.")
            if numbers.shape != z.shape[:1]:
                raise UserError(f"{name} must hold a number for each of {len(z)} latents, not {tuple(numbers.shape)}.")
        if isinstance(context, Tensor):
            batch, *_, channels = context.shape
            if context.ndim != 3 or (batch, channels) != (len(z), self.config.context_channels):
                raise UserError(
                    f"The context of this UNet is (B, M, {self.config.context_channels}), with B = {len(z)} here, "
                    f"not {tuple(context.shape)}."
                )


def _residual(config: UNetConfig, in_channels: int, out_channels: int) -> ResidualBlock:
    return ResidualBlock(
        in_channels, out_channels, time_channels=4 * config.channels, groups=config.groups, eps=1e-5,
        scale_shift=config.scale_shift, zero_out=True,
    )  # fmt: skip


def _attention(config: UNetConfig, level: int) -> SpatialTransformer | AttentionBlock:
    channels, heads = config.widths[level], config.heads_at(level)
    if config.context_channels is None:
        return AttentionBlock(channels, heads, config.groups, eps=1e-5, zero_out=True)
    return SpatialTransformer(channels, heads, config.context_channels, config.depth_at(level), config.groups)
