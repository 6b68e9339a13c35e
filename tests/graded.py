"""What the tests of all exercises ask of a check."""

import re
from collections.abc import Callable, Iterable

import pytest

from ldm_edu.exercises import ExerciseError


def refused(check: Callable, name: str, words: str, answer: Callable, capsys: pytest.CaptureFixture) -> None:
    """The check refuses this answer with these words, and prints nothing."""
    with pytest.raises(ExerciseError, match=f"^{re.escape(name)}: .*{words}"):
        check(answer)
    assert capsys.readouterr().out == ""


def stub(*arguments: object) -> None:
    """What a notebook has in the solution's place."""
    raise NotImplementedError


def broken(*arguments: object) -> None:
    """A learner's slip."""
    raise KeyError("speed")


UNDONE = {
    "not written yet": stub,
    "KeyError: 'speed'": broken,
    "None.*return": lambda *_: None,
    "TypeError.*argument": lambda: 1,
}


def refusals(checks: dict[Callable, str], tables: Iterable[dict[str, Callable]]) -> tuple[Callable, Callable]:
    """Two tests: that wrong solutions are refused in words, and so is what a learner leaves undone.

    Args:
        checks: to the names that they print.
        tables: for each check, the words (a regular expression) in which it refuses which answer.
    """
    wrong = [(c, *row) for c, table in zip(checks, tables, strict=True) for row in table.items()]

    @pytest.mark.parametrize("check, words, answer", wrong, ids=[f"{checks[c]}: {words}" for c, words, _ in wrong])
    def test_wrong(check: Callable, words: str, answer: Callable, capsys: pytest.CaptureFixture):
        refused(check, checks[check], words, answer, capsys)

    @pytest.mark.parametrize("check", checks, ids=checks.values())
    def test_undone(check: Callable, capsys: pytest.CaptureFixture):
        for words, answer in UNDONE.items():
            refused(check, checks[check], words, answer, capsys)

    return test_wrong, test_undone
