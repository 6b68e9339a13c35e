"""`ldm-edu bench unet`: both sides do the same, each row is what its name says. No time is asserted."""

from collections.abc import Callable
from dataclasses import replace
from inspect import getclosurevars, isfunction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import run
from PIL import Image

from ldm_edu.bench import sides, unet
from ldm_edu.bench.sides import Job, Sides
from ldm_edu.bench.unet import TASKS, UNetJob
from ldm_edu.runtime import UserError
from ldm_edu.training.recipes import shapes_text
from ldm_edu.unet import UNetConfig
from ldm_edu.unet.fast import Denoiser

CONFIG = UNetConfig(
    channels=32, channel_multipliers=(1, 2), blocks=1, attention_levels=(1,), heads=2, context_channels=16
)
TINY = UNetJob(False, "cpu", "forward", config=CONFIG, size=8, tokens=5, batch=2, training_batch=4)


@pytest.mark.parametrize("task", TASKS)
def test_both_sides_do_the_same(task: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(unet, "STEPS", 4)  # divides 1000: the peer steps by 1000 // 4
    ours, _, took = sides.first(replace(TINY, task=task))
    theirs = sides.first(replace(TINY, task=task, peer=True))[0]
    assert ours.shape == theirs.shape and took > 0
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max(), "the same weights and inputs"
    rough = sides.first(replace(TINY, task=task, precision="bfloat16"))[0]
    assert 1e-5 < np.abs(rough - ours).max() < 0.2 * np.abs(ours).max(), "precision is ignored, or breaks it"


def test_a_first_result_is_that_of_new_weights():
    """Also where the search for the fastest way has called the job before: a training step moves the weights."""
    job = replace(TINY, task="training step")
    result = sides.first(job)[0]
    sides.seconds(job), sides.seconds(job)
    assert np.array_equal(sides.first(job)[0], result)


def test_what_each_task_gives():
    calls = {task: replace(TINY, task=task).call() for task in ("forward", "training step")}
    assert calls["forward"]().shape == (4, 4, 8, 8), "guidance asks for twice the batch"
    loss, *gradient = calls["training step"]().tolist()
    assert loss > 0 and len(gradient) == 32 * 4 * 9 and any(gradient)
    assert calls["training step"]()[0] < loss, "it trains"


@pytest.mark.parametrize("peer", [False, True])
def test_sampling_calls_the_network_once_a_step(peer: bool, monkeypatch: pytest.MonkeyPatch):
    calls = []

    def predict(z: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        calls.append((int(t.flatten()[0]), tuple(z.shape), tuple(context.shape)))
        return torch.zeros_like(z)

    monkeypatch.setattr(UNetJob, "_predict", lambda job: predict)
    replace(TINY, task="sampling", peer=peer).call()()
    assert [t for t, *_ in calls] == list(range(999, 0, -40))
    assert {call[1:] for call in calls} == {((4, 4, 8, 8), (4, 5, 16))}


def _wrapped(network: object) -> object:
    """Our way compiles a function that calls the network."""
    return getclosurevars(network).nonlocals["network"] if isfunction(network) else network


@pytest.mark.parametrize("compiler", ["ours", "default"])
def test_compiled_is_compiled_on_both_sides(compiler: str, monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda network, **how: asked.append((network, how)) or network)
    for peer in (False, True):
        replace(TINY, peer=peer, compiler=compiler, precision="bfloat16").call()()
    (ours, how), (theirs, same) = ((_wrapped(network), how) for network, how in asked)
    assert type(ours).__module__ == "ldm_edu.unet.unet" and type(theirs).__module__.startswith("diffusers.")
    assert how and (same == how if compiler == "ours" else same == {})


def test_a_failing_compiler_is_no_result(monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda network, **_: broken)
    with pytest.raises(UserWarning, match="no compiler"):
        replace(TINY, compiler="ours").call()()


class Imagined(Sides):
    """Sides that take as long as `cost` says, in no time."""

    def __init__(self, cost: Callable[[Job], float], broken: str = "default") -> None:
        self.cost, self.broken = cost, broken

    def __enter__(self) -> "Imagined":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, measure: Callable, job: Job) -> Any:
        if job.peer and job.compiler == self.broken:
            raise RuntimeError("no compiler")
        return (np.ones(1), 1.0, 7.0) if measure is sides.first else self.cost(job)


def test_rows(monkeypatch: pytest.MonkeyPatch):
    """In this world a compiler fails on their side; ours is faster with it, and each is in bfloat16."""

    asked = []

    def cost(job: Job) -> float:
        asked.append(job)
        return 8.0 - 2 * (job.precision == "bfloat16") - 1 * bool(job.compiler) + 2 * job.peer - 0.5 * job.channels_last

    monkeypatch.setattr(unet, "Sides", lambda: Imagined(cost))
    monkeypatch.setattr(sides, "has_fast_bfloat16", lambda device: True)

    monkeypatch.setattr(unet, "devices", lambda device: device.split())  # where it is not, too

    def ratios(large: bool, *where: str) -> dict[tuple[str, str], float]:
        return {(row["name"], row["precision"]): row["ratio"] for row in unet.unet(2, large, *where or ("cpu",))}

    eager, ours = "bfloat16, channels last", "bfloat16, compiled our way"
    assert ratios(large=False) == {
        **{(task, "float32"): 10 / 8 for task in TASKS},
        **{(task, "bfloat16"): 8 / 6 for task in TASKS},
        ("training step, best", eager): 7.5 / 5.5,
        **{(f"{task}, best, not compiled", eager): 7.5 / 5.5 for task in ("forward", "sampling")},
        **{(task, ours): 7 / 5 for task in ("forward", "sampling")},
        **{(f"{task}, best", f"ours {ours}; peer {eager}"): 1.5 for task in ("forward", "sampling")},
    }
    assert ratios(large=True) == {("forward, SD 1", "float32"): 10 / 8, ("forward, SD 1", "bfloat16"): 8 / 6}
    tuned = UNetJob(False, "cuda", "forward", "bfloat16", True, config=shapes_text.MODEL)
    ours, kinds = f"{eager}, compiled our way", ("best, peer not compiled", "best")  # the peer's compiler fails
    assert ratios(False, "cuda") == {
        **{(task, "float32"): 10 / 8 for task in TASKS},
        **{(task, "bfloat16"): 8 / 6 for task in TASKS},
        ("training step, best", eager): 7.5 / 5.5,
        **{(task, ours): 6.5 / 4.5 for task in ("forward", "sampling")},
        **{
            (f"{task}, {kind}", f"ours {ours}; peer {eager}"): 7.5 / 4.5
            for task in ("forward", "sampling") for kind in kinds
        },
    }  # fmt: skip
    # Compiled by us: six calls of one search, which serves two rows, and two of each row.
    assert asked.count(replace(tuned, compiler="ours")) == 6 + 3 * 2 and replace(tuned, precision="float32") in asked
    assert replace(tuned, precision="float32", compiler="ours") not in asked, "which takes minutes"
    asked.clear()
    assert set(ratios(True, "cpu cuda", "sampling")) == {
        ("sampling, SD 1", "bfloat16"),
        ("sampling, SD 1", ours),
        *((f"sampling, SD 1, {kind}", f"ours {ours}; peer {eager}") for kind in kinds),
    }
    assert {(job.task, job.precision) for job in asked} == {("sampling", "bfloat16")}, "float32 takes minutes, too"
    with pytest.raises(UserError, match="No 'training step' is timed on cpu at this size.*forward, training step"):
        ratios(True, "cpu", "training step")


def test_a_row_whose_compiler_fails_is_left_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(unet, "Sides", lambda: Imagined(lambda job: 1.0, broken="ours"))
    with pytest.warns(UserWarning, match="No row for sampling, .*, compiled our way: a compiler failed. no compiler"):
        rows = list(unet.unet(2, device="cpu", task="sampling"))
    assert [row["name"].removeprefix("sampling") for row in rows][-2:] == [", best, not compiled", ", best"]
    monkeypatch.setattr(unet, "Sides", lambda: Imagined(lambda job: 1.0, broken=""))  # the peer fails without one
    with pytest.raises(RuntimeError):
        list(unet.unet(2, device="cpu", task="sampling"))


def test_the_devices(monkeypatch: pytest.MonkeyPatch):
    for found, expected in (("cpu", ["cpu"]), ("cuda", ["cpu", "cuda"])):
        monkeypatch.setattr(sides, "pick_device", lambda name=None, found=found: torch.device(name or found))
        assert sides.devices(None) == expected and sides.devices("cpu") == ["cpu"]


def test_a_plot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    row = {"name": "forward", "device": "cpu", "precision": "float32", "ours_s": 0.5, "peer": "diffusers 9", "scale": 1}
    row |= {"peer_s": 0.75, "ratio": 1.5, "max_abs_diff": 2e-6, "ours_peak_mb": 1.0, "peer_peak_mb": 2.0}
    monkeypatch.setattr(unet, "unet", lambda *options: [row, row | {"name": "sampling"}])
    result = run("bench", "unet", "--plot", tmp_path / "ratios.png")
    assert result.exit_code == 0 and len(result.stdout.splitlines()) == 4
    first, second = result.stderr.splitlines()
    assert first == "forward on cpu, float32: 0.5000 s against 0.7500 s, 1.500" and second.startswith("sampling on")
    with Image.open(tmp_path / "ratios.png") as picture:
        assert picture.width > 500


def test_ours_is_the_denoiser_that_samples():
    assert isinstance(TINY._predict(), Denoiser)
