"""Which runs there are, what each is doing and how far it is."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from shardwright.launchers.ranks.processes import all_rank_processes, rank_processes
from shardwright.launchers.slurm import jobs as slurm
from shardwright.train import config as run_config
from shardwright.train.checkpoint.format import layout
from shardwright.train.config import BatchSizes, Progress, RunConfig, batch_sizes, total_steps
from shardwright.train.data.prepare import noted_samples_wanted
from shardwright.train.errors import Diverged, Hang
from shardwright.train.run_directory import final, owner, stop_note
from shardwright.train.run_directory import pruned as pruned_note
from shardwright.train.run_directory.failures import RankFailure, rank_failures
from shardwright.train.run_directory.metrics import tail
from shardwright.train.run_directory.names import (
    CHECKPOINTS,
    DATA_JSON,
    LOGS,
    METRICS,
    PROGRESS,
    RUN_CONFIG,
)
from shardwright.train.run_directory.owner import Owner
from shardwright.train.units import duration

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


class State(NamedTuple):
    """What a run is doing."""

    text: str
    is_over: bool
    word: str
    """The same in one word, to choose by."""


UNREADABLE = "unreadable"
WORDS = (
    *("waiting", "preparing", "starting", "running", "new"),
    *("done", "stopped", "pruned", "failed", "dead", "silent", UNREADABLE),
)
"""What a state may be in one word; the second line's are over."""
_OF_OWNERS = {owner.PREPARING: "preparing", owner.STARTING: "starting"}
_UNDECIDED = frozenset({"running", "new", "dead", "silent"})
"""States in which a run's own files say nothing of its end, where its job may."""


@dataclass(frozen=True)
class Around:
    """What a machine and its queue do now, looked at once for many runs."""

    ranks: Mapping[str, Sequence[int]]
    """The ranks of each run on this machine."""
    queue: frozenset[str]
    """The jobs of everybody that wait or run."""

    @classmethod
    def now(cls) -> Around:
        return cls(all_rank_processes(), slurm.queued())


@dataclass(frozen=True)
class Look:
    """A run as its files, its processes and its job show it, without its checkpoints."""

    state: State
    job: str | None
    last: Mapping[str, Any]
    """Each metric as it was logged last."""
    total_steps: int | None
    is_done: bool


def runs_in(directory: Path) -> list[Path]:
    """Return a run's directory itself, or those of a sweep's runs. Raises UserError where none."""
    if (directory / RUN_CONFIG).is_file():
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
    parents = sorted(directory.glob(pattern), key=place)
    return [path for path in parents if (path / RUN_CONFIG).is_file()]


def place(path: Path) -> tuple[Path, int, str]:
    """Return what sorts runs: those of a sweep by their number."""
    return path.parent, int(path.name) if path.name.isdecimal() else -1, path.name


def of(run_dir: Path, around: Around | None = None) -> Status:
    """Look at a run's directory, at the queue and at the processes of this machine."""
    config = run_config.load(run_dir)
    found = look(run_dir, config, around)
    last, total, is_over = found.last, found.total_steps, found.state.is_over
    whole = layout.whole_checkpoints(run_dir / CHECKPOINTS)
    return Status(
        run_dir,
        found.state.text,
        is_over,
        job=found.job,
        step=reached(
            last.get("step"),
            [step for step, _ in whole] if is_over else [],
            total if found.is_done else None,
        ),
        total_steps=total,
        loss=last.get("loss"),
        tokens_per_second=None if is_over else last.get("tokens_per_second"),
        left_seconds=None if is_over else left_seconds(last, total, batch_sizes(config.trainer)),
        checkpoint=whole[-1][1].name if whole else None,
        model=_model(run_dir),
        can_resume=is_over and not found.is_done,
    )


def look(run_dir: Path, config: RunConfig, around: Around | None = None) -> Look:
    """Look at a run, but not at its checkpoints; ``around`` is what was looked at for all runs."""
    last = logged(run_dir)
    total = known_steps(run_dir, config, last)
    done = _is_done(run_dir, config, total)
    ranks = around.ranks.get(str(run_dir), ()) if around else rank_processes(run_dir)

    def state(job: slurm.Job | None) -> State:
        return state_of(
            job,
            is_done=done,
            stopped=stop_note.read(run_dir),
            pruned=pruned_note.read(run_dir),
            failures=rank_failures(run_dir),
            ranks_here=len(ranks),
            owned=owner.look(run_dir),
            silent_seconds=time.time() - last["time"] if "time" in last else None,
            prepared=_prepared(run_dir),
        )

    job = slurm.job_of(run_dir)
    is_queued = job is not None and (around is None or job in around.queue)
    found = state(slurm.look(job) if job is not None and is_queued else None)
    if job is not None and not is_queued and found.word in _UNDECIDED:
        found = state(slurm.look(job))
    return Look(found, job, last, total, done)


def _prepared(run_dir: Path) -> str | None:
    """Return how far the preparation of a run's data is; None where it has not begun or is done.

    Somebody who was killed may have left it.
    """
    if (run_dir / DATA_JSON).exists():
        return None
    try:
        return (run_dir / LOGS / PROGRESS).read_text(encoding="utf-8")
    except OSError:
        return None


