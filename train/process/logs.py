"""A log per rank, a quiet terminal, and a note that says how a rank failed."""

from __future__ import annotations

import faulthandler
import logging
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from shardwright.train.console import terminal
from shardwright.train.run_directory.failures import failure_file
from shardwright.train.run_directory.names import FAILURES, LOGS, RUN_LOG, rank_log

if TYPE_CHECKING:
    from shardwright.train.config.launcher import LogLevel
    from shardwright.train.process.rank import Rank


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
    logs = run_dir / LOGS
    logs.mkdir(exist_ok=True)
    failure_file(run_dir, rank.index).unlink(missing_ok=True)  # of an earlier start
    if rank.index == 0:  # that may have had more ranks
        for path in logs.glob(FAILURES):
            number = path.name.removeprefix("rank-").removesuffix(".error.json")
            if number.isdecimal() and int(number) >= rank.world_size:
                path.unlink(missing_ok=True)
    console = terminal.Terminal(os.dup(1), sys.stdout.encoding)
    file = os.open(logs / rank_log(rank.index), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
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
        console.copies.append(terminal.Lines(logs / RUN_LOG))
    return console


def keep_from(level: LogLevel) -> None:
    """Keep what libraries say from a level on, of transformers too, unless the user names another.

    Before transformers is imported, which reads its own level then.
    """
    logging.getLogger().setLevel(level.upper())
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", level)


def label(rank: Rank, nodes: int) -> str:
    """Return "[rank 3, node7/1]", as a job's log has it: rank, node and local rank.

    On the only node that is "[rank 3]": its name would say nothing, and both numbers are the same.
    """
    where = f", {socket.gethostname()}/{rank.local_index}" if nodes > 1 else ""
    return f"[rank {rank.index}{where}]"


def quiet_libraries() -> None:
    """Keep off the terminal what libraries say to who writes the calls, and transformers' bars.

    Before torch and transformers are imported: they speak of kernels for GPUs as they are.
    """
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as of_transformers

    of_transformers.disable_progress_bar()
    of_transformers.set_verbosity_error()
