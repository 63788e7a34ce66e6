"""The story of one rank of a replay: some steps of a run again, with what its modules give."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from shardwright.train.config import RunConfig
from shardwright.train.errors import Diverged
from shardwright.train.loop.numerics.watch import Watch
from shardwright.train.loop.trainer import Trainer
from shardwright.train.process import signals
from shardwright.train.process.rank import Rank
from shardwright.train.run import assemble
from shardwright.train.run_directory import replays
from shardwright.train.run_directory.replays import Replayed


def replay(run_dir: Path, config: RunConfig, rank: Rank, console: TextIO) -> Path | None:
    """Make the steps that replay.json asks for; return the directory, None where told to stop."""
    try:
        again(assemble(run_dir, config, rank, console))
    except signals.Stop:
        return None
    return run_dir


def again(trainer: Trainer) -> None:
    """Train up to the step that is asked for, and write down what came of it."""
    wanted = replays.asked(trainer.run_dir)
    assert wanted is not None
    if wanted.fingerprints:
        debug, index = trainer.config.trainer.debug, trainer.args.process_index
        trainer.watch = Watch(debug, trainer.run_dir, index, fingerprints_from=1)
    diverged = None
    try:
        trainer.train()
        trainer.check_finite()
    except Diverged as error:
        diverged = str(error)
    if trainer.is_world_process_zero():
        replays.conclude(trainer.run_dir, Replayed(trainer.state.global_step, diverged))
