"""Stage one: train an autoencoder, and write its checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm_edu.autoencoder import AutoencoderConfig, AutoencoderKL, FirstStageObjective
from ldm_edu.training.card import model_card
from ldm_edu.training.fit import OnStep, fit
from ldm_edu.training.settings import Settings


@dataclass(frozen=True)
class FirstStageSettings(Settings):
    """Settings of a first stage.

    Args:
        size: the training pictures' side in pixels.
        kl_weight: weight of the KL term; all terms are means over the picture's numbers.
        l2_weight: weight of the squared error beside L1.
    """

    size: int = 64
    kl_weight: float = 1e-6
    l2_weight: float = 0.0


def train_first_stage(
    name: str,
    config: AutoencoderConfig,
    settings: FirstStageSettings,
    get_images: Callable[[int, torch.Generator], Tensor],
    about: str,
    out: Path | None,
    resume: bool = False,
    on_step: OnStep | None = None,
    start: AutoencoderKL | None = None,
) -> AutoencoderKL:
    """Train, and write `out/checkpoint`.

    Args:
        get_images: `(batch_size, generator)` to pictures `(B, 3, size, size)` in [-1, 1].
        about: what the model card says of the data and its licence.
        start: a first stage of the same shape to begin with; by default a new one.
    """
    torch.manual_seed(settings.seed)
    model = start or AutoencoderKL(config)
    if start is None:
        model.start_with_small_variance()
    objective = FirstStageObjective(model, settings.kl_weight, settings.l2_weight)

    def get_batch(generator: torch.Generator) -> Tensor:
        return get_images(settings.batch_size, generator)

    history = fit(objective, get_batch, settings, out, resume, on_step, desc=name)
    if out:
        model.save(out / "checkpoint", model_card(name, about, settings, history, model), history.text())
    return model.eval()
