"""final/, the model that a run ends with, and where it lies once the run has gone past it.

Imports no torch.
"""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

from shardwright.train.durable import flush
from shardwright.train.run_directory.names import FINAL, FINAL_EARLIER


def of(run_dir: Path) -> Path | None:
    """Return the model that a run has ended with; None where it has not come to its end."""
    path = run_dir / FINAL
    return path if path.is_dir() else None


def earlier(run_dir: Path) -> Path | None:
    """Return the model of an earlier state of a run, which has gone past it and not yet ended."""
    path = run_dir / FINAL_EARLIER
    return path if path.is_dir() and of(run_dir) is None else None


def why_earlier(run_dir: Path, path: Path) -> str:
    """Say that a run's only model is not that of its last step, and what to do. Pure."""
    quoted = shlex.quote(str(run_dir))
    return (
        f"{run_dir} was resumed after its model was made and has not finished since; "
        f"`shardwright resume {quoted}` makes the new one, `shardwright recover {quoted} OUT` "
        f"one of its newest checkpoint, and the earlier one is {path}: give that to use it"
    )


def set_aside(run_dir: Path) -> None:
    """Give final/ the name of an earlier state's; for the first rank, before a step is made."""
    path = run_dir / FINAL
    if not path.is_dir():
        return
    aside = run_dir / FINAL_EARLIER
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(path, aside)
    flush(run_dir)


def forget_earlier(run_dir: Path) -> None:
    """Remove what `set_aside` has kept, once a new final/ is there."""
    if of(run_dir) is not None:
        shutil.rmtree(run_dir / FINAL_EARLIER, ignore_errors=True)
