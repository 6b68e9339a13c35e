"""Training in two processes, as on two GPUs: different pictures, the same weights, one history. And which device."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm_edu.runtime import has_fast_bfloat16, pick_device


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path: Path):
    """With a discriminator that has no say at first, and so no gradients for the other process to wait for."""
    script = Path(__file__).with_name("several_processes.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, tmp_path]
    environment = os.environ | {"LDM_EDU_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, other = (load_file(tmp_path / f"weights-{rank}.safetensors") for rank in (0, 1))
    assert not torch.equal(one.pop("first batch"), other.pop("first batch"))
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name
    steps = [line.split(",")[0] for line in (tmp_path / "run/history.csv").read_text().splitlines()]
    assert steps == ["step", "2", "4", "6"]
    assert done.stderr.count(" 0/6 ") == 2, "one bar for each training"


@pytest.mark.parametrize(
    "name, rank, chosen", [("cuda:2", None, [2]), ("cuda", "3", [3]), ("cuda:1", "3", [1]), ("cuda", None, [])]
)
def test_which_gpu_of_several(name: str, rank: str | None, chosen: list[int], monkeypatch: pytest.MonkeyPatch):
    """What says "cuda" alone, accelerate among them, means the same one."""
    made: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    monkeypatch.setattr(torch, "empty", lambda *_, device: None)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert pick_device(name).type == "cuda" and made == chosen


@pytest.mark.parametrize("amx, avx, fast", [(True, False, True), (False, True, True), (False, False, False)])
def test_which_processors_are_fast_in_bfloat16(amx: bool, avx: bool, fast: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    assert has_fast_bfloat16(torch.device("cpu")) is fast
