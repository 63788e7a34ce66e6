"""What is done about a spike that has been found, as trainer.on_spike asks for it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Protocol

from shardwright.train.console import progress
from shardwright.train.loop.spikes import rollback
from shardwright.train.run_directory.rollbacks import Rollback
from shardwright.train.strategy.training import Training

if TYPE_CHECKING:
    from shardwright.train.loop.saving.saver import Saver
    from shardwright.train.loop.spikes.threshold import Spike

logger = logging.getLogger(__name__)

CONTINUES = {
    "warn": "training continues",
    "skip_update": "its update was left out",
    "rollback": "training continues, as there is no checkpoint yet to go back to",
}


class Watched(Training, Protocol):
    """A training that may go back."""

    saver: Saver
    callback_handler: Any
    control: Any

    def samples_at(self, step: int) -> int:
        """Return the position in the data after so many steps of the run."""

    def log(self, logs: dict[str, float]) -> None:
        """Tell all that have to do with metrics."""


def respond(trainer: Watched, spike: Spike) -> None:
    """Say that a step was a spike, on a line of metrics.jsonl too. Collective.

    Raises RolledBack where the run is to go back, and Diverged where it has done so too often.
    """
    action = trainer.config.trainer.on_spike
    if action == "rollback":
        trainer.saver.wait()  # for what may be the newest checkpoint
        if trainer.saved_step is not None:
            _go_back(trainer, spike, trainer.saved_step)
    said = "warn" if action == "rollback" else action
    trainer.log({"spike": said, **spike.values()})  # type: ignore[dict-item]
    if trainer.is_world_process_zero():
        text = f"warning: {spike}; {CONTINUES[action]}"
        logger.warning(text)
        if trainer.saver.console is not None:
            progress.write(text, trainer.saver.console)


def _go_back(trainer: Watched, spike: Spike, to_step: int) -> None:
    """Raise RolledBack, once it is written down."""
    # Closes the progress bar.
    trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
    samples = trainer.samples_at(spike.seen.step)
    skipped = samples - trainer.samples_at(to_step)
    raise rollback.note(
        trainer.run_dir,
        spike,
        Rollback(spike.seen.step, to_step, samples, skipped, spike.values()),
        is_first=trainer.is_world_process_zero(),
        at_most=trainer.config.trainer.max_rollbacks,
    )
