"""What was seen of the tensors between modules, and which module made the first bad one. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

LOSS = "the loss"
MODEL = "the model itself"
OUTPUT, INPUT = "output", "input"
OUTPUT_GRADIENT, INPUT_GRADIENT = "gradient of its output", "gradient of its input"
FORWARD, BACKWARD = "forward", "backward"
SHOWN = 60
"""Ranges of a report before the bad one: those of a few blocks."""


@dataclass(frozen=True)
class Place:
    """One of the tensors that pass between modules."""

    module: str
    """Its name in the model; empty for the model itself."""
    kind: str
    """The class of that module."""
    what: str
    """OUTPUT, INPUT, the gradient of one of these, or of a weight by its name."""
    caller: str
    """The module whose own code has called this one."""
    phase: str
    number: int = 0
    """Among several of a call."""

    @property
    def is_made_there(self) -> bool:
        """Whether the module itself has computed it, and not who has called it."""
        return self.what not in (INPUT, OUTPUT_GRADIENT)


@dataclass(frozen=True)
class Seen:
    """A tensor as it was: the range of its absolute values, and all of its bits in one number."""

    place: Place
    smallest: float
    largest: float
    fingerprint: int | None = None


@dataclass(frozen=True)
class Bounds:
    """What the largest absolute value of a tensor may be."""

    largest: float | None = None
    smallest: float | None = None

    def violated(self, seen: Seen) -> str | None:
        """Return what is wrong with a tensor, in a phrase; None where it is as it may be."""
        if math.isnan(seen.largest):
            return "is NaN"
        if math.isinf(seen.largest):
            return "is infinite"
        if self.largest is not None and seen.largest > self.largest:
            return (
                f"reaches {seen.largest:.4g}, past trainer.debug.largest_magnitude={self.largest:g}"
            )
        if self.smallest is not None and seen.largest < self.smallest:
            return (
                f"is at most {seen.largest:.4g}, below "
                f"trainer.debug.smallest_magnitude={self.smallest:g}"
            )
        return None


@dataclass(frozen=True)
class Finding:
    """The first tensor of a micro-batch that is not as it may be, and which module has made it."""

    step: int
    micro_batch: int
    """Of this rank in the step, the first is 1."""
    rank: int
    phase: str
    module: str
    """The innermost one that has computed it; empty for the model itself."""
    kind: str
    what: str
    """The tensor, in a phrase."""
    problem: str
    place: int
    """Its number among the tensors of the micro-batch."""
    report: str = ""
    """The file with the ranges before it."""

    @property
    def named(self) -> str:
        """The module as it is told."""
        if self.module == LOSS:
            return LOSS
        return f"{self.module} ({self.kind})" if self.module else f"{MODEL} ({self.kind})"

    def said(self) -> str:
        """Return all of it in one sentence."""
        return (
            f"first in the {self.phase} pass of {self.named}, on rank {self.rank}, in micro-batch "
            f"{self.micro_batch} of step {self.step:,}: {self.what} {self.problem}"
        )


def first_bad(
    seen: Sequence[Seen],
    bounds: Bounds,
    kinds: dict[str, str],
    *,
    step: int,
    micro_batch: int,
    rank: int,
) -> Finding | None:
    """Return the first tensor past the bounds, in the order in which they were computed.

    A module's inputs are made before it, and the gradients of its outputs behind it: where such a
    one is the first, no module has made it, but the code of the one that calls it. ``kinds`` are
    the classes of modules by name.
    """
    for number, each in enumerate(seen):
        if (problem := bounds.violated(each)) is None:
            continue
        place = each.place
        if place.is_made_there:
            module, kind, what = place.module, place.kind, _its(place)
        else:
            module = place.caller
            kind = kinds.get(module, "")
            what = f"what it computes itself beside {place.module or MODEL}, the {_of(place)},"
        return Finding(step, micro_batch, rank, place.phase, module, kind, what, problem, number)
    return None


def _its(place: Place) -> str:
    if place.module == LOSS:
        return "it"
    if place.what.startswith("gradient of"):
        return f"the {place.what}"
    return f"its {place.what}"


def _of(place: Place) -> str:
    if place.what == INPUT:
        return "input of that"
    return "gradient of that one's output"


def earliest(findings: Iterable[Finding | None]) -> Finding | None:
    """Return the finding that came first, of those of all ranks: by step, micro-batch and place."""
    found = [each for each in findings if each is not None]
    return min(found, key=lambda f: (f.step, f.micro_batch, f.place, f.rank), default=None)


def report(seen: Sequence[Seen], finding: Finding, scale: float | None = None) -> str:
    """Return the text of a finding: what it is, and the ranges before it, the last ones last.

    ``scale`` is what losses are multiplied by, and gradients with them.
    """
    first = max(0, finding.place - SHOWN)
    lines = [finding.said(), ""]
    if scale is not None:
        lines += [f"gradients are multiplied by the loss scale, {scale:g}", ""]
    if first:
        lines += [f"({first} tensors before these were as they may be)"]
    return "\n".join([*lines, *ranges(seen[first : finding.place + 1])]) + "\n"


def ranges(seen: Sequence[Seen]) -> list[str]:
    """Return a table: the range of absolute values of each tensor, in order."""
    lines = [f"{'abs min':>10}  {'abs max':>10}  tensor"]
    for each in seen:
        place = each.place
        name = place.module or MODEL
        number = f" {place.number}" if place.number else ""
        kind = f" ({place.kind})" if place.kind else ""
        lines.append(
            f"{each.smallest:10.2e}  {each.largest:10.2e}  {place.phase} {name}{kind}: "
            f"{place.what}{number}"
        )
    return lines


# --- where two traces part ------------------------------------------------------------------------


@dataclass(frozen=True)
class Traced:
    """All tensors of a micro-batch of one rank."""

    step: int
    micro_batch: int
    rank: int
    seen: tuple[Seen, ...]

    def as_tree(self) -> dict[str, Any]:
        """Return it as JSON has it; what is not finite as text."""
        return {
            "step": self.step,
            "micro_batch": self.micro_batch,
            "rank": self.rank,
            "tensors": [
                [
                    *(s.place.module, s.place.kind, s.place.what, s.place.caller, s.place.phase),
                    *(s.place.number, repr(s.smallest), repr(s.largest), s.fingerprint),
                ]
                for s in self.seen
            ],
        }
