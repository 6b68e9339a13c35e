"""Saving a training run and taking it up again: after a kill at any moment at most the last steps are lost."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ldm_edu.checkpoint import fill, to_json, write_folder
from ldm_edu.runtime import UserError
from ldm_edu.training.settings import Settings


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """What the system refuses (a full disk, a folder of somebody else) in words, as a UserError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"Cannot save to {path}: {getattr(error, 'strerror', None) or error}. What was saved before is whole; "
            "make room, or choose another --out."
        ) from error


def started_with(settings: Settings, objective: nn.Module) -> dict[str, Any]:
    """What a run is not resumed without: the settings, and the `facts` of an objective that has them."""
    return asdict(settings) | getattr(objective, "facts", {})


def save_state(
    out: Path,
    step: int,
    model: nn.Module,
    ema: list[Tensor],
    optimizer: torch.optim.Optimizer,
    scalars: dict[str, Any],
) -> None:
    """Write `out/step-N/` whole: weights, averaged weights and optimiser as tensors, the rest as JSON. Older ones go.

    Random numbers need no state: each step draws from a generator seeded by (seed, step).
    """
    # Buffers that checkpoints leave out are state too: how long each code of a codebook has idled.
    tensors = {f"model.{n}": t for n, t in (dict(model.named_buffers()) | model.state_dict()).items()}
    tensors |= {f"ema.{i}": t for i, t in enumerate(ema)}
    for i, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": t for name, t in values.items()}
    # A copy of each: safetensors refuses tensors that share memory.
    data = save({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()})
    scalars = {"step": step, **scalars}
    folder = out / f"step-{step:07d}"
    with saving(folder):
        write_folder(folder, {"state.safetensors": data, "state.json": to_json(scalars).encode()})
    _keep_only(folder)


def _keep_only(folder: Path) -> None:
    """Remove the other states beside this one, and what was being written or removed when a run was killed."""
    for other in set(folder.parent.glob("step-*")) - {folder}:
        if re.fullmatch(r"step-\d{7}(\.tmp|\.old)?", other.name):
            shutil.rmtree(other, ignore_errors=True)


def saved_steps(out: Path) -> list[Path]:
    """The whole saved states in a run's folder, oldest first."""
    return sorted(
        p for p in out.glob("step-*") if re.fullmatch(r"step-\d{7}", p.name) and (p / "state.json").is_file()
    )


def load_state(
    out: Path, model: nn.Module, ema: list[Tensor], optimizer: torch.optim.Optimizer, settings: Settings
) -> dict[str, Any] | None:
    """Take up the newest saved state; None where there is none yet.

    Raises:
        UserError: it was made with other settings or facts, or without one of them; for another model; or is damaged.
    """
    folders = saved_steps(out)
    if not folders:
        return None
    try:
        scalars = json.loads((folders[-1] / "state.json").read_text())
        tensors = load_file(folders[-1] / "state.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"The saved state {folders[-1]} is damaged ({error}). Choose another --out and start again."
        ) from error
    own, theirs = json.loads(to_json(started_with(settings, model))), scalars["settings"]
    if theirs != own:
        other = [k for k in own | theirs if theirs.get(k) != own.get(k)]
        changed = [k if k in theirs else f"{k}: not recorded" for k in other]
        raise UserError(
            f"The run in {out} was started with other settings ({', '.join(changed)}); resume it with the same ones, "
            "or choose another --out."
        )
    weights = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    kept_out = {n: b for n, b in model.named_buffers() if n not in model.state_dict()}
    fill(model, {n: t for n, t in weights.items() if n not in kept_out}, folders[-1])
    for name, buffer in kept_out.items():
        buffer.copy_(weights.get(name, buffer))
    for i, average in enumerate(ema):
        average.copy_(tensors[f"ema.{i}"])
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, i, key = name.split(".", 2)
            like = trained[int(i)]
            if tensor.shape == like.shape:  # laid out in memory like its weight, as a fused step on a GPU insists
                tensor = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
            state.setdefault(int(i), {})[key] = tensor
    _keep_only(folders[-1])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return scalars


class History:
    """`history.csv`: the readings, a row every `log_every` steps; a resumed run cuts it back to its state."""

    def __init__(self, path: Path | None, keep_to: int = 0) -> None:
        self.path = path
        self.rows: list[dict[str, str]] = []
        if path and path.is_file() and keep_to:
            with open(path, newline="") as file:
                self.rows = [
                    row
                    for row in csv.DictReader(file)
                    if None not in row.values() and row["step"].isdigit() and int(row["step"]) <= keep_to
                ]
        self._write_all()

    def add(self, step: int, readings: dict[str, float]) -> None:
        """Append one row, and write the file again, whole: a reading may be new, and so a column."""
        self.rows.append({"step": str(step)} | {k: f"{v:.6g}" for k, v in readings.items()})
        self._write_all()

    def text(self) -> str:
        """The whole file."""
        names = list(dict.fromkeys(name for row in self.rows for name in row))  # in the order of their first time
        return "\n".join([",".join(names), *(",".join(row.get(n, "") for n in names) for row in self.rows)]) + "\n"

    def _write_all(self) -> None:
        if self.path and (self.rows or self.path.is_file()):  # a run that fails at once leaves none
            new = self.path.with_suffix(".tmp")
            with saving(self.path):
                new.write_text(self.text() if self.rows else "")
                new.replace(self.path)
