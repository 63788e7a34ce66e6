"""Ranks that stand still, each in its own way: started by nobody who would notice.

They are forked from one process that has imported everything, and run the entry of
`shardwright rank`, as in `killable`. Nothing ends the others where one has died.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import forked
from tests.distributed.pool import free_port

WORLD_SIZE = 2
TIMEOUT_SECONDS = 240.0
LONG_SECONDS = 1000.0
"""Longer than any run may hang."""
Fault = Callable[[int], None]
"""Called in each rank before its run begins, with the rank's number."""


@dataclass(frozen=True)
class Ended:
    """How the ranks of one start ended: 0, a code, or minus a signal."""

    exit_codes: list[int | None]


def run(
    run_dir: Path,
    fault: Fault,
    during: Callable[[list[Any]], object] = lambda ranks: None,
) -> Ended:
    """Start the ranks of a run, do something ``during`` it, and wait until all have ended."""
    context = forked.on_cpus()
    port = free_port()
    ranks: list[Any] = []
    try:
        for rank in range(WORLD_SIZE):
            ranks.append(context.Process(target=_rank, args=(run_dir, rank, port, fault)))
            ranks[-1].start()
        during(ranks)
        until = time.monotonic() + TIMEOUT_SECONDS
        for process in ranks:
            process.join(max(0.0, until - time.monotonic()))
        assert not any(process.is_alive() for process in ranks), "nobody has ended the ranks"
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return Ended([process.exitcode for process in ranks])


def wait_for_step(run_dir: Path, step: int) -> None:
    """Return once a run has logged a step."""
    until = time.monotonic() + TIMEOUT_SECONDS
    metrics = run_dir / "metrics.jsonl"
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        assert time.monotonic() < until, f"step {step} did not come"
        time.sleep(0.02)


# --- inside of a rank ---------------------------------------------------------------------------


def _rank(run_dir: Path, rank: int, port: int, fault: Fault) -> None:
    # A file that both append to, as a terminal is.
    output = os.open(f"{run_dir}.console", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(WORLD_SIZE),
        LOCAL_WORLD_SIZE=str(WORLD_SIZE),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    fault(rank)
    from shardwright.train.__main__ import main

    sys.exit(main([str(run_dir)]))


def _before(owner: Any, name: str, calls: int, act: Callable[[], object]) -> None:
    """Have something done just before a function is called for the n-th time."""
    sound, seen = getattr(owner, name), 0

    def called(*arguments: Any, **options: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == calls:
            act()
        return sound(*arguments, **options)

    setattr(owner, name, called)


def _sleep_long() -> None:
    time.sleep(LONG_SECONDS)


def none(rank: int) -> None:
    """Leave all as it is."""


def endless_loop_in_the_collator(rank: int) -> None:
    from shardwright.train.data.batches.collator import Collator

    def loop() -> None:
        while True:
            pass

    if rank == 1:
        _before(Collator, "__call__", 7, loop)


def different_collectives(rank: int) -> None:
    """Rank 0 waits for what rank 1 sends to all, which adds something up with rank 0 instead."""
    import torch
    import torch.distributed as dist

    from shardwright.train.loop.trainer import Trainer

    def differ() -> None:
        if rank == 0:
            dist.broadcast(torch.zeros(3), src=1)
        else:
            dist.all_reduce(torch.zeros(3))

    _before(Trainer, "training_step", 5, differ)


def killed_while_others_wait(rank: int) -> None:
    """Rank 1 ends without a word while rank 0 waits for it in the group's store."""
    from shardwright.train import data

    if rank == 1:
        _before(data, "prepare", 1, lambda: os.kill(os.getpid(), signal.SIGKILL))


def slow_forward(rank: int) -> None:
    from shardwright.train.loop.trainer import Trainer

    if rank == 1:
        _before(Trainer, "compute_loss", 5, _sleep_long)


def slow_data(rank: int) -> None:
    from shardwright.train.data.batches.samples import Mixture

    if rank == 1:
        _before(Mixture, "get", 30, _sleep_long)


def slow_save(rank: int) -> None:
    from shardwright.train.loop.saving import saver

    if rank == 1:
        _before(saver, "draft", 1, _sleep_long)


def slow_disk(rank: int) -> None:
    """Each file of a checkpoint takes long to be opened by rank 1."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and "/checkpoints/." in str(arguments[0]):
            time.sleep(LONG_SECONDS)

    if rank == 1:
        sys.addaudithook(hook)
