"""Model cards: what a checkpoint is, how it was made, on what, and how long that took."""

from __future__ import annotations

import platform
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from ldm_edu.runtime import pick_device
from ldm_edu.training.settings import Settings
from ldm_edu.training.state import History


def hardware() -> str:
    """The processor or GPU, and how much of it."""
    if pick_device().type == "cuda":
        return f"1 × {torch.cuda.get_device_name()}"
    names = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    model = next(
        (line.split(":")[1].strip() for line in names.splitlines() if "model name" in line),
        platform.processor(),
    )
    return f"{torch.get_num_threads()} thread(s) of {model}"


def model_card(name: str, about: str, settings: Settings, history: History, model: nn.Module) -> str:
    """The README.md of a checkpoint, in Markdown. With the command that makes it, if `name` is a recipe's."""
    from ldm_edu.training import recipes  # these import this module

    parameters = sum(p.numel() for p in model.parameters())
    last = history.rows[-1] if history.rows else {}
    rows = "\n".join(f"| {k} | {v} |" for k, v in asdict(settings).items())
    command = ""
    if name in recipes.names():  # of its sizes, the one with the fewest changes
        made, sizes = asdict(settings), recipes.get(name).SETTINGS.values()
        changes = [[f" --set {k}={v}" for k, v in made.items() if v != getattr(size, k)] for size in sizes]
        command = f"- Command: `ldm-edu train {name}{''.join(min(changes, key=len))}`\n"
    readings = "\n".join(f"| {k} | {v} |" for k, v in last.items())
    return f"""# {name}

{about}

- Parameters: {parameters:,}, stored in half precision; the averaged (EMA) weights.
{command}- Trained in {history.seconds / 60:.1f} minutes on {hardware()}, precision {history.precision}, \
torch {torch.__version__}.

| setting | value |
|---|---|
{rows}

Means over the last logged steps (training pictures; every row is in `history.csv`):

| reading | value |
|---|---|
{readings}
"""
