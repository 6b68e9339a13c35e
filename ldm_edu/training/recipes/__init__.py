"""The recipes: one file for each committed checkpoint, named like it."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from ldm_edu.runtime import UserError

FILES = {"shapes-kl-f4": "shapes_kl_f4", "shapes-text": "shapes_text", "photos-kl-f4": "photos_kl_f4"}


def names() -> list[str]:
    """The recipes there are."""
    return list(FILES)


def get(name: str) -> ModuleType:
    """The recipe's module: NAME, ABOUT, SETTINGS ("cpu" and "gpu") and train(settings, out, resume, on_step).

    Raises:
        UserError: no such recipe, with those there are.
    """
    if name not in FILES:
        raise UserError(f"There is no recipe {name!r}; there are {', '.join(FILES)}.")
    return import_module(f"ldm_edu.training.recipes.{FILES[name]}")
