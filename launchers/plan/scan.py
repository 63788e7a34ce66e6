"""Several plans side by side: which settings and which hardware a command line asks to compare."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from shardwright.launchers.plan.candidates import Candidate
from shardwright.launchers.plan.hardware import Hardware
from shardwright.train.errors import UserError

MOST_PLANS = 100
"""Of one command line: each takes a fifth of a second to compose, and some of them a trace."""


@dataclass(frozen=True)
class Plan:
    """One composed run on one hardware, under each strategy that is asked for."""

    hardware: Hardware
    hardware_words: tuple[str, ...]
    """What of the command line makes it what it is."""
    settings: tuple[str, ...]
    """Words of the command line that this one has and others have otherwise."""
    found: tuple[Candidate, ...]


@dataclass(frozen=True)
class Row:
    """A run under one strategy in one of several plans."""

    plan: Plan
    candidate: Candidate

    @property
    def fits(self) -> bool:
        return self.candidate.fits(self.plan.hardware)

    @property
    def tokens_per_second(self) -> float:
        return self.candidate.pace.tokens_per_second if self.candidate.pace else 0.0

    @property
    def device_bytes(self) -> int:
        return self.candidate.peak.device if self.candidate.peak else 0


def rows(plans: Sequence[Plan]) -> list[Row]:
    """Return what there is of several plans: what fits, the fastest first, then the rest. Pure.

    Of equals the order of the plans remains; what does not fit begins with what takes least.
    """
    there_are = [Row(p, c) for p in plans for c in p.found if c.peak is not None]
    fitting = sorted((r for r in there_are if r.fits), key=lambda r: -r.tokens_per_second)
    others = sorted((r for r in there_are if not r.fits), key=lambda r: r.device_bytes)
    return [*fitting, *others]


def values_of(word: str) -> list[str]:
    """Return the words that one with several values stands for: a=1,2 is a=1 and a=2. Pure.

    By Hydra's grammar, so that choice(...) and range(...) are lists as well; what that cannot read
    is one word, and an error of whoever reads it next.
    """
    override = _parsed(word)
    if override is None or not override.is_sweep_override():
        return [word]
    key = word.partition("=")[0]
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def has_lists(words: Sequence[str]) -> bool:
    """Whether any word of a command line has several values. Pure."""
    return any(len(values_of(word)) > 1 for word in words if not word.startswith("-"))


def combined(words: Sequence[str]) -> list[tuple[str, ...]]:
    """Return each combination of the words' values. Pure."""
    return list(itertools.product(*map(values_of, words)))


def differing(each: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Return of each list of words those that not all lists have. Pure."""
    common = set.intersection(*map(set, each)) if each else set()
    return [tuple(word for word in words if word not in common) for words in each]


def check_number(words: Sequence[str]) -> None:
    """Raise UserError where a command line asks for more combinations than can be waited for."""
    plans = math.prod(len(values_of(word)) for word in words if not word.startswith("-"))
    if plans > MOST_PLANS:
        raise UserError(
            f"{plans:,} combinations to plan, and {MOST_PLANS} is the most; give fewer values"
        )


def varied_keys(plans: Sequence[Plan]) -> Iterator[str]:
    """Yield the keys of settings in which plans differ, in the order of the command line. Pure."""
    yield from dict.fromkeys(word.partition("=")[0] for plan in plans for word in plan.settings)


def _parsed(word: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None
