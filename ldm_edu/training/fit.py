"""The training loop: one for everything, from (objective, batches) to averaged weights.

An objective is a module `forward(batch, generator) -> (loss, readings)`. Devices, precision and processes are
accelerate's business; saving is ours, because accelerate's is a pickle.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from ldm_edu.runtime import UserError, has_fast_bfloat16, pick_device, progress
from ldm_edu.training.muon import Muon
from ldm_edu.training.settings import Settings
from ldm_edu.training.state import History, load_state, save_state, saved_steps, saving, started_with

GetBatch = Callable[[torch.Generator], Any]
OnStep = Callable[[int, dict[str, float]], None]


def step_generator(seed: int, step: int, process: int = 0) -> torch.Generator:
    """The generator of one step: what a step draws depends on nothing that came before it.

    Of a seed, torch's CPU generator uses the lowest 32 bits alone, so the three numbers are mixed into those: steps
    count up from places that lie far apart for different seeds and processes.
    """
    place = (seed * 1009 + process) * 0x9E3779B1
    return torch.Generator().manual_seed((place + step) % 2**32)


def learning_rate(settings: Settings, step: int) -> float:
    """Linear warm-up, then half a cosine to zero at the last step."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def update_ema(ema: list[Tensor], weights: list[Tensor], decay: float, step: int) -> None:
    """ema ← d · ema + (1 - d) · weights, with d = min(decay, (1 + n) / (10 + n)) at step n.

    Steps count from 0; the released code does the same, counting from 1.
    """
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(ema, weights, 1 - d)


def fit(
    objective: nn.Module,
    get_batch: GetBatch,
    settings: Settings,
    out: Path | None = None,
    resume: bool = False,
    on_step: OnStep | None = None,
    desc: str = "training",
) -> History:
    """Train `objective`'s weights in place; at the end they are the averaged ones, and all of it is in evaluation mode.

    Args:
        get_batch: a batch on the training device, drawn with the generator that it is given.
        out: where to save states and `history.csv`; None to save nothing.
        resume: go on from the newest state in `out`. On a CPU, bit for bit as if the run had never stopped. Settings
            must be those that it was started with, and so must `objective.facts`, where it has them: a dict of what
            else the run depends on, such as `DiffusionObjective` has.
        on_step: called every `log_every` steps with the step and the mean readings since the last call.

    Returns:
        The history.

    Raises:
        UserError: no weight to train, a loss that is no longer finite, a run in `out` without `resume` or one that was
            started otherwise, or an `out` that cannot be written.
    """
    device = pick_device()
    players = _players(objective)
    if not players[0]:
        raise UserError("There is nothing to train: no weight of the objective has requires_grad set.")
    accelerator = _accelerator(settings, device, idle=len(players) > 1)
    if out is not None:
        out = Path(out)
        prepare_folder(out, resume)
    if device.type == "cuda":
        objective = objective.to(memory_format=torch.channels_last)
    inside = _Inside(objective.to(device).train())
    prepared, optimizer = accelerator.prepare(inside, _optimizer(objective, settings))
    weights = [p for player in players for p in player]
    ema = [w.detach().clone() for w in weights]
    saved = load_state(out, objective, ema, optimizer, settings) if out and resume else None
    start, seconds = (saved["step"], saved["seconds"]) if saved else (0, 0.0)
    if out and resume and not saved:
        warnings.warn(f"No step was saved in {out}: the run begins at step 0.", stacklevel=2)
    main = accelerator.is_main_process
    history = History(out / "history.csv" if out and main else None, keep_to=start)

    began, seen = time.monotonic(), {}
    bar = progress(total=settings.steps, desc=desc)
    bar.update(start)
    for step in range(start, settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step) * group.get("scale", 1.0)
        generator = step_generator(settings.seed, step, accelerator.process_index)
        loss, readings = prepared(get_batch(generator), generator)
        accelerator.backward(loss)
        # Each by its own norm: under a common one, a discriminator's large gradients would shrink the other's, now
        # more and now less, and its momentum would be the mean of a few steps only.
        norm, *_ = [accelerator.clip_grad_norm_(player, settings.gradient_clip) for player in players]
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, weights, settings.ema_decay, step)
        for name, value in {"loss": loss.detach(), "gradient_norm": norm, **readings}.items():
            total, count = seen.get(name, (0, 0))
            seen[name] = total + value, count + 1
        bar.update()
        done = step + 1
        if done % settings.log_every == 0 or done == settings.steps:
            means = {name: float(total) / count for name, (total, count) in seen.items()}
            seen = {}
            # The gradient too: the loss is of the weights before this step, and those after it are saved next.
            if not (math.isfinite(means["loss"]) and math.isfinite(means["gradient_norm"])):
                raise UserError(
                    f"The loss is {means['loss']} and its gradient {means['gradient_norm']} at step {done}: training "
                    "has diverged; what was saved is whole. Try a lower learning_rate, or precision=no."
                )
            history.add(done, means)
            bar.set_postfix_str(f"loss {means['loss']:.4f}")
            if on_step:
                on_step(done, means)
        if out and main and (done % settings.save_every == 0 or done == settings.steps):
            scalars = {"settings": started_with(settings, objective), "seconds": seconds + time.monotonic() - began}
            save_state(out, done, objective, ema, optimizer, scalars)
    bar.close()
    with torch.no_grad():
        torch._foreach_copy_(weights, ema)
    objective.eval()
    history.seconds = seconds + time.monotonic() - began
    history.precision = accelerator.mixed_precision
    return history


