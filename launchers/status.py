"""`shardwright status`: what each run is doing, how far it is and how long it will take."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launchers import names, report, slurm
from train import config as run_config
from train import final, owner, stop
from train.arguments import decoded
from train.checkpoint import layout
from train.config import Progress, RunConfig, total_steps
from train.data.prepare import noted_samples_wanted
from train.errors import Diverged, UserError
from train.owner import Owner
from train.units import duration

TAIL_BYTES = 2**16
"""Of metrics.jsonl; a line has some 250."""
SILENT_SECONDS = 120.0
"""A run that no process of this machine belongs to is taken for alive for so long at least."""


@dataclass(frozen=True)
class Status:
    """One run as it is now; None stands for what is not known (yet)."""

    run_dir: Path
    state: str
    is_over: bool
    job: str | None = None
    step: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    left_seconds: float | None = None
    checkpoint: str | None = None
    model: str | None = None
    """Where the model is, and of which state of the run."""
    can_resume: bool = False
    """Whether it has ended before its end."""


def main(arguments: Sequence[str]) -> int:
    """Print the state of one run, or a line for each of several."""
    options = _parser().parse_args(arguments)
    if options.run_dir == "all":
        found = everywhere(Path.cwd(), _queued())
        if not found:
            print("no runs in runs/ and sweeps/, and none in the queue")
    else:
        found = runs_in(Path(names.absolute(options.run_dir)))
    if len(found) == 1:
        print(described(of(found[0]), report.terminal_width()))
    elif found:
        rows = [_of_one_among_many(run_dir) for run_dir in found]
        print(table(rows, Path.cwd(), report.terminal_width()))
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shardwright status",
        description="Say of runs whether they wait, run, have stopped or are done: state in the "
        "queue, step, loss, tokens per second, time left, newest checkpoint.",
    )
    parser.add_argument(
        "run_dir",
        metavar="RUN_DIR|all",
        help="one run or a sweep; all: those in runs/ and sweeps/, and yours in SLURM's queue",
    )
    return parser


# --- which runs -----------------------------------------------------------------------------------


def runs_in(directory: Path) -> list[Path]:
    """Return a run's directory itself, or those of a sweep's runs. Raises UserError where none."""
    if (directory / "config.yaml").is_file():
        return [directory]
    if found := _below(directory, "*"):
        return found
    run_config.load(directory)  # says what is wrong with it
    raise AssertionError("not reached")


def everywhere(here: Path, queued: Mapping[str, Path]) -> list[Path]:
    """Return the runs below a working directory, and those of jobs by their working directory."""
    found = [*_below(here, "runs/*"), *_below(here, "sweeps/*/*")]
    for job, directory in queued.items():
        _, _, task = job.partition("_")
        found += _below(directory, task) if task else _below(directory.parent, directory.name)
    return list(dict.fromkeys(found))


def _below(directory: Path, pattern: str) -> list[Path]:
    parents = sorted(directory.glob(pattern), key=lambda p: (p.parent, _number(p.name), p.name))
    return [path for path in parents if (path / "config.yaml").is_file()]


def _number(name: str) -> int:
    return int(name) if name.isdecimal() else -1


# --- one run --------------------------------------------------------------------------------------


def of(run_dir: Path) -> Status:
    """Look at a run's directory, at the queue and at the processes of this machine."""
    config = run_config.load(run_dir)
    known = slurm.job_of(run_dir)
    job = slurm.look(known) if known is not None else None
    batch_size = config.trainer.global_batch_size
    last = logged(run_dir)
    total, done = known_steps(run_dir, config, last), is_done(run_dir, config)
    state, is_over = state_of(
        job,
        is_done=done,
        stopped=stop.read(run_dir),
        failures=report.rank_failures(run_dir),
        ranks_here=len(rank_processes(run_dir)),
        owned=owner.look(run_dir),
        silent_seconds=time.time() - last["time"] if "time" in last else None,
    )
    whole = layout.whole_checkpoints(run_dir / "checkpoints")
    return Status(
        run_dir,
        state,
        is_over,
        job=known,
        step=last.get("step"),
        total_steps=total,
        loss=last.get("loss"),
        tokens_per_second=None if is_over else last.get("tokens_per_second"),
        left_seconds=None if is_over else left_seconds(last, total, batch_size),
        checkpoint=whole[-1][1].name if whole else None,
        model=_model(run_dir),
        can_resume=is_over and not done,
    )


def _model(run_dir: Path) -> str | None:
    if path := final.of(run_dir):
        return str(path)
    if path := final.earlier(run_dir):
        return f"{path}, of before the run was resumed"
    return None


