"""UNets of diffusers, UNet2DConditionModel and UNet2DModel: config.json and tensors, without importing diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_edu.checkpoint import settings_of
from ldm_edu.interop.diffusers import attention_levels, read_folder, with_new_names
from ldm_edu.interop.names import filled, refuse_others
from ldm_edu.interop.unet_names import their_name
from ldm_edu.runtime import UserError
from ldm_edu.unet import UNet, UNetConfig

FREE = (
    "in_channels out_channels block_out_channels down_block_types up_block_types layers_per_block cross_attention_dim "
    "transformer_layers_per_block attention_head_dim norm_num_groups use_linear_projection num_class_embeds "
    "sample_size dropout upcast_attention num_train_timesteps addition_embed_type_num_heads"  # how it is run
).split()
# What these settings must be: other values are other networks, which we do not have.
ONLY = dict.fromkeys(
    "reverse_transformer_layers_per_block encoder_hid_dim encoder_hid_dim_type num_attention_heads class_embed_type "
    "addition_embed_type addition_time_embed_dim time_embedding_dim time_embedding_act_fn timestep_post_act "
    "time_cond_proj_dim projection_class_embeddings_input_dim cross_attention_norm".split(),
    (None,),
) | {
    "resnet_time_scale_shift": ("default", "scale_shift"), "act_fn": ("silu", "swish"), "norm_eps": (1e-5,),
    "flip_sin_to_cos": (True,), "freq_shift": (0,), "center_input_sample": (False,), "downsample_padding": (1,),
    "time_embedding_type": ("positional",), "attention_type": ("default",), "conv_in_kernel": (3,),
    "conv_out_kernel": (3,), "only_cross_attention": (False,), "mid_block_only_cross_attention": (None, False),
    "dual_cross_attention": (False,), "mid_block_scale_factor": (1,), "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,), "class_embeddings_concat": (False,), "add_attention": (True,),
    "downsample_type": ("conv",), "upsample_type": ("conv",),
}  # fmt: skip
PREFIX = {"UNet2DConditionModel": "CrossAttn", "UNet2DModel": "Attn"}
MIDDLE = {"UNet2DConditionModel": "UNetMidBlock2DCrossAttn", "UNet2DModel": "UNetMidBlock2D"}


def unet_from_diffusers(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> UNet:
    """A `UNet2DConditionModel`, or without a context a `UNet2DModel`, in float32 and evaluation mode.

    Args:
        config: what config.json holds. `_class_name` tells the two apart, or without it `cross_attention_dim`.
        tensors: the state dict. Projections may be linear or 1×1 convolutions (`use_linear_projection`).

    Raises:
        UserError: what a UNet here cannot be (with other embeddings beside the timestep's and the class's, other
            blocks, no attention in the middle, ...), or tensors missing, unknown or of another shape.
    """
    with settings_of(Path("config.json")):
        ours = _our_config(config)
        return filled(UNet(ours), with_new_names(tensors), lambda name: their_name(name, ours, diffusers=True))


def unet_to_diffusers(unet: UNet, linear_projection: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the tensors of the `UNet2DConditionModel` or `UNet2DModel` that `unet` is; memory is shared.

    Args:
        linear_projection: the projections around transformers as linear layers (Stable Diffusion 2) instead of 1×1
            convolutions (Stable Diffusion 1). To us they are the same.

    Raises:
        UserError: diffusers has no such UNet.
    """
    c = unet.config
    if c.channel_multipliers[0] != 1:
        raise UserError(f"In diffusers channel_multipliers begin with 1; this model's are {c.channel_multipliers}.")
    kind = "UNet2DModel" if c.context_channels is None else "UNet2DConditionModel"
    attention = [PREFIX[kind] * (level in c.attention_levels) for level in range(len(c.widths))]
    config = {
        "_class_name": kind, "in_channels": c.in_channels, "out_channels": c.out_channels,
        "down_block_types": [f"{a}DownBlock2D" for a in attention], "block_out_channels": [*c.widths],
        "up_block_types": [f"{a}UpBlock2D" for a in reversed(attention)], "layers_per_block": c.blocks,
        "mid_block_type": MIDDLE[kind], "norm_num_groups": c.groups, "num_class_embeds": c.num_classes,
        "resnet_time_scale_shift": "scale_shift" if c.scale_shift else "default",
    }  # fmt: skip
    if kind == "UNet2DModel":
        sizes = {c.widths[level] // c.heads_at(level) for level in _attending(c.attention_levels, c.widths)}
        one = c.heads == 1 and not c.head_channels
        if len(sizes) > 1 and not one:
            raise UserError(f"In a UNet2DModel all heads are equally wide; this model's are {sorted(sizes)} wide.")
        config |= {"attention_head_dim": None if one else sizes.pop(), "attn_norm_num_groups": c.groups}
    else:
        # attention_head_dim is the *number* of heads in a UNet2DConditionModel, whatever its name says.
        heads = [width // c.head_channels or 1 for width in c.widths] if c.head_channels else c.heads
        depth = [*c.transformer_depth] if isinstance(c.transformer_depth, tuple) else c.transformer_depth
        config |= {
            "cross_attention_dim": c.context_channels, "attention_head_dim": heads,
            "transformer_layers_per_block": depth, "use_linear_projection": linear_projection,
        }  # fmt: skip
    tensors = {}
    for name, tensor in unet.state_dict().items():
        convolution = ".project_" in name and tensor.ndim == 2 and not linear_projection
        tensors[their_name(name, c, diffusers=True)] = tensor[:, :, None, None] if convolution else tensor
    return config, tensors


def load_diffusers_unet(folder: Path | str) -> UNet:
    """A UNet from a folder as diffusers' `save_pretrained` writes it.

    Raises:
        UserError: config.json or diffusion_pytorch_model.safetensors is missing, damaged, or of no such model.
    """
    return unet_from_diffusers(*read_folder(folder))


def _our_config(config: Mapping[str, Any]) -> UNetConfig:
    kind = config.get("_class_name", "UNet2DConditionModel" if "cross_attention_dim" in config else "UNet2DModel")
    if kind not in PREFIX:
        raise UserError(f"This is the configuration of a {kind!r}; a UNet is a {' or a '.join(PREFIX)}.")
    groups, scale_shift = config.get("norm_num_groups", 32), config.get("resnet_time_scale_shift") == "scale_shift"
    if kind == "UNet2DModel":  # with scale and shift, its middle attention has a norm only if this is given
        config = {"attn_norm_num_groups": None, **config}
    refuse_others(
        {name: value for name, value in config.items() if not name.startswith("_")}, FREE, "UNet", **ONLY,
        mid_block_type=(MIDDLE[kind],), attn_norm_num_groups=(groups,) if scale_shift else (None, groups),
    )  # fmt: skip
    widths = config["block_out_channels"]
    levels = attention_levels(config, "UNet", PREFIX[kind], "DownBlock2D", "UpBlock2D")
    ours: dict[str, Any] = {"context_channels": None}
    if kind == "UNet2DConditionModel":
        ours = {
            "context_channels": _same("cross_attention_dim", config.get("cross_attention_dim", 1280)),
            "transformer_depth": config.get("transformer_layers_per_block", 1),
            **_heads(config.get("attention_head_dim", 8), widths, levels),
        }
    elif config.get("attention_head_dim", 8) is None:
        ours["heads"] = 1
    else:
        ours["head_channels"] = config.get("attention_head_dim", 8)
    return UNetConfig(
        in_channels=config["in_channels"], out_channels=config["out_channels"], channels=widths[0],
        channel_multipliers=tuple(width // widths[0] for width in widths), attention_levels=levels, groups=groups,
        blocks=_same("layers_per_block", config.get("layers_per_block", 2)), scale_shift=scale_shift,
        num_classes=config.get("num_class_embeds"), **ours,
    )  # fmt: skip


def _attending(levels: tuple[int, ...], widths: tuple[int, ...] | list[int]) -> set[int]:
    return {*levels, len(widths) - 1}  # the middle has attention at the last level's width


def _same(name: str, value: int | list[int]) -> int:
    if isinstance(value, int):
        return value
    if len({*value}) > 1:
        raise UserError(f"A UNet here has one {name} for all levels, not {[*value]}.")
    return value[0]


def _heads(given: int | list[int], widths: list[int], levels: tuple[int, ...]) -> dict[str, int]:
    heads = [given] * len(widths) if isinstance(given, int) else [*given]
    places = _attending(levels, widths)
    if len({heads[level] for level in places}) == 1:
        return {"heads": heads[-1]}
    sizes = {widths[level] / heads[level] for level in places}
    if len(sizes) == 1 and (size := sizes.pop()) == int(size):
        return {"head_channels": int(size)}
    raise UserError(
        f"A UNet here has one number of heads, or heads of one width; attention_head_dim {heads} with "
        f"block_out_channels {widths} gives neither."
    )
