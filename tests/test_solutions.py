"""The exercises of the notebooks: the stubs are refused in words, the solutions beside them pass every check."""

import ast
import runpy
from pathlib import Path

import nbformat
import pytest
import torch

from ldm_edu.exercises import ExerciseError

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SOLUTIONS = sorted((NOTEBOOKS / "solutions").glob("*.py"))


def exercises(notebook: Path) -> list[nbformat.NotebookNode]:
    """The cells that hold a stub and the call of its check."""
    cells = nbformat.read(notebook, as_version=4).cells
    return [cell for cell in cells if "raises-exception" in cell.metadata.get("tags", [])]


def checks(source: str) -> set[str]:
    """The checks that a piece of code calls, with what they are given, as in `check_vq_loss(vq_loss)`."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return {ast.unparse(call) for call in calls if ast.unparse(call).startswith("check_")}


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda p: p.name)
def test_solutions_pass_the_checks_of_their_notebook(path: Path, capsys: pytest.CaptureFixture):
    asked = set().union(*(checks(cell.source) for cell in exercises(NOTEBOOKS / f"{path.stem}.ipynb")))
    assert asked and checks(path.read_text(encoding="utf-8")) == asked
    runpy.run_path(str(path), run_name="__main__")
    passed = capsys.readouterr().out.splitlines()
    assert len(passed) == len(asked) and all(line.startswith("ok: ") for line in passed)


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda p: p.name)
def test_stubs_are_refused_in_one_sentence_without_a_traceback(path: Path):
    for cell in exercises(NOTEBOOKS / f"{path.stem}.ipynb"):
        with pytest.raises(ExerciseError, match="not written yet"):
            exec(cell.source, {"torch": torch, "Tensor": torch.Tensor})
        (error,) = (output for output in cell.outputs if output.output_type == "error")
        assert error.traceback == [error.evalue] and "not written yet" in error.evalue


def test_every_notebook_with_exercises_has_solutions():
    with_exercises = [path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb")) if exercises(path)]
    assert with_exercises == [path.stem for path in SOLUTIONS]
