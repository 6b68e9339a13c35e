"""LatentDiffusion: figure 3 of the paper in one class."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm_edu import checkpoint
from ldm_edu.autoencoder import FirstStage
from ldm_edu.conditioning import TextConditioner
from ldm_edu.diffusion import PREDICTIONS, SCHEDULES, Schedule, Step, guided, spaced_timesteps
from ldm_edu.diffusion.samplers import ddim, ddpm, dpm_solver, plms
from ldm_edu.parts import KEEP, refuse_if_other
from ldm_edu.runtime import PictureNoise, UserError, autocast, pick_device, uses_bfloat16
from ldm_edu.unet import UNet, UNetConfig
from ldm_edu.unet.fast import Denoiser, has_hooks

SAMPLERS = {"ddim": ddim, "ddpm": ddpm, "plms": plms, "dpm-solver": dpm_solver}


class LatentDiffusion(nn.Module):
    """First stage (E and D), denoiser (the UNet), condition (τθ) and noise schedule.

    Parts may be of your own: `training.fit` trains a `DiffusionObjective` of any model, and any draws. But `save`, and
    so `train_diffusion` with an `out`, takes the `UNet`, the `TextConditioner` and the schedules of this package alone,
    and a first stage with a `kind` of its own.

    Args:
        first_stage: frozen here and always in evaluation, since it is trained no further.
        unet: `(z, t, context)` to a prediction of z's shape. One of your own needs weights and a `config`,
            a `UNetConfig`: how many channels it takes and gives, how wide the context is, how often it halves z.
        conditioner: `tokenize(list of captions)` gives tokens, a tensor with a row for each, all rows of one shape, and
            for "" the empty condition. Called with them, it gives the context `(B, M, d)`. It may say d in `channels`.
            For a model without a condition: `TextConditioner.from_words([], length=1)`, and "" for every caption.
        schedule: a `Schedule`.
        latent_scale: what brings the first stage's latents to unit standard deviation; computed from data.
        prediction: what the UNet predicts: "eps", "x0" or "v".
        latent_size: height and width of the latents that it is trained on.

    Raises:
        UserError: an unknown prediction, a scale that is no positive number, or parts that do not fit one another.
    """

    kind = "latent-diffusion"

    def __init__(
        self,
        first_stage: FirstStage,
        unet: UNet,
        conditioner: TextConditioner,
        schedule: Schedule,
        latent_scale: float = 1.0,
        prediction: str = "eps",
        latent_size: int = 16,
    ) -> None:
        super().__init__()
        if prediction not in PREDICTIONS:
            raise UserError(f"A model predicts one of {', '.join(PREDICTIONS)}, not {prediction!r}.")
        if not 0 < latent_scale < math.inf:
            raise UserError(f"The scale of the latents is a positive number, not {latent_scale}.")
        shape, channels = unet.config, first_stage.config.latent_channels
        if shape.context_channels is None:
            raise UserError(
                "The UNet reads what the conditioner makes of captions: give it context_channels (not None). For a "
                'model without a condition take TextConditioner.from_words([], length=1), and "" for every caption.'
            )
        if (shape.in_channels, shape.out_channels) != (channels, channels):
            raise UserError(
                f"The first stage's latents have {channels} channels, but the UNet goes from {shape.in_channels} "
                f"to {shape.out_channels}: give it in_channels and out_channels {channels}."
            )
        wide = getattr(conditioner, "channels", shape.context_channels)  # a module of one's own may not say it
        if shape.context_channels != wide or shape.num_classes is not None:
            raise UserError(
                f"The UNet gets the conditioner's sequence, {wide} wide, and no labels: give it "
                f"context_channels {wide} (not {shape.context_channels}) and no num_classes."
            )
        if latent_size % (step := 2 ** (len(shape.widths) - 1)) or latent_size < 1:
            raise UserError(f"The UNet needs a latent_size that is a multiple of {step}, not {latent_size}.")
        self.first_stage = first_stage.requires_grad_(False).eval()
        self.unet, self.conditioner, self.schedule = unet, conditioner, schedule
        self.latent_scale, self.prediction, self.latent_size = float(latent_scale), prediction, latent_size
        self._compiled: dict[torch.dtype, Denoiser] = {}

    def train(self, mode: bool = True) -> LatentDiffusion:
        """As for any module, but the first stage stays in evaluation."""
        super().train(mode)
        self.first_stage.eval()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: compiled programs stay here."""
        return self.__dict__ | {"_compiled": {}}

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.unet.parameters()).device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of the latents that the model was trained on."""
        return (self.first_stage.config.latent_channels, self.latent_size, self.latent_size)

    def to_latent(self, images: Tensor) -> Tensor:
        """Pictures `(B, 3, H, W)` in [-1, 1] to scaled latents `(B, c, H/f, W/f)`."""
        self.first_stage.check(images)
        weight = next(self.unet.parameters())
        return self.first_stage.encode(images.to(weight)).to(weight) * self.latent_scale

    @torch.no_grad()
    def to_image(self, latents: Tensor) -> Tensor:
        """Scaled latents `(B, c, h, w)` to pictures `(B, 3, H, W)` in [-1, 1], on the CPU."""
        if latents.ndim != 4 or latents.shape[1] != self.latent_shape[0]:
            raise UserError(f"Latents are (B, {self.latent_shape[0]}, h, w); these are {tuple(latents.shape)}.")
        scaled = latents.to(next(self.unet.parameters())) / self.latent_scale
        parts = [self.first_stage.decode(part) for part in scaled.split(64)]
        return torch.cat(parts).float().clamp(-1, 1).cpu()

    def context(self, prompts: str | Sequence[str]) -> Tensor:
        """τθ(y): `(B, length, channels)`, of a prompt or several."""
        return self.conditioner(self.conditioner.tokenize(prompts).to(self.device))

    def steps(
        self,
        prompts: str | Sequence[str],
        num_steps: int = 25,
        guidance_scale: float = 3.0,
        seeds: int | Sequence[int] = 0,
        sampler: str = "ddim",
        eta: float = 0.0,
        precision: str = "auto",
        compiled: bool = False,
        spacing: str = "trailing",
    ) -> Iterator[Step]:
        """Sample, yielding every step: `Step(t, z, z0)` with scaled latents. The arguments are checked at once.

        Args:
            prompts: one, or several.
            num_steps: 1 to T. Each is one call of the UNet (and the first of "plms" two).
            guidance_scale: 1 is no guidance, and asks for no empty condition.
            seeds: one for each picture; a single integer s means s, s+1, ...
            sampler: "ddim" (with `eta` from 0, deterministic, to 1), "ddpm", "plms" or "dpm-solver"; see `diffusion`.
            precision: "float32", "bfloat16", or "auto": bfloat16 on a GPU that has it, else float32.
            compiled: sample with a compiled UNet, for many pictures: the first batch of each size waits for the
                compiler, a minute or several. Where it fails, or `attention_maps` is at work, a warning says so, and it
                goes on without.
            spacing: which timesteps are visited; see `spaced_timesteps`.

        Raises:
            UserError: unknown words, a number out of range, or seeds that do not match the prompts.
        """
        several = isinstance(prompts, Iterable) and not isinstance(prompts, str)
        prompts = list(prompts) if several else [prompts]
        if getattr(seeds, "ndim", None) == 0:  # numpy's and torch's single numbers
            seeds = seeds.item()
        if isinstance(seeds, Integral):
            seeds = [seeds + i for i in range(len(prompts))]
        seeds = list(seeds) if isinstance(seeds, Iterable) else [seeds]
        if not prompts or len(seeds) != len(prompts):
            raise UserError(f"Give a seed for each prompt, or one integer: {len(prompts)} prompts, {len(seeds)} seeds.")
        if not (isinstance(guidance_scale, Real) and 0 <= guidance_scale <= 100):
            raise UserError(f"The guidance scale is a plain number, 0 to 100 (1 is none); it is {guidance_scale!r}.")
        if not (isinstance(eta, Real) and 0 <= eta <= 1):
            raise UserError(f"eta lies between 0 (deterministic) and 1 (ancestral); it is {eta}.")
        if sampler not in SAMPLERS:
            raise UserError(f"There is no sampler {sampler!r}; there are {', '.join(SAMPLERS)}.")
        if eta and sampler != "ddim":
            raise UserError(f"eta belongs to ddim; with {sampler} leave it at 0, not {eta}.")
        timesteps = spaced_timesteps(self.schedule.T, num_steps, spacing)
        self.conditioner.tokenize(prompts)
        unet = self._denoiser(precision, compiled)
        draw = PictureNoise(seeds)

        def run() -> Iterator[Step]:
            # Gradients are off inside each step, not around the loop: a generator must not change its caller's mode.
            with torch.no_grad():
                context = self.context(prompts)
                null = context if guidance_scale == 1 else self.context([""] * len(prompts))
            network = guided(unet, context, null, guidance_scale)

            @torch.no_grad()
            def denoiser(z: Tensor, t: Tensor) -> Tensor:
                with autocast(self.device, precision):
                    return network(z, t).float()

            start = draw(self.latent_shape).to(self.device)
            common = (denoiser, start, self.schedule.alphas_cumprod, timesteps, self.prediction)
            noisy = {"ddim": {"eta": eta, "draw": draw}, "ddpm": {"draw": draw}}
            yield from SAMPLERS[sampler](*common, **noisy.get(sampler, {}))

        return run()

    def _denoiser(self, precision: str, compiled: bool) -> Denoiser:
        dtype = torch.bfloat16 if uses_bfloat16(self.device, precision) else torch.float32
        if not compiled or has_hooks(self.unet):
            return Denoiser(self.unet, compiled)
        if dtype not in self._compiled or not self._compiled[dtype].is_of(self.unet):
            self._compiled[dtype] = Denoiser(self.unet, compiled, dtype)
        return self._compiled[dtype]

    def sample(self, prompts: str | Sequence[str], **arguments: object) -> Tensor:
        """Pictures `(B, 3, H, W)` in [-1, 1], on the CPU. Arguments as for `steps`."""
        for step in self.steps(prompts, **arguments):  # type: ignore[arg-type]
            last = step
        return self.to_image(last.z)

    def save(
        self, folder: Path | str, card: str, history: str | None = None, embed_first_stage: bool = True
    ) -> None:
        """Write a checkpoint, whole or not at all.

        Its first stage is left out only where it is one of the committed ones, to be found again by its fingerprint.

        Raises:
            UserError: as in `description`, or it cannot be written.
        """
        config = self.description()
        weights = checkpoint.fingerprint(self.first_stage.state_dict())
        embed_first_stage |= checkpoint.committed(weights) is None
        config["first_stage"] |= {"sha256": weights, "embedded": embed_first_stage}
        tensors = {
            n: t for n, t in self.state_dict().items() if embed_first_stage or not n.startswith("first_stage.")
        }
        checkpoint.write(folder, config, tensors, card, history)

    def description(self) -> dict[str, Any]:
        """Everything but the weights, as JSON.

        Raises:
            UserError: a part, or the schedule, is one of your own, of which `load` could not know.
        """
        conditioner = getattr(self.conditioner, "_orig_mod", self.conditioner)  # what torch.compile wraps
        if type(conditioner) is not TextConditioner:
            raise UserError(
                f"A model with the conditioner {type(conditioner).__name__} cannot be saved: load knows "
                f"TextConditioner alone. {KEEP}"
            )
        kind = getattr(self.schedule, "kind", type(self.schedule).__name__)
        if getattr(SCHEDULES.get(kind), "__module__", None) != Schedule.__module__:  # a new process has those alone
            raise UserError(f"A model with the schedule {kind!r}, your own, cannot be saved: load knows none. {KEEP}")
        schedule = self.schedule.config()
        if not torch.allclose(Schedule(**schedule).alphas_cumprod, self.schedule.alphas_cumprod.double().cpu()):
            raise UserError(
                f"A model with an ᾱ of its own cannot be saved: load would take that of {schedule}. {KEEP}"
            )
        config = {
            "kind": self.kind,
            "first_stage": self.first_stage.description(),
            "unet": asdict(self.unet.config),
            "conditioner": self.conditioner.config(),
            "schedule": schedule,
            "latent_scale": self.latent_scale,
            "latent_size": self.latent_size,
            "prediction": self.prediction,
        }
        config = json.loads(checkpoint.to_json(config))
        made_by = type(self) if "kind" in vars(type(self)) else LatentDiffusion
        refuse_if_other(self, lambda: made_by._described(config, Path()))
        return config

    @classmethod
    def _described(cls, config: dict[str, Any], folder: Path) -> LatentDiffusion:
        """What `description` says, with untrained weights."""
        return cls(
            FirstStage.from_description(config["first_stage"], folder),
            UNet(checkpoint.build(UNetConfig, config["unet"], folder)),
            TextConditioner.from_config(config["conditioner"]),
            Schedule(**config["schedule"]),
            float(config["latent_scale"]),
            config["prediction"],
            int(config["latent_size"]),
        )

    @classmethod
    def load(cls, name: str | Path, device: str | torch.device | None = None) -> LatentDiffusion:
        """A checkpoint by name, folder or "hub:owner/repository" (see `checkpoint.find`), ready to sample.

        Raises:
            UserError: none there, damaged, of a newer format, or its first stage is not here.
        """
        folder = checkpoint.find(name)
        config, tensors = checkpoint.read(folder, kind=cls.kind)
        with checkpoint.settings_of(folder):
            first, model = config["first_stage"], cls._described(config, folder)
        if not first["embedded"]:
            stage = checkpoint.read(checkpoint.find_by_fingerprint(first["sha256"]))[1]
            tensors |= {f"first_stage.{n}": t for n, t in stage.items()}
        checkpoint.fill(model, tensors, folder)
        return model.eval().to(pick_device(device and str(device)))