class _Inside(nn.Module):
    """What accelerate may change for a run: the objective itself keeps its precision, and can be trained again."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, *given: Any) -> Any:
        return self.objective(*given)


def _accelerator(settings: Settings, device: torch.device, idle: bool) -> Accelerator:
    # Another run of this process may have had another precision, or another device.
    AcceleratorState._reset_state(reset_partial_state=True)
    precision = settings.precision
    if precision == "auto":
        precision = "bf16" if has_fast_bfloat16(device) else "no"
    # With several processes: a discriminator's weights get no gradient in the steps before it has a say.
    several = DistributedDataParallelKwargs(find_unused_parameters=idle)
    return Accelerator(mixed_precision=precision, cpu=device.type == "cpu", kwargs_handlers=[several])


def _optimizer(objective: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    betas = settings.beta1, settings.beta2
    common = dict(lr=settings.learning_rate, betas=betas, weight_decay=settings.weight_decay)
    # A discriminator is played against, not only trained: little momentum, as is usual for GANs, and smaller steps.
    ours, *theirs = _players(objective)
    others = [dict(params=player, betas=(0.5, 0.9), scale=0.5) for player in theirs]
    if settings.optimizer == "muon":
        return Muon(objective, **common, others=others)
    fused = ours[0].device.type in ("cuda", "cpu")
    return torch.optim.AdamW([dict(params=ours), *others], **common, fused=fused)


def _players(objective: nn.Module) -> list[list[nn.Parameter]]:
    """The weights to train: one list, or two where there is a discriminator, which is the second."""
    named = [(name.removeprefix("_orig_mod."), p) for name, p in objective.named_parameters() if p.requires_grad]
    theirs = [p for name, p in named if name.startswith("discriminator.")]
    ours = [p for name, p in named if not name.startswith("discriminator.")]
    return [ours, theirs] if theirs else [ours]


def prepare_folder(out: Path, resume: bool) -> None:
    """Make a run's folder.

    Raises:
        UserError: its parent does not exist, it holds a run that `resume` does not take up, or something else, or it
            cannot be written.
    """
    if not out.parent.is_dir():
        raise UserError(f"Cannot save to {out}: the folder {out.parent} does not exist. Create it first.")
    if out.is_file():
        raise UserError(f"Cannot save to {out}: it is a file. Choose another --out.")
    with saving(out):
        out.mkdir(exist_ok=True)
        inside = [path.name for path in out.iterdir()]
        if inside and not resume:
            raise UserError(f"The folder {out} is not empty. Go on with --resume, or choose another --out.")
        strange = [name for name in inside if not name.startswith(("step-", "history.", "checkpoint."))]
        if strange and not saved_steps(out):
            raise UserError(f"No run was saved in {out}, but {strange[0]} is there. Choose another --out.")
