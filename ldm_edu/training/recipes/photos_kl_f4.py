"""First stage on real photographs with the paper's whole objective: f = 4, four latent channels, KL."""

from __future__ import annotations

from pathlib import Path

from ldm_edu.autoencoder import AutoencoderConfig, FirstStage
from ldm_edu.training.first_stage import FirstStageSettings, train_first_stage
from ldm_edu.training.fit import OnStep
from ldm_edu.training.photographs import ABOUT as DATA
from ldm_edu.training.photographs import recoloured_crops

NAME = "photos-kl-f4"
ABOUT = f"""First stage (section 3.1 of the paper) for photographs: f = 4, four latent channels, KL, trained with
L1, the perceptual and the adversarial term.

{DATA}"""
CONFIG = AutoencoderConfig(latent_channels=4, channels=16, channel_multipliers=(1, 2, 5), blocks=1, groups=2)

SETTINGS = {
    "cpu": FirstStageSettings(
        steps=4000, batch_size=8, optimizer="muon", learning_rate=4e-3, ema_decay=0.997, perceptual="ours",
        disc_weight=0.3, disc_start=2000, disc_warmup=500, save_every=500,
    ),
    "gpu": FirstStageSettings(
        steps=40_000, batch_size=32, optimizer="muon", learning_rate=4e-3, ema_decay=0.9995, perceptual="ours",
        disc_weight=0.3, disc_start=20_000, disc_warmup=2000, save_every=5000,
    ),
}  # fmt: skip


def train(
    settings: FirstStageSettings, out: Path | None, resume: bool = False, on_step: OnStep | None = None
) -> FirstStage:
    """Train it; see `train_first_stage`."""
    crops = recoloured_crops(settings.size)
    return train_first_stage(NAME, CONFIG, settings, crops, ABOUT, out, resume, on_step)
