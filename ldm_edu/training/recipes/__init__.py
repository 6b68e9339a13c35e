"""The recipes: one file for each committed checkpoint, named like it; those of a comparison share one."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ldm_edu.runtime import UserError
from ldm_edu.training.recipes import spaces, sweep

FILES = {
    "perceptual": "perceptual",
    "perceptual-judge": "perceptual_judge",
    "photos-kl-f4": "photos_kl_f4",
    "shapes-kl-f4": "shapes_kl_f4",
    "shapes-text": "shapes_text",
}
SHARED = {**spaces.RECIPES, **sweep.RECIPES}


def names() -> list[str]:
    """The recipes there are."""
    return [*FILES, *SHARED]


def get(name: str) -> Any:
    """The recipe: something with SETTINGS ("cpu" and "gpu") and train(settings, out, resume, on_step).

    Raises:
        UserError: no such recipe, with those there are.
    """
    if name in SHARED:
        return SHARED[name]
    if name not in FILES:
        raise UserError(f"There is no recipe {name!r}; there are {', '.join(names())}.")
    return import_module(f"ldm_edu.training.recipes.{FILES[name]}")
