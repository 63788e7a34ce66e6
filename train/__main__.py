"""A rank's entry, `python -m shardwright.train RUN_DIR`: what `shardwright rank` becomes."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

from shardwright.train import program
from shardwright.train.console import terminal
from shardwright.train.errors import BAD_INPUT, FAILED, RESUMABLE, Diverged, UserError
from shardwright.train.process import inherited, memory, signals
from shardwright.train.process.arguments import decoded
from shardwright.train.process.stop_request import watch_for_stop
from shardwright.train.run_directory import stop_note
from shardwright.train.units import counted

if TYPE_CHECKING:
    from shardwright.train.config import RunConfig
    from shardwright.train.process.rank import Rank

logger = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """Run one rank; return 0, 1 where it failed, 2 on bad input, 75 where it was told to stop."""
    signals.install()  # before the seconds that importing torch takes
    terminal.outlive()
    if len(argv) != 1:
        print("usage: shardwright rank RUN_DIR", file=sys.stderr)
        return BAD_INPUT
    run_dir = Path(decoded(argv[0]))

    from shardwright.train import config
    from shardwright.train.process.rank import rank_from_environment
    from shardwright.train.run_directory import owner

    try:
        rank = rank_from_environment()
        settings = config.load(run_dir)
        with owner.owned(run_dir, print) if rank.index == 0 else nullcontext():
            return _run(run_dir, settings, rank)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT


def _run(run_dir: Path, settings: RunConfig, rank: Rank) -> int:
    from shardwright.train.console import progress
    from shardwright.train.diagnosis import watcher
    from shardwright.train.process import collectives, exhausted, heartbeat, logs
    from shardwright.train.run_directory.failures import note_failure

    try:
        console = logs.open_rank_log(
            run_dir,
            rank,
            nodes=settings.launcher.nodes,
            run_log=not settings.launcher.is_job,  # which has a log of its own
        )
    except OSError as error:
        with suppress(OSError):
            note_failure(run_dir, rank.index, error, exhausted.explained(error, settings))
        raise
    if (level := settings.launcher.log_level_of(rank.index)) is not None:
        logs.keep_from(level)
    if settings.launcher.device == "cpu":
        memory.keep_what_is_freed(os.environ)
    ignored = inherited.said(inherited.forget_engine(os.environ))
    if rank.index == 0:
        stop_note.forget(run_dir)
        if ignored:
            print(ignored, file=console)
    report = _FailureReport(run_dir, rank, settings, console)
    try:
        with (
            report.of_what_fails(),
            progress.shown_on(console) if rank.index == 0 else nullcontext(),
            watch_for_stop(run_dir) if rank.index == 0 else nullcontext(),
            heartbeat.beating(run_dir, rank, collectives.recorded),
            watcher.watched(
                run_dir,
                rank,
                ranks_here=_ranks_here(settings),
                hang_timeout_seconds=settings.trainer.hang_timeout_seconds,
                grace_seconds=settings.launcher.grace_seconds,
            ),
        ):
            # The launcher has said so; what follows are signs of life.
            progress.begin(
                _starting(rank.world_size),
                shows_start=False,
                silent_seconds=time.time() - float(os.environ.get(progress.BEGAN, time.time())),
            )
            progress.now("importing libraries")
            from shardwright.train.strategy.group import join

            progress.now("waiting for all ranks")
            # Inside of the group: to leave it may take until peers are ended for this very report.
            with join(settings, rank), report.of_what_fails():
                progress.now("importing libraries")
                final = _story(run_dir)(run_dir, settings, rank, console)
                progress.begin("ending the ranks", comes_again=True)
    except _Reported as failed:
        return failed.exit_code
    if final is None and not signals.is_restarted_on_failure():
        return RESUMABLE
    return 0


def _story(run_dir: Path) -> Callable[[Path, RunConfig, Rank, TextIO], Path | None]:
    """Return what a rank does in a directory: train a run, make steps of one again, or evaluate."""
    from shardwright.train.run_directory import evaluations, replays

    if evaluations.asked(run_dir) is not None:
        from shardwright.train.evaluate import evaluate

        return evaluate
    if replays.asked(run_dir) is not None:
        from shardwright.train.replay import replay

        return replay
    from shardwright.train.run import run

    return run


class _Reported(Exception):
    """The rank has failed, and has said so."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


@dataclass(frozen=True)
class _FailureReport:
    """Where a rank says how it failed: its log, logs/rank-N.error.json and the console."""

    run_dir: Path
    rank: Rank
    settings: RunConfig
    console: TextIO

    @contextmanager
    def of_what_fails(self) -> Iterator[None]:
        """Report what fails in the block, at once, and raise _Reported from it."""
        try:
            yield
        except _Reported:
            raise
        except Diverged as error:
            self._report_divergence(error)
            raise _Reported(FAILED) from error
        except Exception as error:
            self._report(error)
            raise _Reported(BAD_INPUT if isinstance(error, UserError) else FAILED) from error

    def _report_divergence(self, error: Diverged) -> None:
        from shardwright.train.run_directory import owner
        from shardwright.train.run_directory.failures import note_failure

        logger.error("%s", error)
        with suppress(OSError):  # a full disk
            note_failure(self.run_dir, self.rank.index, error)
        # The others have the same to say, and who has started the ranks tells it.
        if self.rank.index == 0 and not owner.is_launched():
            print(f"error: {error}", file=self.console)

    def _report(self, error: Exception) -> None:
        from shardwright.train.process import exhausted
        from shardwright.train.run_directory import owner
        from shardwright.train.run_directory.failures import note_failure

        logger.exception("rank %d failed", self.rank.index)
        explanation = exhausted.explained(error, self.settings)
        beside = _beside_the_plan(error, self.run_dir, self.settings)
        if explanation is not None and beside is not None:
            explanation += f"\n{beside}"
        try:
            is_told = not note_failure(self.run_dir, self.rank.index, error, explanation)
            is_told |= owner.is_launched()  # whoever has started it tells all
        except OSError:  # a full disk
            is_told = False
        if not is_told:
            what = explanation or f"{type(error).__name__}: {error}"
            print(f"rank {self.rank.index} failed: {what}", file=self.console)


def _beside_the_plan(error: Exception, run_dir: Path, settings: RunConfig) -> str | None:
    """Return what a plan that chose how to train expected, where memory has run out for it."""
    from shardwright.train.process import exhausted
    from shardwright.train.run_directory import choice

    on_gpu = exhausted.is_of_gpu(error)
    chosen = choice.read(run_dir, settings)
    if on_gpu is None or chosen is None:
        return None
    taken = exhausted.Taken(resident=memory.peak_resident_bytes() or None)
    if settings.launcher.device == "cuda":
        import torch

        taken = exhausted.Taken(
            taken.resident, torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        )
    command = program.command("resume", str(run_dir))
    return exhausted.beside_the_plan(chosen, taken, command, on_gpu=on_gpu)


def _ranks_here(settings: RunConfig) -> int:
    """Return how many ranks this node has; DeepSpeed's command does not say so."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", settings.launcher.ranks_per_node))


def _starting(ranks: int) -> str:
    return f"starting {counted(ranks, 'rank')}"


def _exit(code: int) -> NoReturn:
    """End the process, without waiting for a communicator that waits for a peer itself."""
    leave = sys.modules.get("shardwright.train.process.leave")  # with torch, or not at all
    if leave is not None and leave.is_pending():
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    signals.ignore()
    _exit(code)
