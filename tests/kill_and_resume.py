"""A training killed with SIGKILL at many moments and resumed, against one that never stopped. Prints JSON.

`python tests/kill_and_resume.py FOLDER`. At the end saving is made non-atomic, to see that caught.

A program of its own: its runs are forked from it, which saves importing torch each time, and torch allows that only
to a process that has not trained itself.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from interruption import run_apart
from safetensors.torch import save_file
from torch import Tensor, nn

import ldm_edu.training.state
from ldm_edu.training.fit import fit
from ldm_edu.training.settings import Settings

SWEPT = Settings(steps=4, batch_size=4, learning_rate=0.05, warmup=2, log_every=1, save_every=2)
LONG = Settings(steps=60, batch_size=4, learning_rate=0.05, warmup=2, log_every=1, save_every=1)


class Objective(nn.Module):
    """A line through noisy points, with noise of its own and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Linear(4, 4)
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, batch: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        self.batches += 1
        noise = torch.randn(batch.shape, generator=generator)
        error = (self.line(batch + 0.1 * noise) - batch.flip(1)).square().mean()
        return error, {"weight": self.line.weight.detach().norm()}


def train(out: Path, settings: Settings, begun: int | None = None) -> None:
    """Train to the end, from wherever `out` is; write a byte to the file `begun` at the first batch."""

    def get_batch(generator: torch.Generator) -> Tensor:
        nonlocal begun
        if begun is not None:
            os.write(begun, b"x")
            begun = None
        return torch.randn(settings.batch_size, 4, generator=generator)

    objective = Objective()
    fit(objective, get_batch, settings, out, resume=True)
    save_file(objective.state_dict(), out / "final.safetensors")


def outcome(out: Path) -> dict[str, str]:
    """Fingerprints of all that a finished run leaves, but for its duration."""
    files = {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    found = {name: hashlib.sha256(content).hexdigest()[:12] for name, content in files.items()}
    return {name: "" if name.endswith("state.json") else print_ for name, print_ in found.items()}


def finish(out: Path, settings: Settings) -> dict[str, str]:
    """What the run leaves in the end; it is never touched again."""
    if run_apart(lambda: train(out, settings), out) != "finished":
        return {"failed": "the run could not be resumed"}
    return outcome(out)


def in_place(folder: Path, files: Mapping[str, bytes]) -> None:
    """A non-atomic `write_folder`: each file is written where it belongs, in two halves."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        with open(folder / name, "wb") as file:
            half = len(content) // 2
            file.write(content[:half])
            file.flush()
            os.fsync(file.fileno())
            file.write(content[half:])


def sweep(folder: Path) -> dict[str, object]:
    """Kill a run at every change of a file in turn: the number of moments, and those after which it went wrong."""
    expected, wrong, at = finish(folder / "whole", SWEPT), [], 0
    while True:
        at += 1
        out = folder / str(at)
        if run_apart(lambda out=out: train(out, SWEPT), out, at) != "killed":
            return {"moments": at - 1, "wrong": wrong}
        if finish(out, SWEPT) != expected:
            wrong.append(at)


def ten_random_kills(folder: Path) -> dict[str, object]:
    """Kill a run ten times by the clock, with saving made slow so that most kills fall into it."""
    sync, rng = os.fsync, random.Random(0)

    def slow(file: int) -> None:
        sync(file)
        time.sleep(0.005)

    expected = finish(folder / "whole", LONG)
    os.fsync = slow
    kills, inside, runs, wrong = 0, 0, 1, []
    while kills < 10:
        out = folder / str(runs)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            try:
                train(out, LONG, write)
            finally:
                os._exit(0)
        os.close(write)
        os.read(read, 1)
        os.close(read)
        time.sleep(rng.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        if os.WIFSIGNALED(os.waitpid(child, 0)[1]):
            kills += 1
            inside += any(out.glob("*.tmp"))
        else:  # it was done before its time had come: compare it, and begin another
            wrong += [runs] * (outcome(out) != expected)
            runs += 1
    os.fsync = sync
    wrong += [runs] * (finish(folder / str(runs), LONG) != expected)
    return {"kills": kills, "inside_saving": inside, "wrong": wrong, "expected": expected}


def warm_up() -> None:
    """What torch and accelerate import when they are first used takes seconds: once here, not in every run."""
    objective = Objective()
    for weight in objective.parameters():
        weight.grad = torch.zeros_like(weight)
    _, optimizer = Accelerator(cpu=True).prepare(objective, torch.optim.AdamW(objective.parameters(), fused=True))
    optimizer.step()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warm_up()
    for name in ("every", "random", "in-place"):
        (folder / name).mkdir()
    result = {"every_moment": sweep(folder / "every"), "random": ten_random_kills(folder / "random")}
    ldm_edu.training.state.write_folder = in_place
    print(json.dumps(result | {"in_place": sweep(folder / "in-place")}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
