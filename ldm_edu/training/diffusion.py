"""Stage two: train a UNet and its τθ on latents that were computed once, and write the checkpoint."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm_edu.autoencoder import FirstStage
from ldm_edu.checkpoint import fingerprint, to_json
from ldm_edu.diffusion import training_target
from ldm_edu.pipeline import LatentDiffusion
from ldm_edu.runtime import UserError, autocast, fast_precision, pick_device, progress
from ldm_edu.training.card import model_card
from ldm_edu.training.fit import OnStep, fit, prepare_folder
from ldm_edu.training.settings import Settings
from ldm_edu.training.state import saved_steps, saving
from ldm_edu.unet import UNetConfig

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class DiffusionSettings(Settings):
    """Settings of a latent diffusion model.

    Args:
        pictures: how many are encoded; the training draws from these.
        prediction: what the UNet predicts: "eps" (the paper), "x0" or "v".
        condition_dropout: how often the condition is replaced by the empty one, for classifier-free guidance.
    """

    pictures: int = 100_000
    prediction: str = "eps"
    condition_dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.condition_dropout > 1:
            raise UserError(f"The setting condition_dropout is a share, at most 1; it is {self.condition_dropout}.")


class DiffusionObjective(nn.Module):
    """Equation 3: the mean square of ε - εθ(z_t, t, τθ(y)), over timesteps and noise drawn for each picture.

    Raises:
        UserError: a condition dropout outside 0 to 1.
    """

    def __init__(self, model: LatentDiffusion, condition_dropout: float) -> None:
        super().__init__()
        if not 0 <= condition_dropout <= 1:
            raise UserError(f"condition_dropout is a share, from 0 to 1; it is {condition_dropout}.")
        self.unet, self.conditioner = model.unet, model.conditioner
        self.schedule, self.prediction = model.schedule, model.prediction
        self.condition_dropout = condition_dropout
        self.facts = {  # see `fit`
            "prediction": model.prediction,
            "condition_dropout": condition_dropout,
            "schedule": fingerprint({"alphas_cumprod": model.schedule.alphas_cumprod}),
            "unet": repr(config) if isinstance(config := model.unet.config, UNetConfig) else "",
        }
        self.register_buffer("empty", self.conditioner.tokenize([""]), persistent=False)

    def forward(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Scaled latents `(B, c, h, w)` and what `tokenize` gave, such as tokens `(B, length)`, to the loss."""
        z0, tokens = batch
        t = torch.randint(self.schedule.T, (len(z0),), generator=generator)
        noise = torch.randn(z0.shape, generator=generator).to(z0.device)
        # Condition dropout (Ho and Salimans 2022): the same network learns to predict without a condition.
        dropped = torch.rand(len(z0), 1, generator=generator) < self.condition_dropout
        dropped = dropped.view(-1, *[1] * (tokens.ndim - 1)).to(z0.device)
        tokens = torch.where(dropped, self.empty, tokens)
        target = training_target(self.prediction, z0, noise, self.schedule.at(t, z0))
        output = self.unet(self.schedule.add_noise(z0, noise, t), t.to(z0.device), self.conditioner(tokens))
        each = F.mse_loss(output.float(), target, reduction="none").mean(dim=(1, 2, 3))
        noisy = (t >= self.schedule.T // 2).to(each.device)
        return each.mean(), {"loss_noisier_half": 2 * (each * noisy).detach().mean()}


@torch.no_grad()
def encode_all(
    first_stage: FirstStage,
    get_images: Callable[[Tensor], Tensor],
    count: int,
    cache: Path | None,
    renew: bool = True,
) -> tuple[Tensor, Tensor]:
    """Posterior means and standard deviations of all pictures, `(count, c, h, w)` in half precision, computed once.

    Args:
        get_images: indices to pictures.
        cache: a safetensors file to read them from if they are still right, or to write them to. Whether they are is
            seen from 16 pictures, the first, the last and evenly spaced ones: where others changed, remove the file.
        renew: write the file again where it is not right; else that is an error.

    Raises:
        UserError: pictures that leave [-1, 1] by more than half, or latents in `cache` that are damaged or not to be
            renewed.
    """
    device = pick_device()
    first_stage = first_stage.to(device)

    def encode(index: Tensor) -> tuple[Tensor, Tensor]:
        images = get_images(index)
        if not (most := images.abs().max()) <= 1.5:
            raise UserError(f"Pictures lie in [-1, 1]; these reach {most:g}. From 0 to 255? Take images / 127.5 - 1.")
        with autocast(device, fast_precision(device)):
            posterior = first_stage.posterior(images.to(device))
        return posterior.mean.half().cpu(), (0.5 * posterior.logvar).exp().half().cpu()

    if cache and cache.is_file():
        try:
            stored = load_file(cache)
        except SafetensorError as error:
            raise UserError(f"{cache} is damaged ({error}). Remove it: the latents are then computed again.") from error
        # Of other pictures or another first stage? Then these few differ.
        chosen = torch.linspace(0, count - 1, min(count, 16)).long()
        few = encode(chosen)[0].float()
        fits = stored["mean"].shape == (count, *few.shape[1:])
        if fits and (stored["mean"][chosen] - few).norm() < 0.05 * few.norm():
            return stored["mean"], stored["std"]
        if not renew:
            others = "other pictures or of another first stage"
            what = others if len(stored["mean"]) == count else f"{len(stored['mean'])} pictures, not {count}"
            raise UserError(f"The latents in {cache} are of {what}: resume with the same, or choose another --out.")
    parts = [encode(index) for index in progress(torch.arange(count).split(256), desc="encoding")]
    mean, std = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    if cache:
        new = cache.with_suffix(".tmp" + os.environ.get("RANK", ""))  # each of several processes has its own
        with saving(cache):
            save_file({"mean": mean, "std": std}, new)
            os.replace(new, cache)
    return mean, std


def train_diffusion(
    name: str,
    model: LatentDiffusion,
    settings: DiffusionSettings,
    get_images: Callable[[Tensor], Tensor],
    captions: list[str],
    about: str,
    out: Path | None,
    resume: bool = False,
    on_step: OnStep | None = None,
) -> LatentDiffusion:
    """Compute the latents and their scale, train the UNet with τθ, and write `out/checkpoint`.

    With `out` the latents stay beside it, in `out.latents.safetensors`. A run goes on with the same model, captions and
    pictures alone (of the pictures some are looked at, see `encode_all`).

    Args:
        get_images: indices to square pictures `(B, 3, H, H)`; `captions` has one for each.

    Raises:
        UserError: another prediction in the settings than the model's, not `settings.pictures` captions or one that
            the conditioner refuses, pictures that are not square, a model that cannot be saved, and the errors of
            `encode_all` and `fit`.
    """
    if settings.prediction != model.prediction:
        raise UserError(
            f"The settings say that the model predicts {settings.prediction!r}, but it predicts {model.prediction!r}: "
            "give both the same prediction."
        )
    height, width = get_images(torch.arange(1)).shape[-2:]
    if height != width:
        raise UserError(f"Training takes square pictures; these have {height} × {width} pixels.")
    if len(captions) != settings.pictures:
        raise UserError(f"{settings.pictures} pictures need as many captions; there are {len(captions)}.")
    # All that may be refused, before the encoding, which takes minutes.
    tokens = model.conditioner.tokenize(captions)
    objective, cache = DiffusionObjective(model, settings.condition_dropout), None
    objective.facts["captions"] = fingerprint({"tokens": tokens})
    if out:
        out = Path(out)
        described = to_json(model.description()["conditioner"])
        objective.facts["conditioner"] = hashlib.sha256(described.encode()).hexdigest()
        begun = out.is_dir() and any(out.iterdir())
        prepare_folder(out, resume)
        cache = out.with_name(out.name + ".latents.safetensors")
        if not begun:  # those of an earlier run
            cache.unlink(missing_ok=True)
    device = pick_device()
    renew = not (out and saved_steps(out))
    mean, std = (t.to(device) for t in encode_all(model.first_stage, get_images, settings.pictures, cache, renew))
    # Section 4.3.2 and appendix G: one scalar brings the latent to unit standard deviation.
    model.latent_scale = round(1 / mean[:4096].float().std().item(), 6)
    model.latent_size = mean.shape[-1]
    tokens = tokens.to(device)

    def get_batch(generator: torch.Generator) -> Batch:
        chosen = torch.randint(len(mean), (settings.batch_size,), generator=generator).to(device)
        noise = torch.randn(len(chosen), *mean.shape[1:], generator=generator).to(device)
        return (mean[chosen].float() + std[chosen].float() * noise) * model.latent_scale, tokens[chosen]

    history = fit(objective, get_batch, settings, out, resume, on_step, desc=name)
    if out and PartialState().is_main_process:
        trained = nn.ModuleList([model.unet, model.conditioner])
        card = model_card(name, about, settings, history, trained)
        model.save(out / "checkpoint", card, history.text(), embed_first_stage=False)
    return model.eval()
