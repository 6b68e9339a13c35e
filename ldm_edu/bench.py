"""Our speed and memory against diffusers': the same weights, the same input, turn by turn in one run.

Each side works alone in a process of its own. Times are medians of alternating runs (ours, theirs, ours, theirs, ...)
after a warm-up; `ratio` is their time by ours, so above 1 we are faster. Nothing else should be running.

Memory is all that a side needs, its weights included: on a CUDA GPU the most that torch had allocated during a call,
on a CPU the most that the process had in memory. The system keeps that mark (VmHWM), and it is set back before the
call; both processes have imported both libraries. Only Linux has it: elsewhere the peak is None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm_edu.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm_edu.interop import first_stage_to_diffusers
from ldm_edu.runtime import UserError, has_fast_bfloat16, pick_device, progress

TASKS = ("encode", "decode")
LARGE = 1024  # pixels
PROCESS = Path("/proc/self")
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One side of a row: whose network, what it does, and how."""

    peer: bool
    config: AutoencoderConfig
    device: str
    size: int  # pixels a side
    task: str = "decode"
    precision: str = "float32"
    channels_last: bool = False

    @property
    def setting(self) -> str:
        """Precision, and the order in memory where it is not the usual one."""
        return self.precision + ", channels last" * self.channels_last


def first_stage(size: int | None = None, runs: int = 10, channels: int = 128, large: bool = False) -> list[Row]:
    """Our first stage against diffusers' `AutoencoderKL`, on the CPU, and on a GPU if there is one.

    Encoding and decoding in float32, in bfloat16 where the device is fast at it, and best against best: each side in
    the precision and memory order that were its fastest in a short trial.

    Args:
        size: of the picture; by default 128 pixels on a CPU and 512 on a GPU.
        runs: of each side, for each row.
        channels: the network's width; 128 is Stable Diffusion's.
        large: also decode 1024×1024 pixels, on a CPU just once.

    Returns:
        rows of "name", "device", "precision", "ours_s", "peer", "peer_s", "ratio", "max_abs_diff" (between the two
        results), "ours_peak_mb" and "peer_peak_mb" (of 2²⁰ bytes).

    Raises:
        UserError: no diffusers here, or a size or width that the network cannot have.
    """
    config = AutoencoderConfig(channels=channels)
    if channels < config.groups or channels % config.groups:
        raise UserError(f"The width is a multiple of {config.groups}, such as 128; it is {channels}.")
    if size is not None and (size < config.f or size % config.f):
        raise UserError(f"The picture's side is a multiple of {config.f} pixels, such as 128; it is {size}.")
    _diffusers()
    rows = []
    for device in dict.fromkeys(["cpu", str(pick_device())]):
        job = Job(False, config, device, size or (128 if device == "cpu" else 512))
        precisions = ["float32"] + ["bfloat16"] * has_fast_bfloat16(torch.device(device))
        total = 2 * len(precisions) + 2 + large
        rows += progress(_rows(job, precisions, runs, large), total=total, desc=f"bench on {device}")
    return rows


def _rows(job: Job, precisions: list[str], runs: int, large: bool) -> Iterator[Row]:
    alone = get_context("spawn")
    with ProcessPoolExecutor(1, alone) as ours, ProcessPoolExecutor(1, alone) as theirs:

        def run(measure: Callable[[Job], Any], job: Job) -> Any:
            return (theirs if job.peer else ours).submit(measure, job).result()

        def fastest(job: Job) -> Job:
            ways = [replace(job, precision=p, channels_last=last) for p in precisions for last in (False, True)]
            return min(ways, key=lambda way: min(run(_seconds, way) for _ in range(3)))

        for precision in precisions:
            for task in TASKS:
                same = replace(job, task=task, precision=precision)
                yield _row(task, same, replace(same, peer=True), runs, run)
        for task in TASKS:
            best = [fastest(replace(job, task=task, peer=peer)) for peer in (False, True)]
            yield _row(f"{task}, best", *best, runs, run)
        if large:
            same = replace(job, size=LARGE)
            once = 0 if job.device == "cpu" else runs
            yield _row(f"decode {LARGE}x{LARGE}", same, replace(same, peer=True), once, run)


