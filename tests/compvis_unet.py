"""CompVis's UNet again, from the published structure of `openaimodel`: for its names, and to compare outputs with.

Written apart from `ldm_edu`, so that a mistake there cannot be repeated here.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# unet_config.params of released models, from their YAML files.
STABLE_DIFFUSION = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "attention_resolutions": [4, 2, 1],
    "num_res_blocks": 2, "channel_mult": [1, 2, 4, 4], "num_heads": 8, "use_spatial_transformer": True,
    "transformer_depth": 1, "context_dim": 768, "use_checkpoint": True, "legacy": False,
}  # fmt: skip
CELEBA = {
    "image_size": 64, "in_channels": 3, "out_channels": 3, "model_channels": 224, "attention_resolutions": [8, 4, 2],
    "num_res_blocks": 2, "channel_mult": [1, 2, 3, 4], "num_head_channels": 32,
}  # fmt: skip


class Several(nn.Sequential):
    """Each layer takes what it needs."""

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None) -> Tensor:
        for layer in self:
            more = {Block: (time,), Spatial: (context,)}.get(type(layer), ())
            x = layer(x, *more)
        return x


class Block(nn.Module):
    def __init__(self, before: int, after: int, time: int, film: bool):
        super().__init__()
        self.film = film
        self.in_layers = nn.Sequential(nn.GroupNorm(32, before), nn.SiLU(), nn.Conv2d(before, after, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time, after * (1 + film)))
        last = nn.Conv2d(after, after, 3, padding=1)
        self.out_layers = nn.Sequential(nn.GroupNorm(32, after), nn.SiLU(), nn.Dropout(0), last)
        self.skip_connection = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h, e = self.in_layers(x), self.emb_layers(time)[..., None, None]
        if self.film:
            scale, shift = e.tensor_split(2, 1)
            h = self.out_layers[0](h) * (scale + 1) + shift
            for layer in self.out_layers[1:]:
                h = layer(h)
        else:
            h = self.out_layers(h + e)
        return self.skip_connection(x) + h


class Plain(nn.Module):
    """q, k and v fused, each head's three together."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(32, width)
        self.qkv, self.proj_out = nn.Conv1d(width, 3 * width, 1), nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c = x.shape[:2]
        size = c // self.heads
        qkv = self.qkv(self.norm(x).flatten(2)).reshape(b * self.heads, 3 * size, -1)
        q, k, v = qkv[:, :size], qkv[:, size : 2 * size], qkv[:, 2 * size :]
        weights = torch.einsum("bct,bcs->bts", q, k).div(math.sqrt(size)).softmax(-1)
        return x + self.proj_out(torch.einsum("bts,bcs->bct", weights, v).reshape(b, c, -1)).view_as(x)


class Cross(nn.Module):
    def __init__(self, width: int, heads: int, source: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(source, width, bias=False) for _ in range(2))
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(2, (self.heads, -1)) for t in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        weights = torch.einsum("bihd,bjhd->bhij", q, k).div(math.sqrt(q.shape[-1])).softmax(-1)
        return self.to_out(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))


class Gate(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, -1)
        return value * F.gelu(gate)


class Basic(nn.Module):
    def __init__(self, width: int, heads: int, context: int):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1, self.attn2 = Cross(width, heads, width), Cross(width, heads, context)
        self.ff = nn.Module()
        self.ff.net = nn.Sequential(Gate(width), nn.Dropout(0), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(h := self.norm1(x), h)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff.net(self.norm3(x))


class Spatial(nn.Module):
    def __init__(self, width: int, heads: int, context: int, depth: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.proj_in, self.proj_out = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList(Basic(width, heads, context) for _ in range(depth))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Down(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Up(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class CompVisUNet(nn.Module):
    """`openaimodel.UNetModel(**p)`, of the settings that released models set."""

    def __init__(self, p: dict):
        super().__init__()
        base, depth = p["model_channels"], p.get("transformer_depth", 1)
        wide, factor, width = 4 * base, 1, base
        self.base = base
        self.time_embed = nn.Sequential(nn.Linear(base, wide), nn.SiLU(), nn.Linear(wide, wide))
        if p.get("num_classes"):
            self.label_emb = nn.Embedding(p["num_classes"], wide)

        def block(before: int, after: int) -> Block:
            return Block(before, after, wide, p.get("use_scale_shift_norm", False))

        def attention(width: int) -> nn.Module:
            heads = width // p["num_head_channels"] if "num_head_channels" in p else p["num_heads"]
            plain = not p.get("use_spatial_transformer")
            return Plain(width, heads) if plain else Spatial(width, heads, p["context_dim"], depth)

        entries, kept = [Several(nn.Conv2d(p["in_channels"], base, 3, padding=1))], [base]
        for level, times in enumerate(p["channel_mult"]):
            for _ in range(p["num_res_blocks"]):
                entry, width = [block(width, base * times)], base * times
                entries.append(Several(*entry, *([attention(width)] if factor in p["attention_resolutions"] else [])))
                kept.append(width)
            if level < len(p["channel_mult"]) - 1:
                entries.append(Several(Down(width)))
                kept.append(width)
                factor *= 2
        self.input_blocks = nn.ModuleList(entries)
        self.middle_block = Several(block(width, width), attention(width), block(width, width))
        entries = []
        for level, times in reversed([*enumerate(p["channel_mult"])]):
            for i in range(p["num_res_blocks"] + 1):
                entry, width = [block(width + kept.pop(), base * times)], base * times
                if factor in p["attention_resolutions"]:
                    entry.append(attention(width))
                if level and i == p["num_res_blocks"]:
                    entry.append(Up(width))
                    factor //= 2
                entries.append(Several(*entry))
        self.output_blocks = nn.ModuleList(entries)
        last = nn.Conv2d(width, p["out_channels"], 3, padding=1)
        self.out = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), last)

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        half = self.base // 2
        angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(half).float() / half)
        time = self.time_embed(torch.cat([angles.cos(), angles.sin()], 1).to(x.dtype))
        if labels is not None:
            time = time + self.label_emb(labels)
        kept = []
        for entry in self.input_blocks:
            x = entry(x, time, context)
            kept.append(x)
        x = self.middle_block(x, time, context)
        for entry in self.output_blocks:
            x = entry(torch.cat([x, kept.pop()], 1), time, context)
        return self.out(x)
