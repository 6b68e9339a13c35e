"""Train the small network behind our perceptual distance: to name what a photograph shows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor, nn

from ldm_edu.autoencoder import PerceptualConfig, PerceptualNetwork
from ldm_edu.runtime import UserError, pick_device
from ldm_edu.training.card import model_card
from ldm_edu.training.fit import OnStep, fit
from ldm_edu.training.photographs import photographs, random_crops
from ldm_edu.training.settings import Settings


@dataclass(frozen=True)
class PerceptualSettings(Settings):
    """Settings of a perceptual network.

    Args:
        size: the training crops' side in pixels.
    """

    size: int = 96


class Classification(nn.Module):
    """Cross-entropy of a linear classifier on the network's last features, averaged over places."""

    def __init__(self, config: PerceptualConfig, classes: int) -> None:
        super().__init__()
        self.network = PerceptualNetwork(config, batch_norm=True)
        self.classifier = nn.Linear(config.widths[-1], classes)

    def forward(
        self, batch: tuple[Tensor, Tensor], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Pictures `(B, 3, H, W)` and labels `(B,)` to the loss."""
        images, labels = batch
        logits = self.classifier(self.network(images)[-1].mean(dim=(2, 3))).float()
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        return F.cross_entropy(logits, labels, label_smoothing=0.1), {"accuracy": accuracy.detach()}


def train_perceptual(
    name: str,
    config: PerceptualConfig,
    settings: PerceptualSettings,
    about: str,
    out: Path | None,
    resume: bool = False,
    on_step: OnStep | None = None,
) -> PerceptualNetwork:
    """Train, fold the batch norms into the convolutions, and write `out/checkpoint`."""
    torch.manual_seed(settings.seed)
    out = Path(out) if out else None
    (pictures, labels), device = photographs(), pick_device()
    if labels.max() == 0:
        raise UserError("There is one class of photographs only. Put those of each class into a folder of its own.")
    objective = Classification(config, int(labels.max()) + 1)

    def get_batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        images, chosen = random_crops(pictures, settings.batch_size, settings.size, generator)
        shape = (len(images), 3, 1, 1)  # brightness, contrast and tint vary, so that colour alone is no answer
        gain = 0.7 + 0.6 * torch.rand(len(images), 1, 1, 1, generator=generator)
        images = images * gain + 0.3 * torch.rand(shape, generator=generator) - 0.15
        return images.clamp(-1, 1).to(device), labels[chosen].to(device)

    history = fit(objective, get_batch, settings, out, resume, on_step, desc=name)
    network = objective.network.folded()
    if out and PartialState().is_main_process:
        network.save(out / "checkpoint", model_card(name, about, settings, history, network), history.text())
    return network
