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
WHOLE_LIMIT = 3 * 2**30  # bytes of activations; on a GPU, what is free
COPIES = 5  # how many of its largest activations a decoding in one piece holds at once


def fits_whole(decoder: Decoder, latent: Tensor) -> bool:
    """Whether the pictures of these latents `(B, c, h, w)` can be decoded in one piece."""
    widths, f = decoder.config.widths, decoder.config.f
    pixels = len(latent) * latent.shape[2] * latent.shape[3] * f**2
    need = COPIES * pixels * max(widths[:2]) * latent.element_size()
    limit = torch.cuda.mem_get_info(latent.device)[0] if latent.device.type == "cuda" else WHOLE_LIMIT
    return need <= limit


def decode_in_strips(decoder: Decoder, latent: Tensor, rows: int = ROWS) -> Tensor:
    """`decoder(latent)` with little memory, a picture at a time: `(B, c, h, w)` to `(B, 3, f·h, f·w)`."""
    return torch.cat([_decode_one(decoder, one, rows) for one in latent.split(1)])


def _decode_one(decoder: Decoder, latent: Tensor, rows: int) -> Tensor:
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
    var, mean = torch.var_mean(x.unflatten(1, (norm.num_groups, -1)).flatten(2).float(), dim=2, correction=0)
    each = x.shape[1] // norm.num_groups
    scale = (var + norm.eps).rsqrt().repeat_interleave(each, dim=1) * norm.weight
    shift = norm.bias - mean.repeat_interleave(each, dim=1) * scale
    scale, shift = (t.to(x.dtype)[:, :, None, None] for t in (scale, shift))
    return _conv(
        conv, lambda top, bottom: F.silu(x[:, :, top:bottom] * scale + shift, inplace=True), x.shape[2], rows
    )


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
