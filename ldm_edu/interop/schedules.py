"""Noise schedules of diffusers' schedulers: scheduler_config.json, without importing diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm_edu.checkpoint import settings_of
from ldm_edu.diffusion import Schedule
from ldm_edu.runtime import UserError

KINDS = {"linear": "linear", "scaled_linear": "sqrt_linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
LARGEST = 0.999  # β of squaredcos_cap_v2, which takes neither beta_start nor beta_end


def schedule_from_diffusers(config: Mapping[str, Any]) -> tuple[Schedule, str]:
    """The noise schedule of a scheduler, and what its network predicts ("eps", "x0" or "v").

    Of `config`, what scheduler_config.json holds, only β and the prediction are read. The rest says how diffusers would
    sample (spacing, clipping, order, Karras sigmas, ...): here these are arguments of the samplers.

    Raises:
        UserError: a schedule that is not given by β, or by other β than ours; or another prediction.
    """
    with settings_of(Path("scheduler_config.json")):
        kind, prediction = config.get("beta_schedule"), config.get("prediction_type", "epsilon")
        if kind not in KINDS:
            raise UserError(f"A schedule here has a beta_schedule {_either(KINDS)}, not {kind!r}.")
        if prediction not in PREDICTIONS:
            raise UserError(f"A network here has a prediction_type {_either(PREDICTIONS)}, not {prediction!r}.")
        for name in ("trained_betas", "rescale_betas_zero_snr"):
            if config.get(name):
                raise UserError(f"A schedule here cannot have {name} = {config[name]!r}: its β follow a formula as is.")
        if config.get("snr_shift_scale", 1) not in (None, 1):
            raise UserError(f"A schedule here cannot have snr_shift_scale = {config['snr_shift_scale']!r}: it moves ᾱ.")
        start, end = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
        if kind == "squaredcos_cap_v2":
            start, end = 0.0, LARGEST
        return Schedule(KINDS[kind], config.get("num_train_timesteps", 1000), start, end), PREDICTIONS[prediction]


def schedule_to_diffusers(schedule: Schedule, prediction: str = "eps") -> dict[str, Any]:
    """The settings of any of diffusers' schedulers that give it this schedule and prediction.

    Raises:
        UserError: diffusers has no such schedule or prediction.
    """
    theirs = {ours: name for name, ours in KINDS.items()}.get(schedule.kind)
    answer = {ours: name for name, ours in PREDICTIONS.items()}.get(prediction)
    if theirs is None or answer is None:
        raise UserError(f"diffusers has no {schedule.kind!r} schedule for a network that predicts {prediction!r}.")
    config = {"beta_schedule": theirs, "num_train_timesteps": schedule.T, "prediction_type": answer}
    if schedule.kind != "cosine":
        return config | {"beta_start": schedule.start, "beta_end": schedule.end}
    if schedule.end != LARGEST:
        raise UserError(f"In diffusers the largest β of a cosine schedule is {LARGEST}; this one's is {schedule.end}.")
    return config


def _either(names: Mapping[str, str]) -> str:
    return " or ".join(map(repr, names))
