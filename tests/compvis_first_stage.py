"""CompVis's first stages again, from their published structure: for their names, and to compare outputs with.

Written apart from `ldm_edu`, so that a mistake there cannot be repeated here.
"""

import torch.nn.functional as F
from torch import Tensor, nn

# Of the released first stages: embed_dim, n_embed, ch_mult, attn_resolutions.
RELEASED = {
    "kl-f4": (3, None, (1, 2, 4), ()),
    "kl-f8": (4, None, (1, 2, 4, 4), ()),
    "kl-f16": (16, None, (1, 1, 2, 2, 4), (16,)),
    "kl-f32": (64, None, (1, 1, 2, 2, 4, 4), (16, 8)),
    "vq-f4": (3, 8192, (1, 2, 4), ()),
    "vq-f4-noattn": (3, 8192, (1, 2, 4), ()),
    "vq-f8": (4, 16384, (1, 2, 2, 4), (32,)),
    "vq-f16": (8, 16384, (1, 1, 2, 2, 4), (16,)),
}


def released(name: str) -> dict:
    """embed_dim, n_embed and ddconfig as the YAML files have them."""
    embed_dim, n_embed, ch_mult, attention = RELEASED[name]
    ddconfig = {
        "double_z": n_embed is None, "z_channels": embed_dim, "resolution": 256, "in_channels": 3, "out_ch": 3,
        "ch": 128, "ch_mult": [*ch_mult], "num_res_blocks": 2, "attn_resolutions": [*attention], "dropout": 0.0,
    }  # fmt: skip
    if name.endswith("noattn"):
        ddconfig["attn_type"] = "none"
    return {"embed_dim": embed_dim, "n_embed": n_embed, "ddconfig": ddconfig}


def normed(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class Block(nn.Module):
    def __init__(self, before: int, after: int):
        super().__init__()
        self.norm1, self.conv1 = normed(before), nn.Conv2d(before, after, 3, padding=1)
        self.norm2, self.conv2 = normed(after), nn.Conv2d(after, after, 3, padding=1)
        if before != after:
            self.nin_shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm = normed(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        weights = (q.transpose(1, 2) @ k / x.shape[1] ** 0.5).softmax(-1)
        return x + self.proj_out((v @ weights.transpose(1, 2)).view_as(x))


class Resampling(nn.Module):
    def __init__(self, channels: int, up: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if up else nn.Conv2d(channels, channels, 3, stride=2)
        self.up = up

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2) if self.up else F.pad(x, (0, 1, 0, 1)))


class Half(nn.Module):
    """The encoder, or the decoder with `up`."""

    def __init__(self, d: dict, up: bool):
        super().__init__()
        self.is_up, widths = up, [d["ch"] * m for m in d["ch_mult"]]
        some = d.get("attn_type", "vanilla") != "none"
        ends = [d["z_channels"], widths[-1], d["out_ch"]] if up else [d["in_channels"], d["ch"], 0]
        self.conv_in, width = nn.Conv2d(ends[0], ends[1], 3, padding=1), ends[1]
        levels = nn.ModuleList(nn.Module() for _ in widths)
        for i in range(len(widths))[:: -1 if up else 1]:
            shape = [width] + [widths[i]] * (d["num_res_blocks"] + up)
            levels[i].block = nn.ModuleList(Block(a, b) for a, b in zip(shape, shape[1:]))
            here = some and d["resolution"] >> i in d["attn_resolutions"]
            levels[i].attn = nn.ModuleList(Attention(widths[i]) for _ in shape[1:] if here)
            if up and i > 0:
                levels[i].upsample = Resampling(widths[i], up=True)
            if not up and i < len(widths) - 1:
                levels[i].downsample = Resampling(widths[i], up=False)
            width = widths[i]
        setattr(self, "up" if up else "down", levels)
        self.mid = nn.Module()
        self.mid.block_1, self.mid.block_2 = (Block(widths[-1], widths[-1]) for _ in range(2))
        self.mid.attn_1 = Attention(widths[-1]) if some else nn.Identity()
        self.norm_out = normed(width)
        self.conv_out = nn.Conv2d(width, ends[2] or d["z_channels"] * (1 + d["double_z"]), 3, padding=1)

    def middle(self, h: Tensor) -> Tensor:
        return self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        if self.is_up:
            h = self.middle(h)
        for level in reversed(self.up) if self.is_up else self.down:
            for b, block in enumerate(level.block):
                h = block(h)
                if len(level.attn):
                    h = level.attn[b](h)
            for name in ("downsample", "upsample"):
                h = getattr(level, name, nn.Identity())(h)
        if not self.is_up:
            h = self.middle(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class CompVis(nn.Module):
    """Encoder, codebook where there is one, decoder, and the two 1×1 convolutions."""

    def __init__(self, embed_dim: int, ddconfig: dict, n_embed: int | None = None):
        super().__init__()
        self.encoder, self.decoder = Half(ddconfig, up=False), Half(ddconfig, up=True)
        twice = 1 + ddconfig["double_z"]
        self.quant_conv = nn.Conv2d(twice * ddconfig["z_channels"], twice * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        if n_embed:
            self.quantize = nn.Module()
            self.quantize.embedding = nn.Embedding(n_embed, embed_dim)

    def encode(self, images: Tensor) -> Tensor:
        """Moments, or the latent before quantisation."""
        return self.quant_conv(self.encoder(images))

    def decode(self, latent: Tensor) -> Tensor:
        """The picture; a VQ latent has been quantised."""
        return self.decoder(self.post_quant_conv(latent))
