"""Decoding a picture that is too large for the memory: layer by layer, each in strips of rows.

Cutting the *latent* into tiles gives seams: every tile has its own group-norm statistics and its own middle attention.
Here each layer finishes before the next begins, so statistics and attention are those of the whole picture, and a 3×3
convolution needs one row beyond its strip. The result is that of decoding in one piece, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_edu.autoencoder.encoder import Decoder
from ldm_edu.layers import ResidualBlock, Upsample

ROWS = 64
WHOLE_LIMIT = 5 * 2**29  # bytes of activations, 2.5 GiB; on a GPU, what is free
COPIES = 4  # of its largest activation, that a decoding in one piece holds at once


def fits_whole(decoder: Decoder, latent: Tensor) -> bool:
    """Whether the pictures of these latents `(B, c, h, w)` can be decoded in one piece."""
    config, device = decoder.config, latent.device
    # What a level gets is as wide as the level below it, at twice that one's resolution.
    widest = max(width / 4 ** max(level - 1, 0) for level, width in enumerate(config.widths))
    pixels = len(latent) * latent.shape[2] * latent.shape[3] * config.f**2
    limit = WHOLE_LIMIT
    if device.type == "cuda":  # free for all, and free in what torch holds already
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        limit = torch.cuda.mem_get_info(device)[0] + held
    return COPIES * pixels * widest * latent.element_size() <= limit


def decode_in_strips(decoder: Decoder, latent: Tensor, rows: int = ROWS) -> Tensor:
    """`decoder(latent)` with little memory: `(B, c, h, w)` to `(B, 3, f·h, f·w)`. No gradients: parts are in place."""
    h = decoder.middle(decoder.conv_in(latent))
    for level in decoder.up:
        for block in level.blocks:
            h = _residual(block, h, rows) if isinstance(block, ResidualBlock) else block(h)
        if isinstance(level.resample, Upsample):
            h = _upsample(level.resample, h, rows)
    return _normed_conv(decoder.norm_out, decoder.conv_out, h, rows)


def _residual(block: ResidualBlock, x: Tensor, rows: int) -> Tensor:
    h = _normed_conv(block.norm1, block.conv1, x, rows)
    h = _normed_conv(block.norm2, block.conv2, h, rows)
    for top in range(0, x.shape[2], rows):
        h[:, :, top : top + rows] += block.shortcut(x[:, :, top : top + rows])
    return h


def _upsample(layer: Upsample, x: Tensor, rows: int) -> Tensor:
    def doubled(top: int, bottom: int) -> Tensor:
        source = torch.arange(top, bottom, device=x.device) // 2
        return x[:, :, source].repeat_interleave(2, dim=3)

    return _conv(layer.conv, doubled, 2 * x.shape[2], rows)


def _normed_conv(norm: nn.GroupNorm, conv: nn.Conv2d, x: Tensor, rows: int) -> Tensor:
    """conv(swish(norm(x))), with the statistics of the whole of `x`."""
    groups = [torch.var_mean(g.float(), dim=(1, 2, 3), correction=0) for g in x.chunk(norm.num_groups, dim=1)]
    var, mean = (torch.stack(t, dim=1) for t in zip(*groups))
    each = x.shape[1] // norm.num_groups
    scale = (var + norm.eps).rsqrt().repeat_interleave(each, dim=1) * norm.weight
    shift = norm.bias - mean.repeat_interleave(each, dim=1) * scale
    scale, shift = scale[:, :, None, None], shift[:, :, None, None]

    def swished(top: int, bottom: int) -> Tensor:
        return F.silu((x[:, :, top:bottom].float() * scale + shift).to(x.dtype), inplace=True)

    return _conv(conv, swished, x.shape[2], rows)


def _conv(conv: nn.Conv2d, read: Callable[[int, int], Tensor], height: int, rows: int) -> Tensor:
    """A 3×3 convolution of a map whose rows `read(top, bottom)` makes when they are needed."""
    out = None
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        strip = read(max(top - 1, 0), min(bottom + 1, height))
        strip = F.pad(strip, (1, 1, int(top == 0), int(bottom == height)))
        piece = F.conv2d(strip, conv.weight, conv.bias)
        if out is None:
            out = piece.new_empty(*piece.shape[:2], height, piece.shape[3])
        out[:, :, top:bottom] = piece
    return out
