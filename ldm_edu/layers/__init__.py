"""Blocks that the autoencoder and the UNet share."""

from ldm_edu.layers.attention import Attention, AttentionBlock
from ldm_edu.layers.levels import check_counts, check_levels
from ldm_edu.layers.resample import Downsample, Upsample
from ldm_edu.layers.residual import ResidualBlock

__all__ = ["Attention", "AttentionBlock", "Downsample", "ResidualBlock", "Upsample", "check_counts", "check_levels"]
