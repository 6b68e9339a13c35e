"""The checks of the notebooks' exercises, a file a notebook: each prints `ok: ...` or says what is likely wrong."""

from ldm_edu.exercises.grading import ExerciseError

__all__ = ["ExerciseError"]
