"""What the tests of all exercises ask of a check."""

import re
from collections.abc import Callable

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
