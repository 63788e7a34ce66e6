"""From which checkpoint, and with which settings, a step of a run is made again. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardwright.train.errors import UserError
from shardwright.train.run_directory.names import RUN_CONFIG


@dataclass(frozen=True)
class Segment:
    """Steps of a run that were made with one config."""

    after: int
    """They begin behind this step."""
    config: str
    """Its file, relative to the run's directory."""


def segments(history: Sequence[Mapping[str, Any]]) -> list[Segment]:
    """Return the parts of a run as it is now: what a resume made anew is no longer what it was."""
    found = [Segment(0, RUN_CONFIG)]
    for entry in history:
        if "config" not in entry:  # started again, with what it had
            continue
        name = entry.get("checkpoint")
        after = int(name.rpartition("-")[2]) if name else 0
        found = [segment for segment in found if segment.after < after]
        found.append(Segment(after, entry["config"]))
    return found


def in_force(parts: Sequence[Segment], step: int) -> Segment:
    """Return with what a step was made."""
    return [segment for segment in parts if segment.after < step][-1]


def beginning(parts: Sequence[Segment], saved: Sequence[int], step: int) -> int:
    """Return the step behind which a replay begins: the newest checkpoint's before it, or 0.

    ``saved`` are the steps of whole checkpoints. Raises UserError where the run was resumed with
    other settings in between.
    """
    if step < 1:
        raise UserError(f"--replay={step}: a run's first step is 1")
    first = max((each for each in saved if each < step), default=0)
    segment = in_force(parts, step)
    if first < segment.after:
        there = f"checkpoint-{first}" if first else "the run's beginning"
        raise UserError(
            f"step {step:,} was made after a resume from checkpoint-{segment.after} with settings "
            f"of its own ({segment.config}), and that checkpoint is gone: from {there} on other "
            "steps would be made; replay a step for which a checkpoint is left "
            "(`shardwright checkpoints` lists them), or keep more by checkpoint.keep_last"
        )
    return first
