"""Sections 3.2 and 3.3: the time-conditional UNet with cross-attention."""

from ldm_edu.unet.config import UNetConfig
from ldm_edu.unet.maps import AttentionMap, attention_maps
from ldm_edu.unet.transformer import SpatialTransformer, TransformerBlock
from ldm_edu.unet.unet import TimeEmbedding, UNet, timestep_embedding

__all__ = [
    "AttentionMap",
    "SpatialTransformer",
    "TimeEmbedding",
    "TransformerBlock",
    "UNet",
    "UNetConfig",
    "attention_maps",
    "timestep_embedding",
]
