"""A torch and a torchvision that do not fit: a message that says what to do, not a missing operator."""

import os
import subprocess
import sys
from pathlib import Path

import ldm_edu

ROOT = Path(__file__).parents[1]
BROKEN = 'raise RuntimeError("operator torchvision::nms does not exist")\n'


def pretend(folder: Path, torch: str, torchvision: str, needs: str, body: str) -> None:
    """Distributions found before the installed ones; `body` is what importing torchvision runs."""
    for name, version, extra in [
        ("torch", torch, ""),
        ("torchvision", torchvision, f"Requires-Dist: {needs}\n"),
    ]:
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{extra}")
    (folder / "torchvision").mkdir()
    (folder / "torchvision/__init__.py").write_text(body)
    (folder / "torchvision/ops.py").write_text("")


def run(folder: Path, code: str, name: str = "program.py") -> subprocess.CompletedProcess:
    """Run `code` as a program called `name` that sees the pretended distributions first."""
    (folder / name).write_text(code)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    return subprocess.run(
        [sys.executable, folder / name], env=env, capture_output=True, text=True, timeout=60
    )


def test_a_misfit_is_told_in_words(tmp_path: Path):
    pretend(tmp_path, "2.5.0", "0.29.2", "torch (>=2.14.0)", BROKEN)
    result = run(tmp_path, "try:\n    import ldm_edu\nexcept ImportError as error:\n    print(error)")
    assert "torch 2.5.0 and torchvision 0.29.2 do not fit together" in result.stdout
    assert "torch>=2.14.0" in result.stdout and "pip install" in result.stdout


def test_the_command_line_shows_no_traceback(tmp_path: Path):
    pretend(tmp_path, "2.5.0", "0.20.1", "torch (==2.5.1)", BROKEN)
    result = run(tmp_path, "import ldm_edu", name="ldm-edu")
    assert result.returncode == 1
    assert "do not fit together" in result.stderr and "Traceback" not in result.stderr


def test_builds_from_two_places_are_told_too(tmp_path: Path):
    pretend(tmp_path, "2.5.1+cpu", "0.20.1+cu124", "torch (==2.5.1)", BROKEN)
    assert "do not fit together" in run(tmp_path, "import ldm_edu").stderr


def test_a_pair_that_works_in_spite_of_its_numbers_is_left_alone(tmp_path: Path):
    pretend(tmp_path, "2.6.0a0+nv", "0.20.0a0", "torch (==2.5.1)", "")
    assert run(tmp_path, "import ldm_edu; print(ldm_edu.__version__)").returncode == 0


def test_a_fitting_pair_costs_no_import():
    code = "import sys, ldm_edu; sys.exit('torch' in sys.modules or 'torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
    assert ldm_edu.__version__
