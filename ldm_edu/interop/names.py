"""What a first stage's weights are called: here, by diffusers, by CompVis (latent-diffusion, taming-transformers).

`filled` and `refuse_others` serve every kind of model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from ldm_edu.autoencoder import AutoencoderConfig, AutoencoderKL, AutoencoderVQ, FirstStage, VQConfig
from ldm_edu.runtime import UserError

Model = TypeVar("Model", bound=nn.Module)
NAMES = [  # ours, diffusers', CompVis's; for the blocks of a level see their_name; the rest is called the same
    ("quantizer.codebook.", "quantize.embedding.", "quantize.embedding."),
    (".norm_out.", ".conv_norm_out.", ".norm_out."),
    (".middle.0.", ".mid_block.resnets.0.", ".mid.block_1."),
    (".middle.1.", ".mid_block.attentions.0.", ".mid.attn_1."),
    (".middle.2.", ".mid_block.resnets.1.", ".mid.block_2."),
    (".shortcut.", ".conv_shortcut.", ".nin_shortcut."),
    (".norm.", ".group_norm.", ".norm."),
    (".attention.query.", ".to_q.", ".q."),
    (".attention.key.", ".to_k.", ".k."),
    (".attention.value.", ".to_v.", ".v."),
    (".attention.out.", ".to_out.0.", ".proj_out."),
]


def their_name(name: str, config: AutoencoderConfig, diffusers: bool) -> str:
    """What diffusers, or else CompVis, calls our weight `name`."""
    for ours, in_diffusers, in_compvis in NAMES:
        name = name.replace(ours, in_diffusers if diffusers else in_compvis)
    found = re.fullmatch(r"(.+)\.(down|up)\.(\d+)\.(?:resample|blocks\.(\d+))\.(.+)", name)
    if not found:
        return name
    half, way, position, place, rest = found.groups()
    # The decoder begins at the lowest resolution: the first of its levels to diffusers and us, the last to CompVis.
    level = int(position) if way == "down" else len(config.widths) - 1 - int(position)
    if place is None:
        block = f"{way}samplers.0" if diffusers else f"{way}sample"
    else:  # where a level has attention, our one sequence holds residual and attention blocks in turn
        number, attention = divmod(int(place), 2) if level in config.attention_levels else (int(place), 0)
        block = f"{(('resnets', 'attentions') if diffusers else ('block', 'attn'))[attention]}.{number}"
    return f"{half}.{f'{way}_blocks.{position}' if diffusers else f'{way}.{level}'}.{block}.{rest}"


def exported(model: FirstStage, diffusers: bool) -> dict[str, Tensor]:
    """The weights under their names, sharing memory."""
    if not isinstance(model, AutoencoderKL | AutoencoderVQ):
        raise UserError(f"Only KL and VQ first stages exist elsewhere; this one is of the kind {model.kind!r}.")
    tensors = {}
    for name, tensor in model.state_dict().items():
        convolution = not diffusers and ".attention." in name and tensor.ndim == 2  # 1×1, for our linear layer
        tensors[their_name(name, model.config, diffusers)] = tensor[:, :, None, None] if convolution else tensor
    return tensors


def imported(config: AutoencoderConfig, tensors: Mapping[str, Tensor], diffusers: bool) -> FirstStage:
    """A first stage with their weights, in evaluation mode.

    Raises:
        UserError: tensors are missing, unknown or of another shape; the first few are named.
    """
    model = AutoencoderVQ(config) if isinstance(config, VQConfig) else AutoencoderKL(config)
    return filled(model, tensors, lambda name: their_name(name, config, diffusers))


def filled(model: Model, tensors: Mapping[str, Tensor], their_name: Callable[[str], str]) -> Model:
    """`model` with their weights, in evaluation mode; kernels of size 1 become linear layers.

    Args:
        their_name: from our name of a weight to theirs.

    Raises:
        UserError: tensors are missing, unknown or of another shape; the first few are named.
    """
    own, unknown = model.state_dict(), dict(tensors)
    problems: dict[str, list[str]] = {"missing": [], "of another shape": [], "unknown": []}
    for ours, weight in own.items():
        name = their_name(ours)
        given = unknown.pop(name, None)
        if given is None:
            problems["missing"].append(name)
        elif given.shape not in [(*weight.shape, *[1] * n) for n in range(3)]:
            problems["of another shape"].append(f"{name} {tuple(given.shape)}, not {tuple(weight.shape)}")
        else:
            own[ours] = given.reshape(weight.shape)
    problems["unknown"] = sorted(unknown)
    if any(problems.values()):
        told = (f"{len(p)} {what} ({', '.join(p[:3])}{', ...' * (len(p) > 3)})" for what, p in problems.items() if p)
        raise UserError(f"The weights do not fit their configuration: {'; '.join(told)}. Are they another model's?")
    model.load_state_dict(own)
    return model.eval()


def refuse_others(
    settings: Mapping[str, Any], free: Collection[str], model: str = "first stage", **possible: tuple
) -> None:
    """Refuse settings, unless they are `free` to be anything or set to one of the `possible` values."""
    for name in sorted(settings.keys() - set(free)):
        if name not in possible:
            raise UserError(f"The setting {name} = {settings[name]!r} is not known here.")
        if settings[name] not in possible[name]:
            only = " or ".join(map(repr, possible[name]))
            raise UserError(f"A {model} here cannot have {name} = {settings[name]!r}, only {only}.")
