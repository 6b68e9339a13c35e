"""First stages of diffusers, AutoencoderKL and VQModel: config.json and tensors, without importing diffusers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ldm_edu.autoencoder import AutoencoderConfig, FirstStage, VQConfig
from ldm_edu.checkpoint import settings_of
from ldm_edu.interop.names import exported, imported, refuse_others
from ldm_edu.runtime import UserError

FREE = (
    "in_channels down_block_types up_block_types block_out_channels layers_per_block latent_channels norm_num_groups "
    "mid_block_add_attention num_vq_embeddings "
    "sample_size scaling_factor force_upcast lookup_from_codebook"  # how it is run
).split()
# Of attention, in files as old as Stable Diffusion 1's.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def first_stage_from_diffusers(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> FirstStage:
    """An `AutoencoderKL` or `VQModel` of diffusers, in float32 and evaluation mode.

    Its latents are unscaled, as all of ours are; `latent_scale(config)` is what diffusers multiplies them by.

    Args:
        config: what config.json holds. `_class_name` tells the two apart, or without it `num_vq_embeddings`.
        tensors: the state dict; the old names of attention (query, key, value, proj_attn) are known too.

    Raises:
        UserError: what a first stage here cannot be (with `vq_embed_dim` other than `latent_channels`, spatial norms, a
            shifted latent, attention in one half only, ...), or tensors missing, unknown or of another shape.
    """
    with settings_of(Path("config.json")):
        return imported(_our_config(config), with_new_names(tensors), diffusers=True)


def latent_scale(config: Mapping[str, Any]) -> float:
    """What diffusers multiplies latents by (`LatentDiffusion.latent_scale`): 0.18215 where config.json is silent."""
    return float(config.get("scaling_factor", 0.18215))


def first_stage_to_diffusers(
    model: FirstStage, scaling_factor: float = 1.0
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the tensors of the `AutoencoderKL` or `VQModel` that `model` is; memory is shared.

    Args:
        scaling_factor: that of the diffusion model on these latents, `LatentDiffusion.latent_scale`.

    Raises:
        UserError: diffusers has no such first stage.
    """
    c, tensors = model.config, exported(model, diffusers=True)
    if c.channel_multipliers[0] != 1:
        raise UserError(f"In diffusers channel_multipliers begin with 1; this model's are {c.channel_multipliers}.")
    attention = ["Attn" * (level in c.attention_levels) for level in range(len(c.widths))]
    config = {
        "_class_name": "AutoencoderKL", "in_channels": c.image_channels, "out_channels": c.image_channels,
        "down_block_types": [f"{a}DownEncoderBlock2D" for a in attention],
        "up_block_types": [f"{a}UpDecoderBlock2D" for a in reversed(attention)],
        "block_out_channels": c.widths, "layers_per_block": c.blocks, "latent_channels": c.latent_channels,
        "norm_num_groups": c.groups, "mid_block_add_attention": c.middle_attention, "scaling_factor": scaling_factor,
    }  # fmt: skip
    if isinstance(c, VQConfig):
        config |= {"_class_name": "VQModel", "num_vq_embeddings": c.codebook_size}
    return config, tensors


def load_diffusers_first_stage(folder: Path | str) -> tuple[FirstStage, float]:
    """A first stage from a folder as diffusers' `save_pretrained` writes it, and its `latent_scale`.

    Raises:
        UserError: config.json or diffusion_pytorch_model.safetensors is missing, damaged, or of no such model.
    """
    config, tensors = read_folder(folder)
    return first_stage_from_diffusers(config, tensors), latent_scale(config)


def attention_levels(config: Mapping[str, Any], what: str, prefix: str, down: str, up: str) -> tuple[int, ...]:
    """The levels whose blocks in diffusers' config have attention; `prefix` is what their names then begin with.

    Raises:
        UserError: blocks of other kinds, a way up that does not mirror the way down, or widths that do not fit ours.
    """
    widths, blocks = [*config["block_out_channels"]], [*config["down_block_types"]]
    attention = [prefix * block.startswith(prefix) for block in blocks]
    mirrored = [a + up for a in reversed(attention)]
    if len(blocks) != len(widths) or blocks != [a + down for a in attention] or [*config["up_block_types"]] != mirrored:
        raise UserError(
            f"A {what} here has a ({prefix}){down} for each of block_out_channels {widths}, and the same on the way "
            f"up, reversed; this one has down_block_types {blocks} and up_block_types {[*config['up_block_types']]}."
        )
    if any(width % widths[0] for width in widths):
        raise UserError(f"block_out_channels must be multiples of the first one, and {widths} are not.")
    return tuple(level for level, a in enumerate(attention) if a)


def with_new_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, those of attention under the names that they have now."""
    renamed = {}
    for name, tensor in tensors.items():
        new = re.sub(r"(?<=\.)(query|key|value|proj_attn)(?=\.)", lambda found: OLD_NAMES[found[0]], name)
        renamed[name if new in tensors else new] = tensor  # with both there, the old one is reported as unknown
    return renamed


def read_folder(folder: Path | str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the tensors of a model in diffusers' format, in one file without a variant.

    Raises:
        UserError: config.json or diffusion_pytorch_model.safetensors is missing or damaged.
    """
    path = Path(folder).expanduser()
    try:
        config = dict(json.loads((path / "config.json").read_text(encoding="utf-8")))
        tensors = load((path / "diffusion_pytorch_model.safetensors").read_bytes())
    except OSError as error:
        raise UserError(
            f"Cannot read {error.filename}: {error.strerror}. A model in diffusers' format is a folder (a pipeline's "
            "vae, vqvae or unet) with config.json and diffusion_pytorch_model.safetensors. Variants (.fp16) and shards "
            "(-00001-of-00002) are not read, nor pickle (.bin), as it can run code: let diffusers save the model as "
            "safetensors, without a variant and with a max_shard_size above its size."
        ) from error
    except (ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"A file in {path} is damaged: {error}. Fetch the folder again.") from error
    return config, tensors


def _our_config(config: Mapping[str, Any]) -> AutoencoderConfig:
    kind = config.get("_class_name", "VQModel" if "num_vq_embeddings" in config else "AutoencoderKL")
    if kind not in ("AutoencoderKL", "VQModel"):
        raise UserError(f"This is the configuration of a {kind!r}; a first stage is an AutoencoderKL or a VQModel.")
    refuse_others(
        {name: value for name, value in config.items() if not name.startswith("_")}, FREE, act_fn=("silu", "swish"),
        norm_type=("group",), out_channels=(config["in_channels"],), vq_embed_dim=(None, config["latent_channels"]),
        use_quant_conv=(True,), use_post_quant_conv=(True,), shift_factor=(None, 0.0), latents_mean=(None,),
        latents_std=(None,),
    )  # fmt: skip
    widths = config["block_out_channels"]
    levels = attention_levels(config, "first stage", "Attn", "DownEncoderBlock2D", "UpDecoderBlock2D")
    ours = dict(
        latent_channels=config["latent_channels"], channels=widths[0], blocks=config["layers_per_block"],
        channel_multipliers=tuple(width // widths[0] for width in widths),
        attention_levels=levels,
        middle_attention=config.get("mid_block_add_attention", True), groups=config.get("norm_num_groups", 32),
        image_channels=config["in_channels"],
    )  # fmt: skip
    if kind == "AutoencoderKL":
        return AutoencoderConfig(**ours)
    return VQConfig(**ours, codebook_size=config["num_vq_embeddings"])
