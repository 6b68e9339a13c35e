"""First stages of CompVis's latent-diffusion and taming-transformers, AutoencoderKL and VQModel."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_edu.autoencoder import AutoencoderConfig, FirstStage, VQConfig
from ldm_edu.checkpoint import settings_of
from ldm_edu.interop.names import exported, imported, refuse_others
from ldm_edu.runtime import UserError

FREE = "z_channels resolution in_channels ch ch_mult num_res_blocks attn_resolutions dropout".split()
GROUPS = 32  # of every group norm; their code has no setting for it


def first_stage_from_compvis(
    ddconfig: Mapping[str, Any], tensors: Mapping[str, Tensor], embed_dim: int, n_embed: int | None = None
) -> FirstStage:
    """An `AutoencoderKL`, or with `n_embed` a `VQModel`, in float32 and evaluation mode.

    Args:
        ddconfig, embed_dim, n_embed: from `model.params` of the model's YAML file.
        tensors: the state dict. Weights of the loss and the running averages (`loss.*`, `model_ema.*`) are left out.
            In a diffusion model's, the first stage's begin with `first_stage_model.`: take that off.

    Raises:
        UserError: what a first stage here cannot be (with `embed_dim` other than `z_channels`, linear attention,
            resampling without a convolution, ...), or tensors missing, unknown or of another shape.
    """
    with settings_of(Path("ddconfig")):
        refuse_others(
            {"double_z": True, **ddconfig, "embed_dim": embed_dim}, FREE, embed_dim=(ddconfig["z_channels"],),
            double_z=(n_embed is None,), out_ch=(ddconfig["in_channels"],), resamp_with_conv=(True,),
            attn_type=("vanilla", "vanilla-xformers", "none"), use_linear_attn=(False,), give_pre_end=(False,),
            tanh_out=(False,),
        )  # fmt: skip
        attention, multipliers = ddconfig.get("attn_type") != "none", tuple(ddconfig["ch_mult"])
        levels = [i for i in range(len(multipliers)) if ddconfig["resolution"] // 2**i in ddconfig["attn_resolutions"]]
        ours = dict(
            latent_channels=embed_dim, channels=ddconfig["ch"], channel_multipliers=multipliers,
            blocks=ddconfig["num_res_blocks"], attention_levels=tuple(levels) if attention else (),
            middle_attention=attention, groups=GROUPS, image_channels=ddconfig["in_channels"],
        )  # fmt: skip
        config = AutoencoderConfig(**ours) if n_embed is None else VQConfig(**ours, codebook_size=n_embed)
        kept = {n: t for n, t in tensors.items() if not n.startswith(("loss.", "model_ema."))}
        return imported(config, kept, diffusers=False)


def first_stage_to_compvis(model: FirstStage) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`model.params` of a YAML file (embed_dim, n_embed, ddconfig) and the tensors of `model`; memory is shared.

    `first_stage_from_compvis(tensors=tensors, **params)` leads back.

    Raises:
        UserError: their code has no such first stage.
    """
    c, tensors = model.config, exported(model, diffusers=False)
    if c.groups != GROUPS:
        raise UserError(f"CompVis's group norms always have {GROUPS} groups; this model's have {c.groups}.")
    if c.attention_levels and not c.middle_attention:
        raise UserError("CompVis's first stages have no attention at a level without any in the middle.")
    resolution = max(256, c.f)  # it only serves to say which levels have attention
    ddconfig = {
        "double_z": not isinstance(c, VQConfig), "z_channels": c.latent_channels, "resolution": resolution,
        "in_channels": c.image_channels, "out_ch": c.image_channels, "ch": c.channels,
        "ch_mult": list(c.channel_multipliers), "num_res_blocks": c.blocks, "dropout": 0.0,
        "attn_resolutions": [resolution // 2**level for level in c.attention_levels],
        "attn_type": "vanilla" if c.middle_attention else "none",
    }  # fmt: skip
    codebook = {"n_embed": c.codebook_size} if isinstance(c, VQConfig) else {}
    return {"embed_dim": c.latent_channels, **codebook, "ddconfig": ddconfig}, tensors
