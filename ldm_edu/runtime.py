"""Where and how the code runs: device, precision, randomness, the budget of a training cell, progress bars."""

from __future__ import annotations

import operator
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ldm_edu.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent


def pick_device(name: str | None = None) -> torch.device:
    """The device to run on: `name`, else `$LDM_EDU_DEVICE`, else cuda, mps or cpu, the first there is.

    Of several GPUs "cuda:1" is the second, and then "cuda" means it, too. Without a number it is the first; in each of
    the processes that torchrun or `accelerate launch` starts, its own.

    Raises:
        UserError: the device asked for is unknown or not on this machine.
    """
    name = name or os.environ.get("LDM_EDU_DEVICE")
    if not name:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        name = accelerator.type if accelerator else "cpu"
    try:
        device = torch.device(name)
        number = os.environ.get("LOCAL_RANK") if device.index is None else device.index
        if device.type == "cuda" and number is not None:
            torch.cuda.set_device(int(number))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"Cannot use the device {name!r}: {reason}. Try 'cpu'.") from error
    return device


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is worth using: GPUs from Ampere on, CPUs with units for it (AMX, AVX512-BF16)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def fast_precision(device: torch.device) -> str:
    """The precision in which what is only measured runs: "bfloat16" where it is worth using, else "float32"."""
    return "bfloat16" if has_fast_bfloat16(device) else "float32"


def budget(check: int, cpu: int, gpu: int) -> int:
    """How long a training cell runs, in steps: by device, or as `$LDM_EDU_BUDGET` (check, cpu or gpu) says.

    >>> steps = budget(check=30, cpu=400, gpu=5_000)
    """
    wish = os.environ.get("LDM_EDU_BUDGET") or ("cpu" if pick_device().type == "cpu" else "gpu")
    steps = {"check": check, "cpu": cpu, "gpu": gpu}
    if wish not in steps:
        raise UserError(f"LDM_EDU_BUDGET is {wish!r}; it can be check, cpu or gpu.")
    return steps[wish]


def noise(shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """Standard normal noise `(len(seeds), *shape)` on the CPU, picture i from its own seed.

    So a picture depends on its seed alone: not on the batch it is drawn in, nor on the device.
    """
    return PictureNoise(seeds)(shape)


class PictureNoise:
    """Draws noise for a batch, picture i from its own seed; each call goes on where the last one stopped.

    Raises:
        UserError: a seed that is no integer from 0 to 2**32 - 1: of larger ones torch would use these bits alone.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        try:
            numbers = [operator.index(seed) for seed in seeds]
            if not all(0 <= number < 2**32 for number in numbers):
                raise ValueError("out of range")
        except (TypeError, ValueError) as error:
            raise UserError(f"Seeds are integers from 0 to 2**32 - 1; they are {seeds}.") from error
        self.generators = [torch.Generator().manual_seed(number) for number in numbers]

    def __call__(self, shape_of_one: Sequence[int]) -> Tensor:
        """Standard normal noise `(number of seeds, *shape_of_one)`, on the CPU."""
        return torch.stack([torch.randn(*shape_of_one, generator=g) for g in self.generators])


def refuse_bytes(images: Tensor) -> None:
    """Refuse pictures of integers: they would be taken for values in [-1, 1]."""
    if not images.is_floating_point():
        raise UserError(f"Pictures are floats in [-1, 1], not {images.dtype}: images / 127.5 - 1 makes them of bytes.")


def uses_bfloat16(device: torch.device, precision: str = "auto") -> bool:
    """What "float32", "bfloat16" or "auto" (bfloat16 on a GPU that is fast in it) means on a device.

    Raises:
        UserError: another word.
    """
    if precision not in ("auto", "float32", "bfloat16"):
        raise UserError(f"The precision is auto, float32 or bfloat16, not {precision!r}.")
    return precision == "bfloat16" or (
        precision == "auto" and device.type == "cuda" and has_fast_bfloat16(device)
    )


def autocast(device: torch.device, precision: str = "auto") -> AbstractContextManager:
    """The context in which a network runs; see `uses_bfloat16`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bfloat16(device, precision))


def data_folder() -> Path:
    """Where data sets lie: `$LDM_EDU_DATA`, by default the repository's `data/`."""
    return Path(os.environ.get("LDM_EDU_DATA") or REPOSITORY / "data").expanduser()


def in_notebook() -> bool:
    """Whether this is a Jupyter kernel."""
    return "ipykernel" in sys.modules


def progress(iterable: Iterable | None = None, total: int | None = None, desc: str = "") -> tqdm:
    """A progress bar: on stderr in a terminal; in a notebook on stdout, as text without times.

    (A bar on stderr shows red in a notebook, and its times would differ at every run.) Of several processes the first
    shows it.
    """
    if in_notebook():
        style = dict(
            file=sys.stdout, bar_format="{desc}: {bar:30} {n_fmt}/{total_fmt}", ascii=" #", mininterval=0.5
        )
    else:
        style = dict(file=sys.stderr)
    return tqdm(iterable, total=total, desc=desc, disable=os.environ.get("LOCAL_RANK", "0") != "0", **style)


def batches(count: int, size: int) -> Iterator[slice]:
    """Slices that cut `range(count)` into pieces of at most `size`."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
