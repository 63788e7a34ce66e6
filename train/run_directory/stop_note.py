"""stopped.json: where a run was stopped, and why."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from shardwright.train.durable import write_text
from shardwright.train.run_directory.names import STOPPED

NOTE = STOPPED


@dataclass(frozen=True)
class Stopped:
    """Where a run has stopped: RUN_DIR/stopped.json, there until its ranks start again.

    It tells the outcome where exit codes do not: torchrun turns each of its ranks' into 1.
    """

    step: int
    samples: int
    reason: str
    time: float
    """Seconds since the epoch."""
    checkpoint: str | None
    """The newest whole checkpoint; of an earlier step where ``unsaved`` says why."""
    progress_steps: int
    """Steps made since the ranks were started."""
    unsaved: str | None = None
    """Why the last steps are not in a checkpoint."""
    while_preparing: bool = False
    """Whether that was before any rank was started, while the data were being prepared."""

    def __str__(self) -> str:
        where = "while preparing data" if self.while_preparing else f"at step {self.step}"
        return f"stopped {where} by {self.reason}"

    def write(self, run_dir: Path) -> None:
        write_text(run_dir / NOTE, json.dumps(asdict(self), indent=2) + "\n")


def read(run_dir: Path) -> Stopped | None:
    """Return where a run has stopped; None where it has not, or has been resumed."""
    try:
        return Stopped(**json.loads((run_dir / NOTE).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def forget(run_dir: Path) -> None:
    """Remove what an earlier start has left."""
    (run_dir / NOTE).unlink(missing_ok=True)
