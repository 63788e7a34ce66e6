"""logs/rank-N.error.json: how a rank failed, and which did so first."""

from __future__ import annotations

import json
import socket
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from shardwright.train.durable import write_text
from shardwright.train.run_directory.names import FAILURES, LOGS, failure


def note_failure(
    run_dir: Path,
    rank: int,
    error: BaseException,
    explanation: str | None = None,
    host: str | None = None,
) -> bool:
    """Write logs/rank-<rank>.error.json, from which the launcher tells who failed first.

    ``explanation`` says to a person what the traceback does not; ``host`` is where the rank runs,
    unless it is here. Returns whether this is the first
    rank to say this: what all ranks find out is told once.
    """
    path = failure_file(run_dir, rank)
    noted_at = time.time()
    note = {
        "time": noted_at,
        "rank": rank,
        "host": host or socket.gethostname(),
        "kind": type(error).__name__,
        "message": str(error),
        "explanation": explanation,
        "traceback": "".join(traceback.format_exception(error)),
    }
    write_text(path, json.dumps(note))
    others = (other for other in path.parent.glob(FAILURES) if other != path)
    return not any(_says(other, str(error), before=(noted_at, rank)) for other in others)


def _says(path: Path, message: str, *, before: tuple[float, int]) -> bool:
    try:
        note = json.loads(path.read_text())
        return note["message"] == message and (note["time"], note["rank"]) < before
    except (OSError, ValueError, KeyError, TypeError):
        return False


def has_failure(run_dir: Path, since: float) -> bool:
    """Whether some rank of the run has noted its failure since then, in seconds of the epoch."""
    try:
        return any(path.stat().st_mtime >= since for path in (run_dir / LOGS).glob(FAILURES))
    except OSError:
        return False


def failure_file(run_dir: Path, rank: int) -> Path:
    return run_dir / LOGS / failure(rank)


@dataclass(frozen=True)
class RankFailure:
    """One logs/rank-<N>.error.json, which a rank writes when it ends before its work is done.

    ``kind`` is the class of its exception; "UserError" is bad input.
    """

    time: float
    rank: int
    host: str
    kind: str
    message: str
    traceback: str
    explanation: str | None = None
    """What the traceback does not say to a person: which memory or disk ran out, and the remedy."""


def rank_failures(run_dir: Path) -> list[RankFailure]:
    """Read what the ranks left, the first to fail first; unreadable files are skipped."""
    failures = []
    for path in (run_dir / LOGS).glob(FAILURES):
        try:
            note = json.loads(path.read_text(encoding="utf-8"))
            failures.append(
                RankFailure(
                    time=float(note["time"]),
                    rank=int(note["rank"]),
                    host=str(note["host"]),
                    kind=str(note["kind"]),
                    message=str(note["message"]),
                    traceback=str(note["traceback"]),
                    explanation=note.get("explanation"),
                )
            )
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return sorted(failures, key=lambda failure: failure.time)
