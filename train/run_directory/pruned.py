"""pruned.json: a search has stopped this run before its end, at which evaluation and why."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from shardwright.train.durable import write_text
from shardwright.train.run_directory.names import PRUNED


@dataclass(frozen=True)
class Pruned:
    """Why a search has stopped a run: RUN_DIR/pruned.json, there until its ranks start again."""

    step: int
    """Of the evaluation that it was judged by."""
    metric: str
    value: float | None
    """None where that was not a finite number."""
    reason: str
    """Which rule has decided, in a line."""
    trial: int
    """Its number in the study of the search."""
    time: float
    """Seconds since 1970."""

    def __str__(self) -> str:
        return f"pruned at step {self.step}"

    def write(self, run_dir: Path) -> None:
        write_text(run_dir / PRUNED, json.dumps(asdict(self), indent=2) + "\n")


def read(run_dir: Path) -> Pruned | None:
    """Return what has pruned a run; None where nothing has, or where it was resumed since."""
    try:
        return Pruned(**json.loads((run_dir / PRUNED).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def forget(run_dir: Path) -> None:
    """Remove what an earlier start has left."""
    (run_dir / PRUNED).unlink(missing_ok=True)
