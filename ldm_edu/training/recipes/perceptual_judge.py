"""The network behind our perceptual measurements: like `perceptual`, but nothing was ever trained against it.

What a model was trained to please, it scores well in. So the judge is another network: other widths, another seed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ldm_edu.autoencoder import PerceptualConfig, PerceptualNetwork
from ldm_edu.training.fit import OnStep
from ldm_edu.training.perceptual import PerceptualSettings, train_perceptual
from ldm_edu.training.photographs import ABOUT as DATA
from ldm_edu.training.recipes import perceptual

NAME = "perceptual-judge"
ABOUT = f"""The features in which perceptual and Fréchet distances are measured: a small VGG, trained from nothing to
name 97 kinds of photograph. No model was trained with it as a loss; `perceptual` is the one for that.

{DATA}"""

MODEL = PerceptualConfig(widths=(24, 48, 72, 96))
SETTINGS = {size: replace(settings, seed=1) for size, settings in perceptual.SETTINGS.items()}


def train(
    settings: PerceptualSettings, out: Path | None, resume: bool = False, on_step: OnStep | None = None
) -> PerceptualNetwork:
    """Train it; see `train_perceptual`."""
    return train_perceptual(NAME, MODEL, settings, ABOUT, out, resume, on_step)
