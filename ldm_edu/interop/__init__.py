"""Weights to and from diffusers and CompVis: renamed, 1×1 convolutions reshaped, fused q, k, v split, nothing else."""

from ldm_edu.interop.compvis import first_stage_from_compvis, first_stage_to_compvis
from ldm_edu.interop.compvis_unet import unet_from_compvis, unet_to_compvis
from ldm_edu.interop.diffusers import (
    first_stage_from_diffusers,
    first_stage_to_diffusers,
    latent_scale,
    load_diffusers_first_stage,
)
from ldm_edu.interop.diffusers_unet import load_diffusers_unet, unet_from_diffusers, unet_to_diffusers
from ldm_edu.interop.schedules import schedule_from_diffusers, schedule_to_diffusers

__all__ = [
    "first_stage_from_compvis",
    "first_stage_from_diffusers",
    "first_stage_to_compvis",
    "first_stage_to_diffusers",
    "latent_scale",
    "load_diffusers_first_stage",
    "load_diffusers_unet",
    "schedule_from_diffusers",
    "schedule_to_diffusers",
    "unet_from_compvis",
    "unet_from_diffusers",
    "unet_to_compvis",
    "unet_to_diffusers",
]
