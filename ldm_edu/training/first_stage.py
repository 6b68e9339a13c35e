"""Stage one: train an autoencoder, and write its checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor, nn
from tqdm import tqdm

from ldm_edu.autoencoder import (
    AutoencoderConfig,
    AutoencoderKL,
    AutoencoderVQ,
    FirstStage,
    FirstStageObjective,
    PatchDiscriminator,
    PerceptualLoss,
    PerceptualNetwork,
    VQConfig,
    lpips_vgg,
)
from ldm_edu.runtime import UserError
from ldm_edu.training import health
from ldm_edu.training.card import model_card
from ldm_edu.training.fit import OnStep, fit
from ldm_edu.training.settings import Settings


@dataclass(frozen=True)
class FirstStageSettings(Settings):
    """Settings of a first stage. All terms of the loss are means over the picture's numbers.

    Args:
        size: the training pictures' side in pixels.
        start: a first stage of the same shape to begin with, its name or folder; by default a new one.
        kl_weight: weight of the KL term of a KL first stage.
        codebook_weight: weight of the quantiser's loss of a VQ first stage.
        restart_after: training steps after which an idle code of the codebook is moved; 0 is never.
        vq_start: the first step at which a VQ first stage quantises.
        l2_weight: weight of the squared error beside L1.
        perceptual: the perceptual loss: "ours" (the committed network), "lpips-vgg" (fetched), or "none".
        perceptual_weight: its weight.
        disc_weight: weight of the adversarial term beside its adaptive weight; 0 is no discriminator.
        disc_start: the first step of the adversarial term.
        disc_warmup: so many steps earlier the discriminator begins to learn.
        disc_channels, disc_layers: the discriminator's width and strided layers.
    """

    size: int = 64
    start: str = ""
    kl_weight: float = 1e-6
    codebook_weight: float = 1.0
    restart_after: int = 0
    vq_start: int = 0
    l2_weight: float = 0.0
    perceptual: str = "none"
    perceptual_weight: float = 1.0
    disc_weight: float = 0.0
    disc_start: int = 0
    disc_warmup: int = 0
    disc_channels: int = 32
    disc_layers: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.perceptual not in ("none", "ours", "lpips-vgg"):
            raise UserError(f"The setting perceptual is none, ours or lpips-vgg, not {self.perceptual!r}.")


def new_first_stage(config: AutoencoderConfig) -> FirstStage:
    """An untrained first stage: VQ for a `VQConfig`, else KL. Residual blocks and attention begin at nothing.

    So the network begins almost linear. (In one run each, 400 steps led to 20.3 dB on training crops so, 19.3 dB else.)
    """
    model = AutoencoderVQ(config) if isinstance(config, VQConfig) else AutoencoderKL(config)
    for name, weight in model.named_parameters():
        if ".conv2." in name or ".attention.out." in name:
            nn.init.zeros_(weight)
    if isinstance(model, AutoencoderKL):
        model.start_with_small_variance()
    return model


def objective_of(model: FirstStage, settings: FirstStageSettings) -> FirstStageObjective:
    """The objective that these settings describe, around this first stage.

    Raises:
        UserError: a perceptual loss for pictures that have not three channels.
    """
    perceptual, channels = None, model.config.image_channels
    if settings.perceptual_weight and settings.perceptual != "none":
        if channels != 3:
            raise UserError(f"The perceptual networks see 3 channels; with {channels}, set perceptual to none.")
        ours = settings.perceptual == "ours"
        perceptual = PerceptualLoss(PerceptualNetwork.load("perceptual")) if ours else lpips_vgg()
    is_vq = isinstance(model, AutoencoderVQ)
    if is_vq:
        model.quantizer.restart_after, model.quantizer.start = settings.restart_after, settings.vq_start
    return FirstStageObjective(
        model,
        regulariser_weight=settings.codebook_weight if is_vq else settings.kl_weight,
        l2_weight=settings.l2_weight,
        perceptual=perceptual,
        perceptual_weight=settings.perceptual_weight,
        discriminator=PatchDiscriminator(settings.disc_channels, settings.disc_layers, channels)
        if settings.disc_weight
        else None,
        disc_start=settings.disc_start,
        disc_weight=settings.disc_weight,
        disc_warmup=settings.disc_warmup,
    )


def train_first_stage(
    name: str,
    config: AutoencoderConfig,
    settings: FirstStageSettings,
    get_images: Callable[[int, torch.Generator], Tensor],
    about: str,
    out: Path | None,
    resume: bool = False,
    on_step: OnStep | None = None,
) -> FirstStage:
    """Train, and write `out/checkpoint`.

    Args:
        get_images: `(batch_size, generator)` to pictures `(B, 3, size, size)` in [-1, 1].
        about: what the model card says of the data and its licence.
    """
    torch.manual_seed(settings.seed)
    out = Path(out) if out else None
    model = new_first_stage(config)
    if settings.start:
        model = FirstStage.load(settings.start).train()
        if model.config != config:
            raise UserError(f"{settings.start} has another shape than {name}: {model.config}, not {config}.")

    def get_batch(generator: torch.Generator) -> Tensor:
        return get_images(settings.batch_size, generator)

    def watch(step: int, readings: dict[str, float]) -> None:
        if step % settings.save_every == 0:
            lines = [str(reading) for reading in health.check(model, readings, step / settings.steps)]
            tqdm.write("\n".join([f"step {step}", *lines]), file=sys.stderr)
        if on_step:
            on_step(step, readings)

    history = fit(objective_of(model, settings), get_batch, settings, out, resume, watch, desc=name)
    if out and PartialState().is_main_process:
        model.save(out / "checkpoint", model_card(name, about, settings, history, model), history.text())
    return model.eval()
