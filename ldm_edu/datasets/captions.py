"""Captions of ShapeScenes: natural English in several phrasings, and the relation between two objects."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

SIZES = ("small", "large")
INVERSE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
SAME_SIZE = {"small": ("small", "small", "small", "little"), "large": ("large", "large", "large", "big")}
SAME_SIDE = {"left of": ("left of", "to the left of"), "right of": ("right of", "to the right of")}


class Thing(NamedTuple):
    """An object of a scene by name, its centre in units of the picture's side (y down); None is left open."""

    shape: str
    colour: str | None
    size: str | None
    x: float
    y: float


def relation(a: Thing, b: Thing) -> str:
    """Where `a` is, seen from `b`: above, below, left of or right of, by the longer of the two distances."""
    across, down = a.x - b.x, a.y - b.y
    if abs(across) > abs(down):
        return "left of" if across < 0 else "right of"
    return "above" if down < 0 else "below"


ONE = ("{a}", "{a}", "one {a1}", "there is {a}", "a picture of {a}")
TWO = (
    "{a} {ab} {b}",
    "{a} {ab} {b}",
    "{b} {ba} {a}",
    "there is {a} {ab} {b}",
    "{a} is {ab} {b}",
    "a picture of {a} {ab} {b}",
    "{a} and {b}, the {a2} {ab} the {b2}",
)
THREE = (
    "{a} {ab} {b}, and {c} {cb} the {b2}",
    "{a} {ab} {b}, with {c} {cb} the {b2}",
    "there is {a} {ab} {b}, and {c} {cb} the {b2}",
)


def describe(things: Sequence[Thing], words: Sequence[int], full: bool = False) -> str:
    """A caption for one to three objects.

    Args:
        words: four integers that choose the phrasing and the words; equal integers, equal caption.
        full: name every size and colour. Otherwise one caption in five leaves the sizes out, and one in five some of
            the colours or all; see `leave_open`.
    """
    phrasing, size_word, side_word, short = words
    if not full:
        some = short // 25 % (2 ** len(things) - 1) + 1 if short // 5 % 5 == 0 else 0
        things = leave_open(things, sizes=short % 5 == 0, colours=some)

    def named(*words: str | None) -> str:
        return " ".join(word for word in words if word)

    def side(name: str) -> str:
        options = SAME_SIDE.get(name, (name,))
        return options[side_word % len(options)]

    def noun(thing: Thing, article: bool = True) -> str:
        size = thing.size and SAME_SIZE[thing.size][size_word % 4]
        name = named(size, thing.colour, thing.shape)
        return f"{'an' if name[0] in 'aeiou' else 'a'} {name}" if article else name

    templates = (ONE, TWO, THREE)[len(things) - 1]
    slots = {}
    for letter, thing in zip("abc", things, strict=False):
        slots |= {
            letter: noun(thing),
            letter + "1": noun(thing, article=False),
            letter + "2": named(thing.colour, thing.shape),
        }
    if len(things) > 1:
        ab = relation(things[0], things[1])
        slots |= {"ab": side(ab), "ba": side(INVERSE[ab])}
    if len(things) > 2:
        slots |= {"cb": side(relation(things[2], things[1]))}
    return templates[phrasing % len(templates)].format(**slots)


def leave_open(things: Sequence[Thing], sizes: bool = False, colours: int = 0) -> tuple[Thing, ...]:
    """The same objects with None for their sizes, and for the colour of object k where bit k of `colours` is set.

    If two have the same shape, all colours stay: without them nobody could say which is meant."""
    if len({thing.shape for thing in things}) < len(things):
        colours = 0
    return tuple(
        t._replace(size=None if sizes else t.size, colour=None if colours >> k & 1 else t.colour)
        for k, t in enumerate(things)
    )


def vocabulary(shapes: Sequence[str], colours: Sequence[str]) -> list[str]:
    """Every word that a caption can hold, with the comma, sorted."""
    text = re.sub(r"{\w+}", " ", " ".join([*ONE, *TWO, *THREE]))  # without the slots
    words = set(text.replace(",", " , ").split()) | {"a", "an", "the"} | set(shapes) | set(colours)
    for options in [*SAME_SIZE.values(), *SAME_SIDE.values(), INVERSE]:
        words |= set(" ".join(options).split())
    return sorted(words)
