"""`shardwright status`: what each run is doing, how far it is and how long it will take."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from shardwright.launchers import columns as columns_of
from shardwright.launchers import messages
from shardwright.launchers.columns import NOTHING, Column, seen_from
from shardwright.launchers.runs import Around, Status, everywhere, of, runs_in
from shardwright.launchers.slurm import jobs as slurm
from shardwright.train.errors import UserError
from shardwright.train.paths import absolute
from shardwright.train.units import duration


def main(arguments: Sequence[str]) -> int:
    """Print the state of one run, or a line for each of several."""
    options = parser().parse_args(arguments)
    if options.run_dir == "all":
        found = everywhere(Path.cwd(), _queued())
        if not found:
            print("no runs in runs/ and sweeps/, and none in the queue")
    else:
        found = runs_in(Path(absolute(options.run_dir)))
    if len(found) == 1:
        print(described(of(found[0]), messages.terminal_width()))
    elif found:
        around = Around.now()
        rows = [_of_one_among_many(run_dir, around) for run_dir in found]
        print(table(rows, Path.cwd(), messages.terminal_width()))
    return 0


def _queued() -> Mapping[str, Path]:
    """Return the directories of the jobs in the queue; a warning, and none, where it is silent."""
    try:
        return slurm.working_directories()
    except UserError as error:
        print(f"warning: {error}; only the runs below this directory are shown", file=sys.stderr)
        return {}


def _of_one_among_many(run_dir: Path, around: Around) -> Status:
    try:
        return of(run_dir, around)
    except Exception as error:  # whatever is wrong with one, the others are shown
        return Status(run_dir, f"cannot be read: {str(error).partition(chr(10))[0]}", is_over=True)


def parser() -> argparse.ArgumentParser:
    """Return the command line of `shardwright status`."""
    found = argparse.ArgumentParser(
        prog="shardwright status",
        description="Show whether runs are waiting, running, stopped or done: state in the "
        "queue, step, loss, tokens per second, time left, newest checkpoint.",
    )
    found.add_argument(
        "run_dir",
        metavar="RUN_DIR|all",
        help="one run or a sweep; all: those in runs/ and sweeps/, and yours in SLURM's queue",
    )
    return found


# --- as text --------------------------------------------------------------------------------------


LEAST_RUN, LEAST_STATE = 16, 20
"""Characters that stay of a run's directory and of its state, however narrow the terminal."""
_DISPENSABLE = ("tokens/s", "checkpoint", "job", "left", "loss", "step")
"""Columns that a narrow terminal does without, the first to go first."""


def described(status: Status, width: int | None = None) -> str:
    """Return one run as lines, continued below where they are longer than ``width``. Pure."""
    rows = {
        "state": status.state,
        "job": status.job,
        "step": _step(status),
        "loss": _loss(status),
        "tokens/s": _speed(status),
        "left": _left(status),
        "checkpoint": status.checkpoint or "none yet",
        "model": status.model,
        "resume": f"shardwright resume {shlex.quote(str(status.run_dir))}"
        if status.can_resume
        else None,
    }
    shown = {name: text for name, text in rows.items() if text is not None and text != "-"}
    return "\n".join([str(status.run_dir), *messages.aligned(shown, 12, width)])


def table(statuses: Sequence[Status], here: Path, width: int | None = None) -> str:
    """Return a line for each run, its directory as seen from ``here``. Pure.

    Where that is more than ``width`` characters, columns are left out, first those that hold
    nothing, and the directories and states are shortened.
    """
    rows = [
        (
            seen_from(here, s.run_dir),
            s.job or NOTHING,
            _step(s),
            _loss(s),
            _speed(s),
            _left(s),
            (s.checkpoint or NOTHING).removeprefix("checkpoint-"),
            s.state,
        )
        for s in statuses
    ]
    head = ("run", "job", "step", "loss", "tokens/s", "left", "checkpoint", "state")
    columns = [
        Column(name, tuple(cells), rank=_DISPENSABLE.index(name) if name in _DISPENSABLE else None)
        for name, *cells in zip(head, *rows, strict=True)
    ]
    columns[0] = replace(columns[0], is_text=True, least=LEAST_RUN, keeps_end=True)
    columns[-1] = replace(columns[-1], is_text=True, least=LEAST_STATE)
    return "\n".join(columns_of.table(columns, width))


def _step(status: Status) -> str:
    if status.step is None:
        return "-"
    return str(status.step) + (f"/{status.total_steps}" if status.total_steps else "")


def _loss(status: Status) -> str:
    return f"{status.loss:.4f}" if status.loss is not None else "-"


def _speed(status: Status) -> str:
    return f"{status.tokens_per_second:,.0f}" if status.tokens_per_second is not None else "-"


def _left(status: Status) -> str:
    return duration(status.left_seconds) if status.left_seconds is not None else "-"
