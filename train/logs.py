"""A log per rank, a quiet terminal, and a note that says how a rank failed."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import TextIO

log = logging.getLogger("train")


def open_rank_log(run_dir: Path, rank: int) -> TextIO:
    """Send all that this process prints to logs/rank-<rank>.log; return the terminal as it was.

    Libraries print freely and from C++ too, so the file descriptors are redirected, not
    `sys.stdout`. The terminal is left to what is written to the returned stream on purpose.
    """
    logs = run_dir / "logs"
    logs.mkdir(exist_ok=True)
    _failure(run_dir, rank).unlink(missing_ok=True)  # of an earlier start
    terminal = os.fdopen(os.dup(1), "w", buffering=1)
    file = os.open(logs / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    faulthandler.enable()
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format=f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s",
        force=True,
    )
    return terminal


def note_failure(run_dir: Path, rank: int, error: BaseException) -> Path:
    """Write logs/rank-<rank>.error.json, from which the launcher tells who failed first."""
    path = _failure(run_dir, rank)
    note = {
        "time": time.time(),
        "rank": rank,
        "host": socket.gethostname(),
        "kind": type(error).__name__,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(note))
    temporary.rename(path)
    return path


def _failure(run_dir: Path, rank: int) -> Path:
    return run_dir / "logs" / f"rank-{rank}.error.json"
