"""The recipes: one file for each committed checkpoint, named like it; those of a comparison share one."""

from __future__ import annotations

from typing import Any

from ldm_edu.runtime import UserError
from ldm_edu.training.recipes import (
    perceptual,
    perceptual_judge,
    photos_kl_f4,
    shapes_kl_f4,
    shapes_text,
    spaces,
    sweep,
)

FILES = (perceptual, perceptual_judge, photos_kl_f4, shapes_kl_f4, shapes_text)
RECIPES: dict[str, Any] = {recipe.NAME: recipe for recipe in FILES} | spaces.RECIPES | sweep.RECIPES


def names() -> list[str]:
    """The recipes there are."""
    return [*RECIPES]


def get(name: str) -> Any:
    """The recipe: something with SETTINGS ("cpu" and "gpu") and train(settings, out, resume, on_step).

    Raises:
        UserError: no such recipe, with those there are.
    """
    if name not in RECIPES:
        raise UserError(f"There is no recipe {name!r}; there are {', '.join(RECIPES)}.")
    return RECIPES[name]
