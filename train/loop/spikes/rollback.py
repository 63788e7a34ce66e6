"""Go back from a spike: what is written down before, and what is said where it cannot be done."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardwright.train.errors import Diverged
from shardwright.train.process.agreement import from_all, patiently
from shardwright.train.run_directory import rollbacks
from shardwright.train.run_directory.rollbacks import Rollback

if TYPE_CHECKING:
    from pathlib import Path

    from shardwright.train.loop.spikes.threshold import Spike


class RolledBack(Exception):
    """Training is to begin again at a checkpoint, past the data of a spike; all of it is noted."""

    def __init__(self, rollback: Rollback, text: str) -> None:
        super().__init__(text)
        self.rollback = rollback


def note(
    run_dir: Path, spike: Spike, rollback: Rollback, *, is_first: bool, at_most: int
) -> RolledBack:
    """Write a rollback down, and return what is to be raised for it. Collective.

    Raises Diverged where the run has gone back as often as it may.
    """
    before = len(from_all(rollbacks.read(run_dir) if is_first else None)[0])
    if before >= at_most:
        raise Diverged(exhausted(spike, rollback.to_step, at_most))
    with patiently():
        if is_first:
            rollbacks.append(run_dir, rollback)
    return RolledBack(rollback, f"{spike}; going back {rollback}")


def exhausted(spike: Spike, to_step: int, at_most: int) -> str:
    """Return what to tell of a spike for which the run does not go back any more. Pure."""
    times = "once" if at_most == 1 else f"{at_most} times"
    return (
        f"{spike}, and the run has gone back {times} already (trainer.max_rollbacks={at_most}). "
        f"checkpoint-{to_step} is the newest checkpoint before it; resume with a lower "
        "trainer.learning_rate, with a larger trainer.spike_factor where such steps do no harm, or "
        f"with trainer.max_rollbacks={2 * at_most}"
    )
