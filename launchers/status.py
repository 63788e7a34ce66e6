"""`shardwright status`: what each run is doing, how far it is and how long it will take."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launchers import report, slurm
from train import config as run_config
from train import final, stop
from train.arguments import decoded
from train.checkpoint import layout
from train.config import RunConfig, total_steps
from train.data.prepare import noted_samples_per_epoch
from train.errors import UserError
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


def main(arguments: Sequence[str]) -> int:
    """Print the state of one run, or a line for each of several."""
    options = _parser().parse_args(arguments)
    if options.run_dir == "all":
        found = everywhere(Path.cwd(), slurm.working_directories())
        if not found:
            print("no runs in runs/ and sweeps/, and none in the queue")
    else:
        found = runs_in(Path(os.path.abspath(options.run_dir)))
    if len(found) == 1:
        print(described(of(found[0])))
    elif found:
        print(table([_of_one_among_many(run_dir) for run_dir in found], Path.cwd()))
    return 0


def _of_one_among_many(run_dir: Path) -> Status:
    try:
        return of(run_dir)
    except UserError as error:
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
    lines = tail(run_dir / "metrics.jsonl")
    last: dict[str, Any] = {}
    for line in lines:  # a line of an evaluation has no loss, and the last has none of the speed
        last |= line
    total = known_steps(run_dir, config)
    state, is_over = state_of(
        job,
        is_done=is_done(run_dir, config),
        stopped=stop.read(run_dir),
        failures=report.rank_failures(run_dir),
        ranks_here=len(rank_processes(run_dir)),
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
        left_seconds=None if is_over else left_seconds(last, total),
        checkpoint=whole[-1][1].name if whole else None,
    )


def state_of(
    job: slurm.Job | None,
    *,
    is_done: bool,
    stopped: stop.Stopped | None,
    failures: Sequence[report.RankFailure],
    ranks_here: int,
    silent_seconds: float | None,
) -> tuple[str, bool]:
    """Return a run's state in words, and whether it is over. Pure."""
    if job is not None and not job.is_over:
        text = job.state.lower()
        text += f" on {job.nodes}" if job.nodes else f" ({job.reason})" if job.reason else ""
        return text + (f", restart {job.restarts}" if job.restarts else ""), False
    if ranks_here:
        return f"running, {ranks_here} rank(s) here", False
    if stopped is not None:
        return f"stopped at step {stopped.step} by {stopped.reason}", True
    if failures:
        first = failures[0]
        return f"failed: rank {first.rank} on {first.host}, {first.kind}: {first.message}", True
    if is_done:
        return "done", True
    if job is not None:
        return f"{job.state.lower()}, exit code {job.exit_code}", True
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
    total, saved = known_steps(run_dir, config), layout.named(run_dir / "checkpoints")
    may_end_early = config.trainer.early_stopping_patience is not None
    return may_end_early or total is None or not saved or saved[-1][0] >= total


def known_steps(run_dir: Path, config: RunConfig) -> int | None:
    """Return the steps of a whole run; None where its epochs depend on data not yet prepared."""
    samples = noted_samples_per_epoch(run_dir) if config.trainer.max_epochs is not None else 0
    return total_steps(config, samples) if samples is not None else None


def left_seconds(last: Mapping[str, Any], total: int | None) -> float | None:
    """Return the time that the rest of the steps takes at the speed of the last ones. Pure."""
    step, speed = last.get("step"), last.get("tokens_per_second")
    if total is None or not step or not speed:
        return None
    tokens_per_step = last["tokens"] / step
    return float((total - step) * tokens_per_step / speed)


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
            lines.append(json.loads(line))
        except ValueError:
            continue
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


def described(status: Status) -> str:
    """Return one run as lines. Pure."""
    rows = {
        "state": status.state,
        "job": status.job,
        "step": _step(status),
        "loss": _loss(status),
        "tokens/s": _speed(status),
        "left": _left(status),
        "checkpoint": status.checkpoint or "none yet",
    }
    shown = {name: text for name, text in rows.items() if text not in (None, "-")}
    return "\n".join([str(status.run_dir), *(f"  {n:<12}{text}" for n, text in shown.items())])


def table(statuses: Sequence[Status], here: Path) -> str:
    """Return a line for each run, its directory as seen from ``here``. Pure."""
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
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if name in ("run", "state") else cell.rjust(width)
            for cell, width, name in zip(cells, widths, head, strict=True)
        ).rstrip()
        for cells in [head, *rows]
    )


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
