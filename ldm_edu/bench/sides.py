"""The two sides of a bench: each works alone in a process of its own, turn by turn.

Times are medians of alternating runs (ours, theirs, ours, theirs, ...) after a warm-up; `ratio` is their time by ours,
so above 1 we are faster. Nothing else should be running.

Memory is all that a side needs, its weights included: on a CUDA GPU the most that torch had allocated during a call,
on a CPU the most that the process had in memory. The system keeps that mark (VmHWM), and it is set back before the
call; both processes have imported both libraries. Only Linux has it: elsewhere the peak is None.
"""

from __future__ import annotations

import ctypes
import gc
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ldm_edu.runtime import UserError, has_fast_bfloat16, pick_device

PROCESS = Path("/proc/self")
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One side of a row: whose network, what it does, and how. A subclass says what the call is, and the peer's class.

    Args:
        task: what is timed.
        compiler: "" for none, "default" for torch.compile as it is, "ours" for `unet.fast.compiled`.
    """

    peer_class: ClassVar[str]

    peer: bool
    device: str
    task: str
    precision: str = "float32"
    channels_last: bool = False
    compiler: str = ""

    @property
    def setting(self) -> str:
        """Precision, and what else is not as usual."""
        how = {"": "", "default": ", torch.compile", "ours": ", compiled our way"}[self.compiler]
        return self.precision + ", channels last" * self.channels_last + how

    @property
    def dtype(self) -> torch.dtype:
        """The precision, as torch names it."""
        return getattr(torch, self.precision)

    def placed(self, thing: Any) -> Any:
        """A network or its input, as the job wants it."""
        order = torch.channels_last if self.channels_last else torch.contiguous_format
        return thing.to(self.device, self.dtype, memory_format=order)

    def call(self) -> Callable[[], Tensor]:
        """The job, ready to run. Weights and input depend on the configuration and the size alone."""
        raise NotImplementedError

    @property
    def precisions(self) -> list[str]:
        """float32, and bfloat16 where the device is fast at it."""
        return ["float32"] + ["bfloat16"] * has_fast_bfloat16(torch.device(self.device))

    def ways(self, compiler: str = "") -> Iterable[Job]:
        """Every precision and memory order; with a compiler, compiled, too, in the last precision.

        That is channels last on a GPU; on a CPU in either order, but for "ours", which lays out the weights by itself.
        """
        for precision, last in product(self.precisions, (False, True)):
            yield replace(self, precision=precision, channels_last=last)
        gpu = self.device != "cpu"
        for last in sorted({gpu, gpu or compiler == "default"}) if compiler else ():
            yield replace(self, precision=self.precisions[-1], channels_last=last, compiler=compiler)


class Sides:
    """`with Sides() as sides:` the two processes."""

    def __enter__(self) -> Sides:
        alone = get_context("spawn")
        self.ours, self.theirs = ProcessPoolExecutor(1, alone), ProcessPoolExecutor(1, alone)
        return self

    def __exit__(self, *_: object) -> None:
        self.ours.shutdown(cancel_futures=True)
        self.theirs.shutdown(cancel_futures=True)

    def run(self, measure: Callable[[Job], Any], job: Job) -> Any:
        """A measurement in the process of the job's side."""
        return (self.theirs if job.peer else self.ours).submit(in_words, measure, job).result()

    def fastest(self, job: Job, compiler: str = "") -> Job:
        """The way with the fastest of three calls, each after one that is not counted. A compiler can fail.

        The ways take turns, since a shared machine has slow moments.
        """
        took = dict.fromkeys(job.ways(compiler), math.inf)
        for way in [*took] * 3:
            try:
                if way in took:
                    self.run(seconds, way)
                    took[way] = min(took[way], self.run(seconds, way))
            except Exception:
                if not way.compiler:
                    raise
                del took[way]
        return min(took, key=took.__getitem__)

    def row(self, name: str, ours: Job, runs: int, theirs: Job | None = None) -> Row:
        """Measure one row; with no runs, the time is that of the warm-up.

        Args:
            theirs: the peer's job, where it is not the same as ours.

        Returns:
            "name", "device", "precision", "ours_s", "peer", "peer_s", "ratio", "max_abs_diff" (between the two
            results), "scale" (the largest value of the peer's), "ours_peak_mb" and "peer_peak_mb" (of 2²⁰ bytes).
        """
        jobs = ours, theirs or replace(ours, peer=True)
        results, peaks, times = zip(*(self.run(first, job) for job in jobs))
        if runs:
            turns = [[self.run(seconds, job) for job in jobs] for _ in range(runs)]
            times = tuple(median(side) for side in zip(*turns))
        same = jobs[0].setting == jobs[1].setting
        return {
            "name": name,
            "device": ours.device,
            "precision": ours.setting if same else f"ours {ours.setting}; peer {jobs[1].setting}",
            "ours_s": times[0],
            "peer": f"diffusers {diffusers().__version__} {ours.peer_class}",
            "peer_s": times[1],
            "ratio": times[1] / times[0],
            "max_abs_diff": float(np.abs(results[0] - results[1]).max()),
            "scale": float(np.abs(results[1]).max()),
            "ours_peak_mb": peaks[0],
            "peer_peak_mb": peaks[1],
        }