def _row(name: str, ours: Job, theirs: Job, runs: int, run: Callable[[Callable, Job], Any]) -> Row:
    """Measure one row; with no runs, the time is that of the warm-up."""
    jobs = ours, theirs
    results, peaks, times = zip(*(run(_result, job) for job in jobs))
    if runs:
        turns = [[run(_seconds, job) for job in jobs] for _ in range(runs)]
        times = tuple(median(side) for side in zip(*turns))
    same = ours.setting == theirs.setting
    return {
        "name": name,
        "device": ours.device,
        "precision": ours.setting if same else f"ours {ours.setting}; peer {theirs.setting}",
        "ours_s": times[0],
        "peer": f"diffusers {_diffusers().__version__} AutoencoderKL",
        "peer_s": times[1],
        "ratio": times[1] / times[0],
        "max_abs_diff": float(np.abs(results[0] - results[1]).max()),
        "ours_peak_mb": peaks[0],
        "peer_peak_mb": peaks[1],
    }


def table(rows: list[Row]) -> str:
    """Rows as lines for people."""
    line = "{:<17} {:<6} {:<24} {:>9} {:>9} {:>6} {:>9} {:>8} {:>8}".format
    lines = [line("", "device", "precision", "ours s", "peer s", "ratio", "max diff", "ours MB", "peer MB")]
    for row in rows:
        peaks = ("?" if row[side] is None else f"{row[side]:.0f}" for side in ("ours_peak_mb", "peer_peak_mb"))
        times = f"{row['ours_s']:.4f}", f"{row['peer_s']:.4f}", f"{row['ratio']:.3f}", f"{row['max_abs_diff']:.1e}"
        lines.append(line(row["name"], row["device"], row["precision"], *times, *peaks))
    return "\n".join([*lines, f"The peer is {rows[0]['peer']}. A ratio above 1: ours is faster."])


# What follows runs in the processes of the two sides.


def _result(job: Job) -> tuple[np.ndarray, float | None, float]:
    """What a first call gives, its peak of memory in MB, and the seconds it took."""
    call, cuda, linux = _call(job), job.device.startswith("cuda"), (PROCESS / "clear_refs").exists()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    elif linux:
        (PROCESS / "clear_refs").write_text("5")  # sets the peak back to what is in memory now
    seconds, result = _timed(call, job.device)
    peak = None
    if cuda:
        peak = torch.cuda.max_memory_allocated() / 2**20
    elif linux:
        status = dict(line.split(":", 1) for line in (PROCESS / "status").read_text().splitlines())
        peak = int(status["VmHWM"].split()[0]) / 2**10
    return result.float().cpu().numpy(), peak, seconds


def _seconds(job: Job) -> float:
    return _timed(_call(job), job.device)[0]


@torch.no_grad()
def _timed(call: Callable[[], Tensor], device: str) -> tuple[float, Tensor]:
    wait = (lambda: None) if device == "cpu" else torch.accelerator.synchronize
    wait()
    start = perf_counter()
    result = call()
    wait()
    return perf_counter() - start, result


@lru_cache(maxsize=1)
def _call(job: Job) -> Callable[[], Tensor]:
    """The job, ready to run. Weights and input depend on the configuration and the size alone."""
    network, generator = _network(replace(job, task="", size=0)), torch.Generator().manual_seed(0)
    c, f = job.config.latent_channels, job.config.f
    shape = (1, 3, job.size, job.size) if job.task == "encode" else (1, c, job.size // f, job.size // f)
    given = _placed(torch.randn(shape, generator=generator).clamp(-1, 1), job)
    if job.task == "encode":
        return lambda: network.encode(given).latent_dist.mean if job.peer else network.encode(given)
    return lambda: network.decode(given).sample if job.peer else network.decode(given)


@lru_cache(maxsize=1)
def _network(job: Job) -> nn.Module:
    peer_class = _diffusers().AutoencoderKL
    torch.manual_seed(0)
    network: nn.Module = AutoencoderKL(job.config)
    if job.peer:
        config, tensors = first_stage_to_diffusers(network)
        with torch.device("meta"):
            network = peer_class.from_config(config)
        network.load_state_dict(tensors, assign=True)
    return _placed(network.eval(), job)


def _placed(thing: Any, job: Job) -> Any:
    """A network or its input, as the job wants it."""
    order = torch.channels_last if job.channels_last else torch.contiguous_format
    return thing.to(job.device, getattr(torch, job.precision), memory_format=order)


def _diffusers() -> ModuleType:
    try:
        import diffusers
    except ImportError as error:
        raise UserError(
            f"The bench needs diffusers to compare with ({error}). Install it:  pip install -e .[test]"
        ) from error
    diffusers.utils.logging.set_verbosity_error()  # it warns of every .to(dtype)
    return diffusers