def state_of(
    job: slurm.Job | None,
    *,
    is_done: bool,
    stopped: stop.Stopped | None,
    failures: Sequence[report.RankFailure],
    ranks_here: int,
    owned: tuple[Owner | None, bool],
    silent_seconds: float | None,
    here: str | None = None,
) -> tuple[str, bool]:
    """Return a run's state in words, and whether it is over. Pure.

    ``owned`` is what `owner.look` tells: a lock that is held means that the run lives, on whichever
    host. One that is not means that it has ended where its owner was of this host, ``here``; the
    locks of other hosts do not show on every file system.
    """
    first, is_locked = owned
    if job is not None and not job.is_over:
        text = job.state.lower()
        text += f" on {job.nodes}" if job.nodes else f" ({job.reason})" if job.reason else ""
        return text + (f", restart {job.restarts}" if job.restarts else ""), False
    if is_locked and first is not None and first.doing is not None:
        return f"{first.doing} on {first.host}", False
    if ranks_here:
        return f"running, {ranks_here} rank(s) here", False
    if is_locked:
        return f"running on {first.host}" if first else "running", False
    if stopped is not None:
        return str(stopped), True
    if failures:
        failed = failures[0]
        if failed.kind == Diverged.__name__:
            return f"failed: {failed.message}", True
        what = failed.explanation or f"{failed.kind}: {failed.message}"
        what = what.partition("\n")[0]
        return f"failed: rank {failed.rank} on {failed.host}, {what}", True
    if is_done:
        return "done", True
    if job is not None:
        return f"{job.state.lower()}, exit code {job.exit_code}", True
    if first is not None and first.host == (here or socket.gethostname()):
        doing = f" while {first.doing}" if first.doing else ""
        return f"dead: it was killed or crashed{doing}, and could not say so", True
    if silent_seconds is None:
        return "no step yet, and no process here", False
    if silent_seconds < SILENT_SECONDS:
        return f"running, last heard of {duration(silent_seconds)} ago", False
    return f"silent for {duration(silent_seconds)}", True


def is_done(run_dir: Path, config: RunConfig) -> bool:
    """Return whether a run has come to its end: it has its model, and no step is missing.

    A resume may ask for more steps than there are, and end before the first of them is made.
    """
    if final.of(run_dir) is None:
        return False
    total, saved = (
        known_steps(run_dir, config, logged(run_dir)),
        layout.named(run_dir / "checkpoints"),
    )
    may_end_early = config.trainer.early_stopping_patience is not None
    return may_end_early or total is None or not saved or saved[-1][0] >= total


def logged(run_dir: Path) -> dict[str, Any]:
    """Return each value of a run's metrics as it was logged last."""
    last: dict[str, Any] = {}
    # A line of an evaluation has no loss, and the last has none of the speed.
    for line in tail(run_dir / "metrics.jsonl"):
        last |= line
    return last


def known_steps(
    run_dir: Path, config: RunConfig, last: Mapping[str, Any] | None = None
) -> int | None:
    """Return the steps of a whole run; None where they depend on data not yet prepared.

    ``last`` is what it has logged last: how many steps are left depends on what it has consumed.
    """
    wanted = noted_samples_wanted(config, run_dir)
    if wanted is None and config.trainer.max_steps is None:
        return None
    last = last or {}
    at = Progress(step=last.get("step", 0), samples=last.get("samples", 0))
    return total_steps(config.trainer, wanted, at)


def left_seconds(last: Mapping[str, Any], total: int | None, batch_size: int) -> float | None:
    """Return the time that the rest of the steps takes at the speed of the last ones. Pure.

    ``batch_size`` is that of these steps, in samples; earlier ones may have had another.
    """
    step, speed = last.get("step"), last.get("tokens_per_second")
    if total is None or not step or not speed:
        return None
    tokens_per_sample = last["tokens"] / last["samples"]
    return float((total - step) * batch_size * tokens_per_sample / speed)


def tail(path: Path) -> list[dict[str, Any]]:
    """Return the last lines of a file of JSON lines; one that is being written is left out."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    lines = []
    for line in text.splitlines()[size > TAIL_BYTES :]:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        lines += [entry] if isinstance(entry, dict) else []
    return lines


def is_heard_of(run_dir: Path) -> bool:
    """Return whether a run has logged something of late."""
    lines = tail(run_dir / "metrics.jsonl")
    return bool(lines) and time.time() - lines[-1]["time"] < SILENT_SECONDS


def rank_processes(run_dir: Path) -> list[int]:
    """Return the processes of this machine that are ranks of a run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        # torchrun has the same words, further behind.
        for start in (1, 2):
            if words[start : start + 2] == [b"-m", b"train"]:
                arguments = words[start + 2 : start + 3]
            elif words[start : start + 1] and words[start].endswith(b"/train/__main__.py"):
                arguments = words[start + 1 : start + 2]  # as srun starts it for DeepSpeed
            else:
                continue
            if _is_path(arguments, run_dir):
                found.append(int(path.parent.name))
    return found


def _is_path(words: Sequence[bytes], run_dir: Path) -> bool:
    """Return whether a rank's only argument is the run's directory, plain or encoded."""
    try:
        return [decoded(os.fsdecode(word)) for word in words] == [str(run_dir)]
    except ValueError:  # another program's argument that begins as one that is encoded
        return False


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
    return "\n".join([str(status.run_dir), *report.aligned(shown, 12, width)])


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
