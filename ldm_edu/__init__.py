"""Latent diffusion models (Rombach et al., CVPR 2022) in modules small enough to read.

The folders are the paper's sections; `ldm_edu.pipeline.LatentDiffusion` is the whole of it in one class.
"""

import os
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

# Threads that wait for work spin for a moment, then sleep. OpenMP's default is to spin for long, which can
# slow a shared machine down; by how much varied widely from run to run. Read when torch is imported; set either
# one to change it.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

try:
    __version__ = version("ldm-edu")
except PackageNotFoundError:  # read from a folder without being installed
    __version__ = "0+uninstalled"


def _misfit() -> str | None:
    """What to tell someone whose torchvision was built for another torch; None where the two fit.

    Metadata decides, at no cost, unless it is suspicious; then the import itself does, so that a pair that
    works in spite of its version numbers is left alone.
    """
    from packaging.requirements import Requirement

    try:
        torch, torchvision = version("torch"), version("torchvision")
        needs = [Requirement(line) for line in requires("torchvision") or []]
    except PackageNotFoundError:
        return None  # Python's own "No module named ..." is clear
    wanted = next((r.specifier for r in needs if r.name == "torch" and not r.marker), None)
    same_build = torch.partition("+")[2] == torchvision.partition("+")[2]
    if same_build and (wanted is None or wanted.contains(torch, prereleases=True)):
        return None
    try:
        import torchvision.ops  # noqa: F401
    except Exception as error:
        return (
            f"torch {torch} and torchvision {torchvision} do not fit together"
            f" (torchvision asks for torch{wanted or ''}; importing it said: {error}).\n"
            "Install both from one place, in one command:  pip install --force-reinstall torch torchvision\n"
            "In this project's own environment:  rm -rf .venv && make setup"
        )
    return None


if _message := _misfit():
    if Path(sys.argv[0]).stem == "ldm-edu":  # at the command line, words and no traceback
        sys.exit(f"ldm-edu: {_message}")
    raise ImportError(_message)
