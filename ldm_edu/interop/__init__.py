"""Weights to and from diffusers and CompVis: renamed, 1×1 convolutions reshaped to linear layers, nothing else."""

from ldm_edu.interop.compvis import first_stage_from_compvis, first_stage_to_compvis
from ldm_edu.interop.diffusers import (
    first_stage_from_diffusers,
    first_stage_to_diffusers,
    latent_scale,
    load_diffusers_first_stage,
)

__all__ = [
    "first_stage_from_compvis",
    "first_stage_from_diffusers",
    "first_stage_to_compvis",
    "first_stage_to_diffusers",
    "latent_scale",
    "load_diffusers_first_stage",
]
