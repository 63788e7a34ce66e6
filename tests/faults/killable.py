"""Ranks that can be killed, or told to stop, at any moment: forked from one process.

That one has imported everything. What a rank runs is the entry of `shardwright rank`;
torchrun itself would add the seconds of its imports to each start. As torchrun does, the ranks that
are left are ended once one has died.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tests import forked
from tests.distributed.pool import free_port

WORLD_SIZE = 2
TIMEOUT_SECONDS = 120
GRACE_SECONDS = 30.0
"""As torchrun has it."""
_WATCHED = re.compile(r"checkpoints\b|\.?final\b|\.tokenizer-|metrics\.|\.$")


@dataclass(frozen=True)
class AtEvent:
    """Kill just before a rank does something for the n-th time since it was started.

    Its events read like "os.rename checkpoints/.checkpoint-2.tmp" or "train.micro_batch": Python's
    audit events below the run directory, and one for each micro-batch, of evaluations too.
    """

    pattern: str
    """Regular expression that matches from the event's beginning."""
    occurrence: int = 0
    rank: int = 0
    everyone: bool = False
    """Kill all ranks at the same time, not only the one whose event it is."""
    seconds_per_file: float = 0.0
    """How long it takes the rank to open a file of a checkpoint, as on a slow disk."""
    signal: int = signal.SIGKILL
    times: int = 1


@dataclass(frozen=True)
class AtTime:
    """Kill from outside, some time after the log of a step."""

    step: int
    seconds: float
    rank: int = 0
    everyone: bool = False


Kill = AtEvent | AtTime


@dataclass(frozen=True)
class Ended:
    """How the ranks of one start ended."""

    exit_codes: list[int | None]
    console: str
    """What all ranks printed on the terminal."""


def start(
    run_dir: Path, kill: Kill | None = None, *, grace_seconds: float = GRACE_SECONDS
) -> Ended:
    """Start the ranks of a run, kill them as asked, and wait until all have ended.

    Those that are left have ``grace_seconds`` once one has failed, and are killed then.
    Each rank that ends by itself leaves its events beside the run directory.
    """
    context = forked.on_cpus()
    console = run_dir.with_name(f"{run_dir.name}.console")
    console.unlink(missing_ok=True)
    port = free_port()
    processes: list[Any] = []
    for rank in range(WORLD_SIZE):
        leader = processes[0].pid if processes else 0
        arguments = (run_dir, rank, port, leader, kill, console)
        process = context.Process(target=_rank, args=arguments)  # its loader has workers
        process.start()
        processes.append(process)
    try:
        if isinstance(kill, AtTime):
            _kill_from_outside(kill, run_dir, processes)
        _wait_as_torchrun_does(processes, grace_seconds)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return Ended([p.exitcode for p in processes], console.read_text())


def events(run_dir: Path, rank: int) -> list[str]:
    """Return what a rank did in a run that ended by itself."""
    return _trace(run_dir, rank).read_text().splitlines()


def _trace(run_dir: Path, rank: int) -> Path:
    return run_dir.with_name(f"{run_dir.name}.events-{rank}")


def _kill_from_outside(kill: AtTime, run_dir: Path, processes: list[Any]) -> None:
    metrics = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not (metrics.exists() and metrics.read_text().count('"loss"') >= kill.step):
        assert time.monotonic() < deadline, f"step {kill.step} did not come"
        assert all(p.is_alive() for p in processes), "a rank died by itself"
        time.sleep(0.005)
    time.sleep(kill.seconds)
    for process in processes if kill.everyone else [processes[kill.rank]]:
        process.kill()


def _wait_as_torchrun_does(processes: list[Any], grace_seconds: float) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    left = list(processes)
    while left:
        wait([p.sentinel for p in left], timeout=0.1)
        if any(p.exitcode not in (None, 0) for p in processes):
            time.sleep(0.1)  # it looks every so often
            for process in left:
                process.terminate()
            ends_at = time.monotonic() + grace_seconds
            for process in left:
                process.join(max(0.0, ends_at - time.monotonic()))
            return
        assert time.monotonic() < deadline, "the ranks hang"
        left = [p for p in left if p.is_alive()]


# --- inside of a rank ---------------------------------------------------------------------------


def _rank(
    run_dir: Path, rank: int, port: int, leader: int, kill: Kill | None, console: Path
) -> None:
    _join_process_group(leader)
    terminal = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(terminal, 1)
    os.dup2(terminal, 2)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(WORLD_SIZE),
        LOCAL_WORLD_SIZE=str(WORLD_SIZE),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    found: list[str] = []
    _watch(run_dir, found, kill if isinstance(kill, AtEvent) and kill.rank == rank else None)

    from shardwright.train.__main__ import main

    code = main([str(run_dir)])
    _trace(run_dir, rank).write_text("\n".join(found))
    sys.exit(code)


def _join_process_group(leader: int) -> None:
    """Make one group of the processes of all ranks, so that one call kills them together."""
    while True:
        with suppress(PermissionError, ProcessLookupError):  # the leader is not ready yet
            os.setpgid(0, leader)
            return
        time.sleep(0.001)


def _watch(run_dir: Path, found: list[str], kill: AtEvent | None) -> None:
    """Note each event of this process in ``found``, and kill at the one that is asked for."""

    from shardwright.train.loop.trainer import Trainer

    pattern = re.compile(kill.pattern) if kill else None
    matches = 0

    def note(event: str) -> None:
        nonlocal matches
        found.append(event)
        if kill is None or pattern is None:
            return
        if event.startswith("open checkpoints/."):
            time.sleep(kill.seconds_per_file)
        if not pattern.match(event):
            return
        matches += 1
        if matches == kill.occurrence + 1:
            for _ in range(kill.times):
                if kill.everyone:
                    os.killpg(0, kill.signal)
                else:
                    os.kill(os.getpid(), kill.signal)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            directory = -1
        elif event in ("os.mkdir", "os.remove", "os.rename", "os.rmdir"):
            directory = arguments[-1]
        else:
            return
        path = arguments[0]
        if not isinstance(path, str | os.PathLike):
            return
        path = os.fspath(path)
        if directory != -1:  # shutil.rmtree names files relative to an open directory
            path = os.path.join(os.readlink(f"/proc/self/fd/{directory}"), path)
        if os.path.isabs(path) and os.path.commonpath([path, run_dir]) == str(run_dir):
            relative = os.path.relpath(path, run_dir)
            if _WATCHED.match(relative):
                note(f"{event} {relative}")

    sys.addaudithook(hook)
    sound_step = Trainer.training_step

    def step(*arguments: Any, **options: Any) -> Any:
        note("train.micro_batch")
        return sound_step(*arguments, **options)

    Trainer.training_step = step  # type: ignore[method-assign]
    sound_evaluation = Trainer.evaluation_loop

    def evaluation(self: Trainer, batches: Any, *arguments: Any, **options: Any) -> Any:
        class Noted:
            dataset, batch_sampler = batches.dataset, batches.batch_sampler

            def __len__(self) -> int:
                return len(batches)

            def __iter__(self) -> Iterator[Any]:
                for batch in batches:
                    note("train.evaluation_batch")
                    yield batch

        return sound_evaluation(self, Noted(), *arguments, **options)  # type: ignore[arg-type]

    Trainer.evaluation_loop = evaluation  # type: ignore[method-assign, assignment]