def devices(name: str | None) -> list[str]:
    """The one that is named; without a name the CPU, and a GPU if there is one."""
    return [str(pick_device(name))] if name else list(dict.fromkeys(["cpu", str(pick_device())]))


def line(row: Row) -> str:
    """A row in words."""
    how = f"{row['name']} on {row['device']}, {row['precision']}"
    return f"{how}: {row['ours_s']:.4f} s against {row['peer_s']:.4f} s, {row['ratio']:.3f}"


def table(rows: list[Row]) -> str:
    """Rows as lines for people."""
    name, how = (max(len(row[key]) for row in rows) for key in ("name", "precision"))
    aligned = f"{{:<{name}}} {{:<6}} {{:<{how}}} {{:>9}} {{:>9}} {{:>6}} {{:>9}} {{:>8}} {{:>8}}".format
    lines = [aligned("", "device", "precision", "ours s", "peer s", "ratio", "max diff", "ours MB", "peer MB")]
    for row in rows:
        peaks = ("?" if row[side] is None else f"{row[side]:.0f}" for side in ("ours_peak_mb", "peer_peak_mb"))
        times = f"{row['ours_s']:.4f}", f"{row['peer_s']:.4f}", f"{row['ratio']:.3f}", f"{row['max_abs_diff']:.1e}"
        lines.append(aligned(row["name"], row["device"], row["precision"], *times, *peaks))
    peers = " and ".join(dict.fromkeys(row["peer"] for row in rows))
    return "\n".join([*lines, f"The peer is {peers}. A ratio above 1: ours is faster."])


def plot(rows: list[Row], path: Path) -> None:
    """The ratios as bars, in a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    labels = [f"{row['name']} ({row['device']})\n{row['precision']}" for row in rows]
    bars = axes.barh(range(len(rows)), [row["ratio"] for row in rows], color="tab:blue")
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.set(xlabel="times as fast as diffusers", title="Speed with the same weights")
    axes.margins(x=0.12)
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    figure.savefig(path, dpi=120, format="png")


def diffusers() -> ModuleType:
    """The other library.

    Raises:
        UserError: it is not installed.
    """
    try:
        import diffusers
    except ImportError as error:
        raise UserError(
            f"The bench needs diffusers to compare with ({error}). Install it:  pip install -e .[test]"
        ) from error
    diffusers.utils.logging.set_verbosity_error()  # it warns of every .to(dtype)
    return diffusers


# What follows runs in the processes of the two sides.


def in_words(measure: Callable[[Job], Any], job: Job) -> Any:
    """The measurement. An error is told as a RuntimeError, since those of the compiler do not survive the way back."""
    try:
        return measure(job)
    except Exception as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def as_theirs(settings: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    """diffusers' network of these settings, with these weights."""
    with torch.device("meta"):
        network = getattr(diffusers(), settings["_class_name"]).from_config(settings)
    network.load_state_dict(tensors, assign=True)
    return network


def first(job: Job) -> tuple[np.ndarray, float | None, float]:
    """What a first call gives, its peak of memory in MB, and the seconds it took."""
    cuda, linux = job.device.startswith("cuda"), (PROCESS / "clear_refs").exists()
    for kept in [*KEPT]:  # from the search for the fastest way; of this job, too, since training moves weights
        if cuda or kept != job or not job.compiler:
            del KEPT[kept]
    gc.collect()
    if cuda:  # a CUDA graph has its memory since it was recorded: a peak is seen only where that happens again
        torch.compiler.reset()
        torch.cuda.empty_cache()
    call = ready(job)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    elif linux:
        # Memory that is free, but still the process's, would be counted, or used without being seen: it goes back.
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
        (PROCESS / "clear_refs").write_text("5")  # sets the peak back to what is in memory now
    took, result = _timed(call, job.device)
    if job.compiler:
        call()  # which may record a CUDA graph
    peak = None
    if cuda:
        peak = torch.cuda.max_memory_allocated() / 2**20
    elif linux:
        status = dict(line.split(":", 1) for line in (PROCESS / "status").read_text().splitlines())
        peak = int(status["VmHWM"].split()[0]) / 2**10
    return result.float().cpu().numpy(), peak, took


def seconds(job: Job) -> float:
    """Of one call."""
    return _timed(ready(job), job.device)[0]


KEPT: dict[Job, Callable[[], Tensor]] = {}


def ready(job: Job) -> Callable[[], Tensor]:
    """The job's call, kept for the next time: the last one, and those that took a compiler."""
    pick_device(job.device)  # of several GPUs, the one that is waited for and whose memory is read
    if job not in KEPT:
        for other in [other for other in KEPT if not other.compiler]:
            del KEPT[other]
        KEPT[job] = job.call()
    return KEPT[job]


def _timed(call: Callable[[], Tensor], device: str) -> tuple[float, Tensor]:
    wait = (lambda: None) if device == "cpu" else torch.accelerator.synchronize
    wait()
    start = perf_counter()
    result = call()
    wait()
    return perf_counter() - start, result
