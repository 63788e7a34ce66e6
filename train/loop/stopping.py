"""What a run does once its ranks have agreed to stop: save, if that fits, and say where it is."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from shardwright.train.checkpoint.format import layout
from shardwright.train.console import progress
from shardwright.train.loop.callbacks.tracking import STOP_SECONDS
from shardwright.train.process import agreement, signals
from shardwright.train.process.agreement import from_all
from shardwright.train.process.rank import Rank
from shardwright.train.run_directory import stop_note, stop_request
from shardwright.train.run_directory.names import CHECKPOINTS

if TYPE_CHECKING:
    from shardwright.train.loop.trainer import Trainer


def end(run_dir: Path, rank: Rank, trainer: Trainer | None, console: TextIO) -> None:
    """Write a checkpoint of this step, if there is time for it, and stopped.json. Collective.

    ``trainer`` is None where the run was stopped before it had one. Raises SaveFailed.
    """
    reason = agreement.reason(from_all(signals.asked()))
    # A launcher passes every signal on as the same one, and writes down whose it was.
    reason = stop_request.said(run_dir) or reason
    if rank.index == 0:
        progress.write(f"stopping: {reason}", console)
    unsaved = trainer.saver.save_before_stop() if trainer is not None else None
    if rank.index == 0:
        _stopped(run_dir, trainer, reason, unsaved).write(run_dir)
    if trainer is not None:
        # Closes the progress bar.
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
        trainer.end_companions("stopped", seconds=STOP_SECONDS)
        trainer.engine.clean_up()
    # Launchers kill the others as soon as one rank has left with a code that is not 0.
    from_all(None)


def _stopped(
    run_dir: Path, trainer: Trainer | None, reason: str, unsaved: str | None
) -> stop_note.Stopped:
    whole = layout.whole_checkpoints(run_dir / CHECKPOINTS)
    newest = whole[-1][1] if whole else None
    saved = layout.read_manifest(newest) if newest else None
    started_at = trainer.resumed.step if trainer is not None and trainer.resumed else 0
    # Before the first step the trainer does not yet stand at the checkpoint's.
    step = trainer.state.global_step if trainer is not None else 0
    if trainer is None or step <= started_at:
        step, samples, steps = (saved.step, saved.samples, 0) if saved else (0, 0, 0)
    else:
        samples, steps = trainer.samples_seen, step - started_at
    return stop_note.Stopped(
        step=step,
        samples=samples,
        reason=reason,
        time=time.time(),
        checkpoint=str(newest) if newest else None,
        progress_steps=steps,
        unsaved=unsaved,
    )
