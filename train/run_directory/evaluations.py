"""What an evaluation by itself asks of the ranks in a directory of its own, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shardwright.train.durable import write_text
from shardwright.train.run_directory.names import EVALUATED, EVALUATION, EVALUATIONS


@dataclass(frozen=True)
class Evaluated:
    """What was measured."""

    metrics: Mapping[str, float]
    """By the names of metrics.jsonl."""
    samples: int = 0
    """Of which eval_loss is."""
    sets: Mapping[str, int] = field(default_factory=dict)
    """Samples of each set that has a name."""


def request(directory: Path, step: int) -> None:
    """Have the ranks that start in a directory evaluate once, and train nothing.

    ``step`` is that of the weights, for what is shown.
    """
    write_text(directory / EVALUATION, json.dumps({"step": step}) + "\n")


def asked(directory: Path) -> int | None:
    """Return the step of what is to be evaluated in a directory; None where it is a run's own."""
    try:
        return int(json.loads((directory / EVALUATION).read_text())["step"])
    except FileNotFoundError:
        return None


def conclude(directory: Path, found: Evaluated) -> None:
    """Write down what was measured."""
    write_text(directory / EVALUATED, json.dumps(asdict(found)) + "\n")


def outcome(directory: Path) -> Evaluated | None:
    """Return what was measured; None where the ranks did not get that far."""
    try:
        return Evaluated(**json.loads((directory / EVALUATED).read_text()))
    except FileNotFoundError:
        return None


def record(run_dir: Path, entry: Mapping[str, Any]) -> None:
    """Append a line to the run's evaluations.jsonl."""
    with (run_dir / EVALUATIONS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
