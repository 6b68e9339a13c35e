"""The parts of a model by name: would loading its checkpoint make the same model again?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ldm_edu.runtime import UserError

KEEP = (
    "Keep the weights with safetensors.torch.save_model, and beside them what is no weight: of a LatentDiffusion "
    "its latent_scale, latent_size, prediction and schedule."
)


def refuse_if_other(model: nn.Module, make: Callable[[], nn.Module]) -> None:
    """Refuse to save a model of which loading would make another one: what `make` makes.

    Raises:
        UserError: a part of that is of another class, or its weights have other names or shapes.
    """
    try:
        with torch.device("meta"):  # no memory, and no random numbers
            again = make()
    except Exception as error:
        raise UserError(f"This {type(model).__name__} cannot be saved: loading would fail: {error}") from error
    own, other = _parts(model), _parts(again)
    for name in own | other:
        if own.get(name) != other.get(name):
            raise UserError(
                f"This {type(model).__name__} cannot be saved: loaded again, its {name or 'class'} would not be "
                f"{own.get(name)}, but {other.get(name)}. {KEEP}"
            )


def _parts(model: nn.Module) -> dict[str, str | tuple[int, ...]]:
    """The class of each part (by name: a cell that is run again makes another) and the shape of each weight."""
    classes = {uncompiled(name): type(module) for name, module in model.named_modules()}
    modules = {name: f"{kind.__module__}.{kind.__qualname__}" for name, kind in classes.items()}
    return modules | {uncompiled(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def uncompiled(name: str) -> str:
    """The name of a part or a weight, without what torch.compile adds."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")
