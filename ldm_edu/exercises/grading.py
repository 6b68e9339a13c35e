"""What every check does: call the learner's function beside the right one, and find the mistake that explains it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Answer = Callable[..., Any]
Mistake = tuple[str, Answer]  # what to say, and a function that makes this mistake


IN_PLACE = (
    "an operation in place, such as x *= y, overwrites what your caller or autograd still needs: x = x * y makes a new "
    "tensor. (Weights are set under torch.no_grad().)"
)


class ExerciseError(AssertionError):
    """A wrong answer, in words for the learner."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: the words alone. Where the check noticed is no help."""
        return [str(self)]


@contextmanager
def answering(name: str) -> Iterator[None]:
    """Turns whatever the learner's function raises into words."""
    try:
        yield
    except ExerciseError as error:
        raise ExerciseError(f"{name}: {error}") from None
    except NotImplementedError:
        raise ExerciseError(
            f"{name}: not written yet. Put your code in place of `raise NotImplementedError`."
        ) from None
    except Exception as error:
        stopped = f"your function stops with {type(error).__name__}: {error}"
        in_place = "inplace" in str(error).replace("-", "")  # torch writes it in both ways
        raise ExerciseError(f"{name}: {IN_PLACE if in_place else stopped}") from error


def grade(
    name: str, answer: Answer, right: Answer, cases: Sequence[tuple], mistakes: Sequence[Mistake] = ()
) -> None:
    """Print `ok: name` where `answer` equals `right` in value and gradients; else name the mistake that fits.

    Args:
        cases: the arguments of each call. Tensors of floats come as leaves, so that gradients reach them.

    Raises:
        ExerciseError: the answer is wrong, raises, or is not written yet.
    """
    with answering(name):
        given = [_outcome(answer, case) for case in cases]
    expected = [_outcome(right, case) for case in cases]
    if _all_same(given, expected):
        print(f"ok: {name}")
        return
    for words, wrong in mistakes:
        if _all_same(given, [_outcome(wrong, case) for case in cases]):
            raise ExerciseError(f"{name}: {words}")
    names = list(inspect.signature(right).parameters)
    for case, one, other in zip(cases, given, expected, strict=True):
        if not _all_same([one], [other]):
            raise ExerciseError(f"{name}: {_difference(names, case, one, other)}")


def grade_values(
    name: str, answer: Answer, right: Answer, cases: Sequence[tuple], mistakes: Sequence[Mistake] = ()
) -> None:
    """`grade` by the values alone, whichever way the learner computes: numbers come as tensors, without gradients."""

    def plain(rule: Answer) -> Answer:
        @functools.wraps(rule)
        def run(*arguments: Any) -> Tensor | None:
            given = (torch.tensor(a) if isinstance(a, float) else a for a in arguments)
            found = rule(*(a.detach() if isinstance(a, Tensor) else a for a in given))
            return found if found is None else torch.as_tensor(found, dtype=torch.float32).detach()

        return run

    grade(name, plain(answer), plain(right), cases, [(words, plain(wrong)) for words, wrong in mistakes])


def _outcome(function: Answer, case: tuple) -> tuple[Any, list[Tensor | None]]:
    """The value, and the gradient that reaches each argument: zero where none does, None where none can."""
    arguments = [a.clone().requires_grad_(a.is_floating_point()) if isinstance(a, Tensor) else a for a in case]
    value = function(*arguments)
    if any(isinstance(a, Tensor) and not torch.equal(a, b) for a, b in zip(arguments, case)):
        raise ExerciseError(IN_PLACE)
    leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    if isinstance(value, Tensor) and value.requires_grad:
        upstream = torch.linspace(0.5, 1.5, value.numel()).view(value.shape)  # no two places alike
        found = torch.autograd.grad(value, leaves, upstream.to(value), allow_unused=True) if leaves else ()
        value = value.detach()
    else:
        found = (None,) * len(leaves)
    gradients = iter(torch.zeros_like(a) if g is None else g for a, g in zip(leaves, found, strict=True))
    return value, [next(gradients) if isinstance(a, Tensor) and a.requires_grad else None for a in arguments]


def _all_same(some: Sequence[tuple], others: Sequence[tuple]) -> bool:
    return all(
        _same(value, other) and all(map(_same, gradients, other_gradients))
        for (value, gradients), (other, other_gradients) in zip(some, others, strict=True)
    )


def _same(one: Any, other: Any) -> bool:
    if not isinstance(other, Tensor):
        one = one.item() if getattr(one, "ndim", None) == 0 else one  # numpy's and torch's single numbers
        return one is other or (isinstance(one, int | float) and one == other)
    if not isinstance(one, Tensor) or one.shape != other.shape:
        return False
    return torch.allclose(one.double(), other.double(), rtol=1e-4, atol=1e-6, equal_nan=True)


def _difference(names: list[str], case: tuple, given: tuple, expected: tuple) -> str:
    """What is different, where no known mistake explains it."""
    (value, gradients), (right, right_gradients) = given, expected
    if value is None:
        return "your function returns None. Is its last line a `return`?"
    if isinstance(right, Tensor) and not isinstance(value, Tensor):
        return f"your answer is a {type(value).__name__}, not a tensor: .item() and float() cut the gradient off."
    if isinstance(right, Tensor) and value.shape != right.shape:
        return f"your answer has the shape {tuple(value.shape)}; it should be {tuple(right.shape)}."
    if not _same(value, right):
        if isinstance(right, Tensor):
            worst = int((value.double() - right.double()).abs().nan_to_num(torch.inf).argmax())
            value, right = f"{value.flatten()[worst]:.6g}", f"{right.flatten()[worst]:.6g}"
        plain = [f"{n} = {a}" for n, a in zip(names, case) if not isinstance(a, Tensor)]
        return f"your answer{' for ' * bool(plain)}{', '.join(plain)} is {value}; it should be {right}."
    wrong = [i for i, (g, r) in enumerate(zip(gradients, right_gradients, strict=True)) if not _same(g, r)]
    flow = "does not get the gradient it should" if right_gradients[wrong[0]].any() else "must get no gradient"
    return f"the value is right, but {names[wrong[0]]} {flow}. Look at what you detach."
