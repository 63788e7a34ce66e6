"""replay.json: that a directory is no run of its own, but steps of one to be looked into again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from shardwright.train.durable import write_text
from shardwright.train.run_directory.names import REPLAY, REPLAYED


@dataclass(frozen=True)
class Replay:
    """What is wanted of the ranks."""

    until_step: int
    """The last step to make."""
    fingerprints: bool = False
    """Whether all bits between modules are counted, to be compared."""


@dataclass(frozen=True)
class Replayed:
    """What came of it."""

    step: int
    """The step up to which the ranks came."""
    diverged: str | None
    """Why they ended there, where that was not to be."""


def request(directory: Path, wanted: Replay) -> None:
    """Have the ranks that start in a directory replay steps, save nothing and make no final/."""
    write_text(directory / REPLAY, json.dumps(asdict(wanted)) + "\n")


def asked(directory: Path) -> Replay | None:
    """Return what is to be replayed in a directory; None where it is a run's own."""
    try:
        return Replay(**json.loads((directory / REPLAY).read_text()))
    except FileNotFoundError:
        return None


def last_step(directory: Path, steps: int) -> int:
    """Return the last step that ranks make, of a run that has this many."""
    wanted = asked(directory)
    return steps if wanted is None else min(steps, wanted.until_step)


def conclude(directory: Path, outcome: Replayed) -> None:
    """Write down what came of a replay."""
    write_text(directory / REPLAYED, json.dumps(asdict(outcome)) + "\n")


def outcome(directory: Path) -> Replayed | None:
    """Return what came of a replay; None where its ranks did not get that far."""
    try:
        return Replayed(**json.loads((directory / REPLAYED).read_text()))
    except FileNotFoundError:
        return None
