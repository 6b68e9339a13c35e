"""UNets of CompVis's latent-diffusion and stable-diffusion: `openaimodel.UNetModel`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_edu.checkpoint import settings_of
from ldm_edu.interop.compvis import GROUPS
from ldm_edu.interop.names import filled, refuse_others
from ldm_edu.interop.unet_names import their_name
from ldm_edu.runtime import UserError
from ldm_edu.unet import UNet, UNetConfig

FREE = (
    "in_channels out_channels model_channels attention_resolutions num_res_blocks channel_mult num_heads "
    "num_head_channels use_spatial_transformer transformer_depth context_dim num_classes use_scale_shift_norm "
    "use_linear_in_transformer image_size dropout use_checkpoint use_fp16 legacy"  # how it is run
).split()


def unet_from_compvis(params: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> UNet:
    """A UNet in float32 and evaluation mode.

    Args:
        params: `unet_config.params` of the model's YAML file. Its `attention_resolutions` are factors of halving.
        tensors: the state dict. In a diffusion model's, the UNet's begin with `model.diffusion_model.`: take that off.

    Raises:
        UserError: what a UNet here cannot be (`resblock_updown`, `n_embed`, labels that are no classes, ...), or
            tensors missing, unknown or of another shape.
    """
    with settings_of(Path("unet_config")):
        config = _our_config(params)
        return filled(UNet(config), _split(tensors, config), lambda name: their_name(name, config, diffusers=False))


def unet_to_compvis(unet: UNet) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`unet_config.params` of a YAML file and the tensors of `unet`; memory is shared but for fused q, k and v.

    Raises:
        UserError: their code has no such UNet.
    """
    c = unet.config
    if c.groups != GROUPS:
        raise UserError(f"CompVis's group norms always have {GROUPS} groups; this model's have {c.groups}.")
    if c.channel_multipliers[0] != 1:  # their last norm is as wide as model_channels
        raise UserError(f"In CompVis's UNets channel_mult begins with 1; this model's is {c.channel_multipliers}.")
    depths = {c.depth_at(level) for level in range(len(c.widths))}
    if len(depths) > 1:
        raise UserError(f"CompVis has one transformer_depth for all levels; this model has {c.transformer_depth}.")
    heads = {"num_head_channels": c.head_channels} if c.head_channels else {"num_heads": c.heads}
    transformer = {"use_spatial_transformer": True, "transformer_depth": depths.pop()}
    params = {
        "image_size": 32,  # not used
        "in_channels": c.in_channels, "out_channels": c.out_channels, "model_channels": c.channels,
        "attention_resolutions": [2**level for level in reversed(c.attention_levels)], "num_res_blocks": c.blocks,
        "channel_mult": [*c.channel_multipliers], **heads,
        **(transformer | {"context_dim": c.context_channels} if c.context_channels else {}),
        **({"num_classes": c.num_classes} if c.num_classes else {}),
        **({"use_scale_shift_norm": True} if c.scale_shift else {}),
    }  # fmt: skip
    tensors = {}
    for name, tensor in unet.state_dict().items():
        if tensor.ndim == 2 and ".project_" in name:
            tensor = tensor[:, :, None, None]
        elif tensor.ndim == 2 and ".transformer.attention." in name:
            tensor = tensor[:, :, None]
        tensors[their_name(name, c, diffusers=False)] = tensor
    return params, _fused(tensors, c)


def _our_config(params: Mapping[str, Any]) -> UNetConfig:
    transformer = bool(params.get("use_spatial_transformer"))
    refuse_others(
        params, FREE, "UNet", dims=(2,), conv_resample=(True,), resblock_updown=(False,), n_embed=(None,),
        use_new_attention_order=(False,), num_heads_upsample=(-1, params.get("num_heads", -1)),
    )  # fmt: skip
    classes, context, multipliers = params.get("num_classes"), params.get("context_dim"), tuple(params["channel_mult"])
    if not isinstance(classes, int | None):
        raise UserError(f"Labels here are classes, num_classes of them; {classes!r} is not known here.")
    if transformer != isinstance(context, int):
        raise UserError(
            f"use_spatial_transformer = {transformer} with context_dim = {context!r}: a SpatialTransformer and a "
            "context come together, and the context has one width."
        )
    size, number = params.get("num_head_channels", -1), params.get("num_heads", -1)
    if size == number == -1:
        raise UserError("Neither num_heads nor num_head_channels is set.")
    attention = params["attention_resolutions"]
    return UNetConfig(
        in_channels=params["in_channels"], out_channels=params["out_channels"], channels=params["model_channels"],
        channel_multipliers=multipliers, blocks=params["num_res_blocks"], context_channels=context,
        attention_levels=tuple(level for level in range(len(multipliers)) if 2**level in attention),
        **({"heads": number} if size == -1 else {"head_channels": size}), groups=GROUPS,
        transformer_depth=params.get("transformer_depth", 1), num_classes=classes,
        scale_shift=bool(params.get("use_scale_shift_norm")),
    )  # fmt: skip


def _heads(width: int, config: UNetConfig) -> int:
    return width // config.head_channels if config.head_channels else config.heads


def _split(tensors: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """qkv, whose rows are each head's q, k and v in turn, as three."""
    parts = {}
    for name, tensor in tensors.items():
        if ".qkv." in name:
            stem, kind = name.split(".qkv.")
            three = tensor.unflatten(0, (_heads(len(tensor) // 3, config), 3, -1)).unbind(1)
            for letter, part in zip("qkv", three, strict=True):
                parts[f"{stem}.qkv.{letter}.{kind}"] = part.flatten(0, 1)
        else:
            parts[name] = tensor
    return parts


def _fused(tensors: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    whole = {}
    for name, tensor in tensors.items():
        if ".qkv.q." in name:
            three = [tensors[name.replace(".q.", f".{letter}.")] for letter in "qkv"]
            heads = [part.unflatten(0, (_heads(len(tensor), config), -1)) for part in three]
            whole[name.replace(".qkv.q.", ".qkv.")] = torch.stack(heads, dim=1).flatten(0, 2)
        elif ".qkv." not in name:
            whole[name] = tensor
    return whole
