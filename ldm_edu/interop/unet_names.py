"""What a UNet's weights are called: here, by diffusers, by CompVis (`openaimodel.UNetModel`)."""

from __future__ import annotations

import re

from ldm_edu.unet import UNetConfig

# Ours, diffusers', CompVis's.
OUTSIDE = [
    ("time.linear1.", "time_embedding.linear_1.", "time_embed.0."), ("label.", "class_embedding.", "label_emb."),
    ("time.linear2.", "time_embedding.linear_2.", "time_embed.2."), ("conv_in.", "conv_in.", "input_blocks.0.0."),
    ("norm_out.", "conv_norm_out.", "out.0."), ("conv_out.", "conv_out.", "out.2."),
]  # fmt: skip
RESIDUAL = [
    ("norm1.", "norm1.", "in_layers.0."), ("conv1.", "conv1.", "in_layers.2."),
    ("norm2.", "norm2.", "out_layers.0."), ("conv2.", "conv2.", "out_layers.3."),
    ("time.", "time_emb_proj.", "emb_layers.1."), ("shortcut.", "conv_shortcut.", "skip_connection."),
]  # fmt: skip
ATTENTION = [  # CompVis has the three in one tensor, qkv, from which `compvis_unet` takes them apart
    ("attention.query.", "to_q.", "qkv.q."), ("attention.key.", "to_k.", "qkv.k."),
    ("attention.value.", "to_v.", "qkv.v."), ("attention.out.", "to_out.0.", "proj_out."),
    ("norm.", "group_norm.", "norm."),
]  # fmt: skip
TRANSFORMER = [  # both call it the same
    ("project_", "proj_"), ("blocks.", "transformer_blocks."), ("self_attention.", "attn1."),
    ("cross_attention.", "attn2."), (".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."),
    (".out.", ".to_out.0."), ("feed_forward.widen.", "ff.net.0.proj."), ("feed_forward.narrow.", "ff.net.2."),
]  # fmt: skip


def their_name(name: str, config: UNetConfig, diffusers: bool) -> str:
    """What diffusers, or else CompVis, calls our weight `name`."""
    found = re.fullmatch(r"(down|middle|up)\.(?:(\d+)\.)?(?:blocks\.(\d+)\.)?([a-z]+)[12]?\.(.+)", name)
    if not found:
        return _translated(name, OUTSIDE, diffusers)
    way, position, place, part, rest = found.groups()
    if part == "residual":
        rest = _translated(rest, RESIDUAL, diffusers)
    elif part == "transformer":
        if config.context_channels is None:
            rest = _translated(rest, ATTENTION, diffusers)
        else:
            for ours, theirs in TRANSFORMER:
                rest = rest.replace(ours, theirs)
    elif part == "downsample" and not diffusers:
        rest = rest.replace("conv.", "op.")
    if way == "middle":
        number = {"residual1": 0, "transformer": 1, "residual2": 2}[name.split(".")[1]]
        in_diffusers = ("resnets.0", "attentions.0", "resnets.1")[number]
        return f"mid_block.{in_diffusers}.{rest}" if diffusers else f"middle_block.{number}.{rest}"
    if diffusers:
        group = {"residual": "resnets", "transformer": "attentions"}.get(part, f"{way}samplers")
        return f"{way}_blocks.{position}.{group}.{place or 0}.{rest}"
    # CompVis counts through all levels. Down, each halving is an entry of its own; up, the doubling is part of its
    # level's last one. Both ways a level has blocks + 1 entries.
    entry = int(position) * (config.blocks + 1) + (config.blocks if place is None else int(place))
    if way == "down":
        return f"input_blocks.{1 + entry}.{int(part == 'transformer')}.{rest}"
    attention = len(config.widths) - 1 - int(position) in config.attention_levels
    slot = {"residual": 0, "transformer": 1, "upsample": 1 + attention}[part]
    return f"output_blocks.{entry}.{slot}.{rest}"


def _translated(name: str, names: list[tuple[str, str, str]], diffusers: bool) -> str:
    ours, *theirs = next(entry for entry in names if name.startswith(entry[0]))
    return theirs[not diffusers] + name.removeprefix(ours)
