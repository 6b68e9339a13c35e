"""Random numbers as a pure function of (seed, index, field): the same on every device, in any order, in any batch."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

MASK = 0xFFFFFFFF
Number = TypeVar("Number", int, Tensor)


def scramble(h: Number) -> Number:
    """A bijection of 32-bit integers that flips about half of the bits for any change of the input.

    The constants are "lowbias32" of C. Wellons' search for integer hashes (2018, public domain).
    """
    h = (h ^ (h >> 16)) * 0x7FEB352D & MASK
    h = (h ^ (h >> 15)) * 0x846CA68B & MASK
    return h ^ (h >> 16)


def uniform(seed: int, index: Tensor, field: int) -> Tensor:
    """Uniform numbers in [0, 1), one for each entry of `index` (int64, any shape), independent for each `field`."""
    start = scramble((seed * 0x9E3779B1 + 0x5BD1E995) & MASK)
    h = scramble((index + start) & MASK)
    h = scramble((h + field * 0x85EBCA77) & MASK)
    return (h >> 8).float() / 2**24


def choice(seed: int, index: Tensor, field: int, options: int) -> Tensor:
    """Uniform integers in 0 .. options-1, one for each entry of `index`."""
    return (uniform(seed, index, field) * options).long().clamp(max=options - 1)
