"""The numbers that a training run is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TypeVar

from ldm_edu.runtime import UserError


@dataclass(frozen=True)
class Settings:
    """What every training has. A recipe adds its own.

    Args:
        steps: optimiser steps.
        batch_size: pictures a step, in each process.
        learning_rate: the highest one, reached after `warmup` steps; then a cosine down to zero.
        optimizer: "adamw" as in the paper, or "muon" (see there).
        weight_decay, beta1, beta2: of AdamW.
        gradient_clip: the largest norm of the gradient.
        ema_decay: of the averaged weights, which are the ones kept.
        precision: "bf16", "no" (float32), or "auto": bf16 where the device is fast in it.
        seed: of the first weights and of every draw.
        log_every, save_every: in steps; the second a multiple of the first.
    """

    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 1e-4
    warmup: int = 100
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    gradient_clip: float = 1.0
    ema_decay: float = 0.999
    precision: str = "auto"
    seed: int = 0
    log_every: int = 50
    save_every: int = 500

    def __post_init__(self) -> None:
        can_be_0 = "warmup", "seed", "restart_after", "vq_start", "disc_start", "disc_warmup"
        for name, kind in kinds_of(self).items():
            value, least = getattr(self, name), 0 if kind is float or name in can_be_0 else 1
            fits = isinstance(value, int) or (kind is float and isinstance(value, float))
            if kind is not str and not (fits and least <= value < math.inf):
                number = "a number" if kind is float else "a whole number"
                raise UserError(f"The setting {name} must be {number}, at least {least}; it is {value!r}.")
        if not self.gradient_clip:
            raise UserError("The setting gradient_clip is 0, so nothing would be trained; 1e9 would clip nothing.")
        for name in ("beta1", "beta2", "ema_decay"):
            if getattr(self, name) >= 1:
                raise UserError(f"The setting {name} must be less than 1; it is {getattr(self, name)}.")
        if not 0 < self.learning_rate < 1:
            raise UserError(f"The setting learning_rate must lie between 0 and 1; it is {self.learning_rate}.")
        if self.seed >= 2**32:
            raise UserError(f"The setting seed must be less than 2**32; it is {self.seed}.")
        if self.save_every % self.log_every:
            raise UserError(f"save_every ({self.save_every}) must be a multiple of log_every ({self.log_every}).")
        if self.optimizer not in ("adamw", "muon"):
            raise UserError(f"The setting optimizer is adamw or muon; it is {self.optimizer!r}.")
        if self.precision not in ("auto", "bf16", "no"):
            raise UserError(f"The setting precision is auto, bf16 or no; it is {self.precision!r}.")


def kinds_of(settings: Settings) -> dict[str, type]:
    """int, float or str for each setting, as its default is."""
    return {field.name: type(field.default) for field in fields(settings)}


AnySettings = TypeVar("AnySettings", bound=Settings)


def override(settings: AnySettings, changes: Mapping[str, str]) -> AnySettings:
    """The settings with some of them replaced, given as text (`--set key=value`).

    Raises:
        UserError: an unknown setting, with the known ones, or a value of the wrong type.
    """
    kinds, values = kinds_of(settings), {}
    for key, text in changes.items():
        if key not in kinds:
            raise UserError(f"There is no setting {key!r}; there are {', '.join(kinds)}.")
        try:
            values[key] = kinds[key](text)
        except ValueError as error:
            raise UserError(f"The setting {key} is a {kinds[key].__name__}; {text!r} is not.") from error
    return replace(settings, **values)
