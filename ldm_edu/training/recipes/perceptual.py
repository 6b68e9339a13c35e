"""The network behind our perceptual loss: a small VGG that names what photographs show."""

from __future__ import annotations

from pathlib import Path

from ldm_edu.autoencoder import PerceptualConfig, PerceptualNetwork
from ldm_edu.training.fit import OnStep
from ldm_edu.training.perceptual import PerceptualSettings, train_perceptual
from ldm_edu.training.photographs import ABOUT as DATA

NAME = "perceptual"
ABOUT = f"""The features of our perceptual loss, LPIPS-style (Zhang et al., CVPR 2018): a small VGG, trained from
nothing to name 97 kinds of photograph.

{DATA}"""

MODEL = PerceptualConfig(widths=(16, 32, 64, 128))
SETTINGS = {
    "cpu": PerceptualSettings(
        steps=3000, batch_size=32, size=96, learning_rate=3e-3, ema_decay=0.99, weight_decay=0.05, save_every=500
    ),
    "gpu": PerceptualSettings(
        steps=20_000, batch_size=128, size=96, learning_rate=3e-3, ema_decay=0.99, weight_decay=0.05, save_every=2500
    ),
}  # fmt: skip


def train(
    settings: PerceptualSettings, out: Path | None, resume: bool = False, on_step: OnStep | None = None
) -> PerceptualNetwork:
    """Train it; see `train_perceptual`."""
    return train_perceptual(NAME, MODEL, settings, ABOUT, out, resume, on_step)
