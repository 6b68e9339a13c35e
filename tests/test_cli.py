"""`ldm-edu` as a program, `train` and `lab`: what goes where, and words instead of tracebacks."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import PROMPT, photo, refused, run

from ldm_edu import cli
from ldm_edu.training import recipes

pytest_plugins = ["commands"]
ROOT = Path(__file__).parents[1]
COMMANDS = ("sample", "reconstruct", "train", "evaluate", "bench", "lab")


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What `training.train` would have been called with."""
    from ldm_edu import training

    calls: list[tuple] = []
    monkeypatch.setattr(training, "train", lambda *names, **options: calls.append((*names, options)))
    return calls


def test_train_passes_on_what_was_said(trained: list[tuple], here: Path):
    result = run("train", "shapes-text", "--out", "mine", "--resume", "--size", "gpu", "--set", "steps=5",
                 "--set", "precision=no")  # fmt: skip
    wanted = {"resume": True, "settings": {"steps": "5", "precision": "no"}, "size": "gpu"}
    assert result.exit_code == 0 and trained == [("shapes-text", Path("mine"), wanted)]


def test_train_defaults(trained: list[tuple], here: Path):
    result = run("train", "shapes-text")
    wanted = {"resume": False, "settings": {}, "size": None}
    assert result.exit_code == 0 and trained == [("shapes-text", Path("runs/shapes-text"), wanted)]
    assert result.stdout == f"{Path('runs/shapes-text/checkpoint')}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["shapes-txt"], ["'shapes-txt'", "shapes-text"]),
        (["shapes-text", "--set", "stepz=5", "--out", "mine"], ["'stepz'", "steps"]),
        (["shapes-text", "--set", "steps=many", "--out", "mine"], ["steps", "'many'"]),
        (["shapes-text", "--set", "steps=0", "--out", "mine"], ["steps", "0"]),
        (["shapes-text", "--set", "steps", "--out", "mine"], ["KEY=VALUE"]),
        (["shapes-text", "--set", "=5", "--out", "mine"], ["KEY=VALUE"]),
        (["shapes-text", "--size", "tpu", "--out", "mine"], ["cpu, gpu", "tpu"]),
    ],
)
def test_train_refuses(here: Path, arguments: list[str], words: list[str]):
    refused(run("train", *arguments), *words)
    assert os.listdir(here) == []


def test_train_for_real(here: Path):
    """Two steps of a recipe, then what may and may not be done with the folder that they leave."""
    short = [f"--set={pair}" for pair in ("steps=2", "batch_size=2", "log_every=1", "save_every=1")]
    recipe = next(name for name in recipes.names() if name.startswith("shapes-kl"))
    result = run("train", recipe, "--out", "mine", *short)
    assert result.exit_code == 0 and result.stdout == f"{Path('mine/checkpoint')}\n", result.stderr
    refused(run("train", recipe, "--out", "mine", *short), "--resume")
    assert run("train", recipe, "--out", "mine", *short, "--resume").exit_code == 0
    refused(run("train", recipe, "--out", "no/such", *short), "does not exist. Create it")
    photo(here / "photo.png")
    scores = json.loads(run("reconstruct", "photo.png", "--checkpoint", "mine/checkpoint", "--json").stdout)
    assert scores["images"] == 1


def test_lab_starts_jupyterlab_on_the_tour(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    tour = tmp_path / "00_tour.ipynb"
    tour.write_text("{}")
    monkeypatch.setattr(cli, "TOUR", tour)
    calls = []
    monkeypatch.setattr(subprocess, "call", lambda command: calls.append(command) or 7)
    assert run("lab", "--no-browser", "--port", "9000").exit_code == 7
    (command,) = calls
    assert command[:3] == [sys.executable, "-m", "jupyterlab"] and str(tour) in command
    assert command[-3:] == ["--no-browser", "--port", "9000"]
    tour.unlink()
    refused(run("lab"), "clone of the project")


def program(*arguments: object, code: str | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = ["-c", code] if code else ["-m", "ldm_edu", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )


def test_help_does_not_wait_for_torch():
    imports = program(
        code="import sys, ldm_edu.cli; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    assert imports.stdout == "[]\n", imports.stderr
    result = program("--help")
    assert result.returncode == 0 and result.stdout.startswith("Usage: ldm-edu ")
    assert all(command in result.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str):
    result = run(command, "--help")
    assert result.exit_code == 0 and len(result.stdout.splitlines()) > 5


def test_mistakes_as_a_program(tmp_path: Path):
    for arguments in (
        [],
        ["draw"],
        ["sample", ""],
        ["sample", "x", "--num", "0"],
        ["sample", "x", "--out", "a/b/c"],
    ):
        result = program(*arguments, cwd=tmp_path)
        assert result.returncode != 0 and result.stderr and not result.stdout
        assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_sample_as_a_program_offline(models: SimpleNamespace, tmp_path: Path):
    """In a process in which every socket is refused; and the same bytes as in this one."""
    code = (
        "import socket, sys\n"
        "def refuse(*_): raise OSError('no network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from ldm_edu.cli import main\n"
        f"sys.argv[1:] = ['sample', {PROMPT!r}, '--checkpoint', {str(models.text)!r}, '--steps', '2']\n"
        "main()\n"
    )
    result = program(code=code, cwd=tmp_path)
    assert result.returncode == 0 and result.stdout == "sample.png\n", result.stderr
    again = run("sample", PROMPT, "--checkpoint", models.text, "--steps", 2, "--out", tmp_path / "again.png")
    assert again.exit_code == 0
    assert (tmp_path / "sample.png").read_bytes() == (tmp_path / "again.png").read_bytes()
