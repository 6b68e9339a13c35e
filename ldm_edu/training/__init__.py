"""Training of both stages: recipes, the loop, saving and resuming."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ldm_edu.runtime import UserError, pick_device
from ldm_edu.training import recipes
from ldm_edu.training.fit import OnStep, fit
from ldm_edu.training.settings import Settings, override

__all__ = ["Settings", "fit", "recipes", "train"]


def train(
    recipe: str,
    out: Path | str | None,
    resume: bool = False,
    settings: Mapping[str, str] | None = None,
    size: str | None = None,
    on_step: OnStep | None = None,
) -> object:
    """Train a recipe, and write its checkpoint to `out/checkpoint`.

    Args:
        settings: settings to replace, as text.
        size: "cpu" or "gpu"; by default what the machine has.

    Raises:
        UserError: an unknown recipe, setting or size.
    """
    module = recipes.get(recipe)
    size = size or ("cpu" if pick_device().type == "cpu" else "gpu")
    if size not in module.SETTINGS:
        raise UserError(f"The recipe has the sizes {', '.join(module.SETTINGS)}, not {size!r}.")
    chosen = override(module.SETTINGS[size], settings or {})
    return module.train(chosen, Path(out) if out else None, resume, on_step)
