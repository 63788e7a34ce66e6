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
from typing import TYPE_CHECKING

from train import terminal

if TYPE_CHECKING:
    from train.identity import Rank


def open_rank_log(
    run_dir: Path, rank: Rank, *, nodes: int = 1, run_log: bool = False
) -> terminal.Terminal:
    """Send all that this process prints to logs/rank-<rank>.log; return the terminal as it was.

    ``nodes`` is how many the run has.

    Libraries print freely and from C++ too, so the file descriptors are redirected, not
    `sys.stdout`. The terminal is left to what is written to the returned stream on purpose; its
    lines are in this log as well, marked as the rank's own, and with ``run_log`` in logs/run.log,
    where no library speaks.
    """
    terminal.outlive()
    logs = run_dir / "logs"
    logs.mkdir(exist_ok=True)
    _failure(run_dir, rank.index).unlink(missing_ok=True)  # of an earlier start
    if rank.index == 0:  # that may have had more ranks
        for path in logs.glob("rank-*.error.json"):
            number = path.name.removeprefix("rank-").removesuffix(".error.json")
            if number.isdecimal() and int(number) >= rank.world_size:
                path.unlink(missing_ok=True)
    console = terminal.Terminal(os.dup(1), sys.stdout.encoding)
    file = os.open(logs / f"rank-{rank.index}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    faulthandler.enable()
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format=f"%(asctime)s {label(rank, nodes)} %(levelname)s %(name)s: %(message)s",
        force=True,
    )
    console.copies.append(terminal.log_copy(logging.getLogger(terminal.__name__)))
    # Of several nodes only one appends to a file that they share.
    if run_log and (rank.index == 0 or nodes == 1):
        console.copies.append(terminal.Lines(logs / terminal.RUN_LOG))
    return console


def label(rank: Rank, nodes: int) -> str:
    """Return "[rank 3, node7/1]", as a job's log has it: rank, node and local rank.

    On the only node that is "[rank 3]": its name would say nothing, and both numbers are the same.
    """
    where = f", {socket.gethostname()}/{rank.local_index}" if nodes > 1 else ""
    return f"[rank {rank.index}{where}]"


def note_failure(
    run_dir: Path, rank: int, error: BaseException, explanation: str | None = None
) -> bool:
    """Write logs/rank-<rank>.error.json, from which the launcher tells who failed first.

    ``explanation`` says to a person what the traceback does not. Returns whether this is the first
    rank to say this: what all ranks find out is told once.
    """
    path = _failure(run_dir, rank)
    noted_at = time.time()
    note = {
        "time": noted_at,
        "rank": rank,
        "host": socket.gethostname(),
        "kind": type(error).__name__,
        "message": str(error),
        "explanation": explanation,
        "traceback": "".join(traceback.format_exception(error)),
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(note))
    temporary.rename(path)
    others = (other for other in path.parent.glob("rank-*.error.json") if other != path)
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
        return any(
            path.stat().st_mtime >= since for path in (run_dir / "logs").glob("rank-*.error.json")
        )
    except OSError:
        return False


def quiet_libraries() -> None:
    """Keep off the terminal what libraries say to who writes the calls, and transformers' bars.

    Before torch and transformers are imported: they speak of kernels for GPUs as they are.
    """
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as of_transformers

    of_transformers.disable_progress_bar()
    of_transformers.set_verbosity_error()


def _failure(run_dir: Path, rank: int) -> Path:
    return run_dir / "logs" / f"rank-{rank}.error.json"
