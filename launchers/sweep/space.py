"""What a search may propose for each setting: ranges and choices, out of Hydra's grammar. Pure.

It knows no Optuna, so that a definition for W&B is made of the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from hydra.core.override_parser.types import ChoiceSweep, RangeSweep, Sweep

from shardwright.launchers.sweep import grid
from shardwright.launchers.sweep.grid import Groups
from shardwright.train.errors import UserError

Scalar = None | bool | int | float | str
LOG = "log"
"""The one tag that means something here, of an interval."""


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included."""

    low: int | float
    high: int | float
    is_integer: bool = False
    is_log: bool = False
    step: int | float | None = None
    """Distance of values; None where there are too many to be told apart."""

    def word(self, value: Any) -> str:
        """Return a value as it stands behind the = of a command line."""
        return repr(int(value) if self.is_integer else float(value))

    def values(self) -> list[Any] | None:
        """Return all of them in order; None where there is no end to them."""
        if self.step is None:
            return None
        # In decimals, as 0.1 + 2 * 0.1 is not 0.3.
        low, step = Decimal(str(self.low)), Decimal(str(self.step))
        count = int((Decimal(str(self.high)) - low) / step) + 1
        kind = int if self.is_integer else float
        return [kind(low + step * at) for at in range(count)]


@dataclass(frozen=True)
class Choices:
    """Values without an order."""

    choices: tuple[Scalar, ...]
    words: tuple[str, ...]
    """Each as it stands behind the = of a command line."""

    def word(self, value: Any) -> str:
        """Return a value as it stands behind the = of a command line."""
        return self.words[self.choices.index(value)]

    def values(self) -> list[Any] | None:
        """Return all of them."""
        return list(self.choices)


Dimension = Range | Choices
Space = Mapping[str, Dimension]
"""For each setting that is searched what it may be."""


def space(given: Mapping[str, Any], groups: Groups) -> dict[str, Dimension]:
    """Return what a search may propose, of the grid of a sweep."""
    return {key: dimension(key, value, groups) for key, value in given.items()}


def dimension(key: str, given: Any, groups: Groups) -> Dimension:
    """Return what a setting may be, of its values: a list, or text in Hydra's grammar.

    Raises UserError that names the setting and what to write.
    """
    sweep = grid.parsed(f"{key}={given}", groups).value() if isinstance(given, str) else None
    if isinstance(sweep, ChoiceSweep) and any(isinstance(each, Sweep) for each in sweep.list):
        raise UserError(
            f"{key}={given}: a setting has one range, and no list of them; give one that holds "
            "all of it, or list single values"
        )
    axis = grid.axis(key, given, groups)
    if sweep is not None:
        _check_tags(f"{key}={given}", axis.tags, is_interval=axis.interval is not None)
    if found := axis.interval:
        _check_finite(f"{key}={given}", found.low, found.high)
        step = 1 if found.is_integer and not found.is_log else None
        return Range(found.low, found.high, found.is_integer, found.is_log, step)
    if isinstance(sweep, RangeSweep):
        # A search goes through it in its order, whatever shuffle() says.
        low, high = min(axis.values), max(axis.values)
        is_integer = all(isinstance(each, int) for each in (low, high, sweep.step))
        return Range(low, high, is_integer, step=abs(sweep.step))
    pairs = list(zip(axis.values, axis.words, strict=True))
    if isinstance(sweep, ChoiceSweep) and sweep.shuffle:
        pairs.sort(key=lambda pair: pair[1])  # the same at each start
    words = tuple(word for _, word in pairs)
    if twice := [word for at, word in enumerate(words) if word in words[:at]]:
        raise UserError(f"{key}={','.join(words)}: has {twice[0]} twice; leave one out")
    # Optuna keeps scalars alone: a list or a mapping is known by its text.
    scalars = (
        value if value is None or isinstance(value, (bool, int, float, str)) else word
        for value, word in pairs
    )
    return Choices(tuple(scalars), words)


def probes(found: Space) -> list[dict[str, Scalar]]:
    """Return a few points that meet each end and each choice, to be checked before a search. Pure.

    They find what is wrong with a value; what is wrong with two of them together they may not.
    """
    ends = {
        name: list(each.choices) if isinstance(each, Choices) else [each.low, each.high]
        for name, each in found.items()
    }
    count = max((len(values) for values in ends.values()), default=0)
    return [
        {name: values[at % len(values)] for name, values in ends.items()} for at in range(count)
    ]


def overrides(found: Space, values: Mapping[str, Scalar]) -> tuple[str, ...]:
    """Return proposed values as words of a command line, in the order of the space."""
    return tuple(f"{name}={each.word(values[name])}" for name, each in found.items())


def combinations(found: Space) -> int | None:
    """Return the number of points that a grid over a space has; None where it has no end."""
    sizes = [len(values) for each in found.values() if (values := each.values()) is not None]
    return math.prod(sizes) if len(sizes) == len(found) else None


def _check_tags(text: str, tags: frozenset[str], *, is_interval: bool) -> None:
    for tag in sorted(tags):
        if tag == LOG and not is_interval:
            raise UserError(
                f"{text}: log is for an interval; write tag(log,interval(lowest,highest)), or of "
                "whole numbers tag(log,int(interval(lowest,highest)))"
            )
        if tag != LOG:
            raise UserError(f"{text}: the only tag that a search knows is log, not {tag}")


def _check_finite(text: str, *ends: float) -> None:
    for end in ends:
        if not math.isfinite(end):
            raise UserError(f"{text}: is not a range, as it has no end at {end}; give a number")