def _model(run_dir: Path) -> str | None:
    if path := final.of(run_dir):
        return str(path)
    if path := final.earlier(run_dir):
        return f"{path}, from before the run was resumed"
    return None


def state_of(
    job: slurm.Job | None,
    *,
    is_done: bool,
    stopped: stop_note.Stopped | None,
    failures: Sequence[RankFailure],
    ranks_here: int,
    owned: tuple[Owner | None, bool],
    silent_seconds: float | None,
    here: str | None = None,
    prepared: str | None = None,
    pruned: pruned_note.Pruned | None = None,
) -> State:
    """Return a run's state in words, and whether it is over. Pure.

    ``prepared`` tells how far the preparation of its data is, if it is not done.

    ``owned`` is what `owner.look` tells: a lock that is held means that the run lives, on whichever
    host. One that is not means that it has ended where its owner was of this host, ``here``; the
    locks of other hosts do not show on every file system.
    """
    first, is_locked = owned
    if job is not None and not job.is_over:
        text = job.state.lower()
        text += f" on {job.nodes}" if job.nodes else f" ({job.reason})" if job.reason else ""
        text += f", restart {job.restarts}" if job.restarts else ""
        is_preparing = prepared and job.state in slurm.RUNNING
        if is_preparing:
            return State(f"{text}, {owner.PREPARING}: {prepared}", False, "preparing")
        return State(text, False, "waiting" if job.state in slurm.WAITING else "running")
    if is_locked and first is not None and first.doing is not None:
        far = f": {prepared}" if prepared and first.doing == owner.PREPARING else ""
        word = _OF_OWNERS.get(first.doing, "running")
        return State(f"{first.doing} on {first.host}{far}", False, word)
    if ranks_here:
        return State(f"running, {ranks_here} rank(s) here", False, "running")
    if is_locked:
        return State(f"running on {first.host}" if first else "running", False, "running")
    if pruned is not None and not is_done:
        return State(str(pruned), True, "pruned")
    if stopped is not None:
        return State(str(stopped), True, "stopped")
    if failures:
        failed = failures[0]
        if failed.kind == Diverged.__name__:
            return State(f"failed: {failed.message}", True, "failed")
        if failed.kind == Hang.__name__:
            where = f"waiting for rank {failed.rank} on {failed.host}"
            return State(f"failed: it hung, {where}, and was ended", True, "failed")
        what = failed.explanation or f"{failed.kind}: {failed.message}"
        what = what.partition("\n")[0]
        text = f"failed: rank {failed.rank} on {failed.host}, {what}"
        return State(text, True, "failed")
    if is_done:
        return State("done", True, "done")
    if job is not None:
        return State(f"{job.state.lower()}, exit code {job.exit_code}", True, "failed")
    if first is not None and first.host == (here or socket.gethostname()):
        doing = f" while {first.doing}" if first.doing else ""
        text = f"dead: it was killed or crashed{doing}, and could not report it"
        return State(text, True, "dead")
    if silent_seconds is None:
        return State("no step yet, and no process here", False, "new")
    if silent_seconds < SILENT_SECONDS:
        text = f"running, last heard of {duration(silent_seconds)} ago"
        return State(text, False, "running")
    return State(f"silent for {duration(silent_seconds)}", True, "silent")


def is_done(run_dir: Path, config: RunConfig) -> bool:
    """Return whether a run has come to its end: it has its model, and no step is missing.

    A resume may ask for more steps than there are, and end before the first of them is made.
    """
    return _is_done(run_dir, config, known_steps(run_dir, config, logged(run_dir)))


def _is_done(run_dir: Path, config: RunConfig, total: int | None) -> bool:
    if final.of(run_dir) is None:
        return False
    saved = layout.named(run_dir / CHECKPOINTS)
    may_end_early = config.trainer.early_stopping_patience is not None
    return may_end_early or total is None or not saved or saved[-1][0] >= total


def logged(run_dir: Path) -> dict[str, Any]:
    """Return each value of a run's metrics as it was logged last."""
    last: dict[str, Any] = {}
    # A line of an evaluation has no loss, and the last has none of the speed.
    for line in tail(run_dir / METRICS):
        last |= line
    return last


def reached(
    logged_step: int | None, saved_steps: Sequence[int], done_steps: int | None
) -> int | None:
    """Return the newest step of a run that is known of, None before its first. Pure.

    Not every step is logged: the last save of a run that is over may be newer, and one that is done
    has made all of its steps.
    """
    return max((s for s in (logged_step, *saved_steps, done_steps) if s is not None), default=None)


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


def left_seconds(last: Mapping[str, Any], total: int | None, batches: BatchSizes) -> float | None:
    """Return the time that the rest of the steps takes at the speed of the last ones. Pure.

    ``batches`` are those of these steps; earlier ones may have been others.
    """
    step, speed = last.get("step"), last.get("tokens_per_second")
    if total is None or not step or not speed:
        return None
    tokens_per_sample = last["tokens"] / last["samples"]
    left = batches.after(last["samples"], total - step) - last["samples"]
    return float(left * tokens_per_sample / speed)


def is_heard_of(run_dir: Path) -> bool:
    """Return whether a run has logged something of late."""
    lines = tail(run_dir / METRICS)
    return bool(lines) and time.time() - lines[-1]["time"] < SILENT_SECONDS
