"""rollbacks.jsonl: how often a run has gone back from a spike, and past which data each time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from shardwright.train.config import Progress
from shardwright.train.durable import write_text
from shardwright.train.run_directory.names import METRICS, ROLLBACKS

_ROLLBACK = "rollback"


@dataclass(frozen=True)
class Rollback:
    """One time that a run has gone back."""

    step: int
    """The spike."""
    to_step: int
    """Of the checkpoint."""
    samples: int
    """Where the data continue: the position behind those of the spike."""
    skipped_samples: int
    """From the checkpoint's position to there."""
    spike: Mapping[str, float] = field(default_factory=dict)
    """As metrics.jsonl has it."""

    def __str__(self) -> str:
        return (
            f"from step {self.step:,} to checkpoint-{self.to_step}, past {self.skipped_samples:,} "
            "samples"
        )

    def metrics(self) -> dict[str, str | float]:
        """Return what metrics.jsonl says of it, at the step of the checkpoint."""
        skipped = {"spike_skipped_samples": self.skipped_samples}
        return {"spike": _ROLLBACK, **self.spike, **skipped}


def read(run_dir: Path) -> list[Rollback]:
    """Return the rollbacks of a run, oldest first."""
    path = run_dir / ROLLBACKS
    lines = path.read_text().splitlines() if path.is_file() else []
    return [Rollback(**json.loads(line)) for line in lines]


def append(run_dir: Path, rollback: Rollback) -> None:
    """Note a rollback, on the disk when this returns: a checkpoint that is older knows nothing."""
    lines = [json.dumps(asdict(each)) + "\n" for each in (*read(run_dir), rollback)]
    write_text(run_dir / ROLLBACKS, "".join(lines))


def forget_behind(run_dir: Path, step: int) -> None:
    """Remove the rollbacks to later checkpoints, of a run that begins again at a step."""
    kept = [each for each in read(run_dir) if each.to_step <= step]
    write_text(run_dir / ROLLBACKS, "".join(json.dumps(asdict(each)) + "\n" for each in kept))


def untold(run_dir: Path) -> list[Rollback]:
    """Return the rollbacks of which metrics.jsonl has no line, oldest first."""
    path = run_dir / METRICS
    lines = path.read_text().splitlines() if (found := read(run_dir)) and path.is_file() else []
    told = [json.loads(line) for line in lines if f'"spike": "{_ROLLBACK}"' in line]
    for line in told:
        found = [each for each in found if each.metrics().items() - line.items()]
    return found


def behind(progress: Progress, rollbacks: Iterable[Rollback]) -> Progress:
    """Return where a run stands that is resumed from a checkpoint. Pure.

    What was skipped counts as consumed. A checkpoint that was written after a rollback is behind
    that data already.
    """
    samples = max((each.samples for each in rollbacks), default=0)
    skipped = max(0, samples - progress.samples)
    return replace(
        progress,
        samples=progress.samples + skipped,
        scheduled_samples=progress.scheduled_samples + skipped,
    )
