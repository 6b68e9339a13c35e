"""What the numbers of an encoder, a decoder or a UNet must be; each of their levels has half the resolution."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

from ldm_edu.runtime import UserError


def check_levels(config: Any) -> None:
    """Make tuples of a config's `channel_multipliers` and `attention_levels`, lists perhaps, and look at both.

    Raises:
        UserError: there is no level, one of no integer width, or attention in one that does not exist.
    """
    for name in ("channel_multipliers", "attention_levels"):
        object.__setattr__(config, name, tuple(getattr(config, name)))  # it is frozen
    count = len(config.channel_multipliers)
    if not count:
        raise UserError("channel_multipliers must have a number for each level, at least one; it is empty.")
    if not all(isinstance(m, Integral) and m >= 1 for m in config.channel_multipliers):
        raise UserError(f"channel_multipliers are integers, each at least 1; they are {config.channel_multipliers}.")
    if not {*config.attention_levels} <= {*range(count)}:
        raise UserError(
            f"attention_levels are counted from 0, the highest resolution, to {count - 1}, the lowest; "
            f"they are {config.attention_levels}."
        )


def check_counts(config: Any, *names: str, optional: Sequence[str] = ()) -> None:
    """Look at settings of a config that are counts; the `optional` ones may be None.

    Raises:
        UserError: one is no integer, or below 1.
    """
    for name in (*names, *optional):
        count, told = getattr(config, name), " or None" if name in optional else ""
        if count is None and told:
            continue
        if not isinstance(count, Integral):
            raise UserError(f"{name} must be an integer{told}, not {count!r}.")
        if count < 1:
            raise UserError(f"{name} must be at least 1{told}, not {count}.")
