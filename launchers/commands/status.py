"""`shardwright status`: what each run is doing, how far it is and how long it will take."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from shardwright.launchers import messages
from shardwright.launchers.runs import Status, everywhere, of, runs_in
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
        rows = [_of_one_among_many(run_dir) for run_dir in found]
        print(table(rows, Path.cwd(), messages.terminal_width()))
    return 0


def _queued() -> Mapping[str, Path]:
    """Return the directories of the jobs in the queue; a warning, and none, where it is silent."""
    try:
        return slurm.working_directories()
    except UserError as error:
        print(f"warning: {error}; only the runs below this directory are shown", file=sys.stderr)
        return {}


def _of_one_among_many(run_dir: Path) -> Status:
    try:
        return of(run_dir)
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


_LEAST_RUN, _LEAST_STATE = 16, 20
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
    head = ["run", "job", "step", "loss", "tokens/s", "left", "checkpoint", "state"]
    rows = [
        [
            str(s.run_dir.relative_to(here) if s.run_dir.is_relative_to(here) else s.run_dir),
            s.job or "-",
            _step(s),
            _loss(s),
            _speed(s),
            _left(s),
            (s.checkpoint or "-").removeprefix("checkpoint-"),
            s.state,
        ]
        for s in statuses
    ]
    columns = {name: list(column) for name, *column in zip(head, *rows, strict=True)}
    if width is not None:
        columns = _fitted(columns, width)
    lines = zip(*([name, *column] for name, column in columns.items()), strict=True)
    widths = {name: max(map(len, [name, *column])) for name, column in columns.items()}
    return "\n".join(
        "  ".join(
            cell.ljust(widths[name]) if name in ("run", "state") else cell.rjust(widths[name])
            for cell, name in zip(cells, columns, strict=True)
        ).rstrip()
        for cells in lines
    )


def _fitted(columns: Mapping[str, list[str]], width: int) -> dict[str, list[str]]:
    """Return the columns of a table that fit a width, with what is shortened cut at a "…"."""
    kept = dict(columns)

    def needs(name: str) -> int:
        return max(map(len, [name, *kept[name]]))

    def left() -> int:
        """Return what is left for directories and states."""
        others = [name for name in kept if name not in ("run", "state")]
        return width - sum(needs(name) + 2 for name in others) - 2

    least = min(needs("run"), _LEAST_RUN) + min(needs("state"), _LEAST_STATE)
    empty = [name for name in kept if set(kept[name]) == {"-"}]
    for name in dict.fromkeys([*empty, *_DISPENSABLE]):
        if left() >= needs("run") + needs("state") or (name not in empty and left() >= least):
            break
        del kept[name]
    for_run = min(needs("run"), max(_LEAST_RUN, left() - min(needs("state"), _LEAST_STATE)))
    for_state = max(_LEAST_STATE, left() - for_run)
    # The end of a path tells runs apart, and the beginning of a state what it is.
    kept["run"] = [t if len(t) <= for_run else f"…{t[1 - for_run :]}" for t in kept["run"]]
    kept["state"] = [t if len(t) <= for_state else f"{t[: for_state - 1]}…" for t in kept["state"]]
    return kept


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
