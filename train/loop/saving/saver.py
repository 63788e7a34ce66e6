"""When a run's checkpoints are written, in the background or not, and what is said of failures."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any, TextIO

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from shardwright.train.console import progress
from shardwright.train.loop.saving.background import Background
from shardwright.train.loop.saving.peers import Peers, SaveFailed
from shardwright.train.loop.saving.save import Draft, draft, peers_of, write
from shardwright.train.loop.spikes.rollback import RolledBack
from shardwright.train.process import heartbeat, signals
from shardwright.train.process.agreement import from_all
from shardwright.train.process.heartbeat import Phase
from shardwright.train.strategy.state.host_memory import HostMemory

if TYPE_CHECKING:
    from shardwright.train.strategy.training import Training

logger = logging.getLogger(__name__)


class Saver(TrainerCallback):
    """Writes the checkpoints of one training; at most one is in flight.

    Every method is collective. A failure is known to all ranks alike: all continue or all stop.
    """

    def __init__(self, trainer: Training) -> None:
        self._trainer = trainer
        self.in_background = trainer.config.checkpoint.asynchronous
        """Whether the next save is written while training continues."""
        self._on_error = trainer.config.checkpoint.on_save_error
        self._peers: Peers | None = None
        self._in_flight: Background | None = None
        self._memory = HostMemory()
        """Of the copies that are in flight, and after them of the next."""
        self._step = 0
        self._longest_seconds = 0.0
        """What the slowest whole save of this start took on this rank; 0 before the first."""
        self.console: TextIO | None = None
        """Where rank 0 tells a person; the rank's log has it in any case."""

    def save(self) -> None:
        """Write a checkpoint of this step, or have it written while training continues.

        Raises SaveFailed where an earlier one or this one fails and the config says to stop, and
        Diverged as `save_last` and `save_before_stop` do, where there is nothing finite to save.
        """
        with heartbeat.at(Phase.SAVE):
            self._save()

    def _save(self) -> None:
        self._wait_for_the_previous()
        if not self.in_background:
            self._write_now(is_last=False)
            return
        peers = self._all_peers()
        started = time.monotonic()
        checkpoint = draft(self._trainer, peers, into=self._memory)
        self._step = checkpoint.step
        self._in_flight = Background(lambda: self._write(checkpoint, peers, started))

    def save_last(self) -> None:
        """Write a checkpoint of the last step unless there is one; SaveFailed stops in any case."""
        self.wait()
        if self._trainer.saved_step != self._trainer.state.global_step:
            self._write_now(is_last=True)

    def save_before_stop(self) -> str | None:
        """Write a checkpoint of this step unless there is one, and return None, or why not.

        It is not begun where the longest save so far would not fit into what is left of the grace
        period. Raises SaveFailed.
        """
        self.wait()
        step = self._trainer.state.global_step
        if step in (0, self._trainer.saved_step):
            return None
        grace_seconds = self._trainer.config.launcher.grace_seconds
        everyone = from_all((signals.seconds_since(), self._longest_seconds))
        left_seconds = grace_seconds - max(waited for waited, _ in everyone)
        needed_seconds = max(longest for _, longest in everyone)
        if needed_seconds > left_seconds:
            return (
                f"a save takes {needed_seconds:.1f} s, and {max(left_seconds, 0):.1f} s were left "
                f"of launcher.grace_seconds={grace_seconds:g}; raise it to keep the last steps"
            )
        try:
            self._write_now(is_last=True)
        except RolledBack as spike:  # which a resume does, as it is noted
            return str(spike)
        return None

    def wait(self) -> None:
        """Wait for the checkpoint in flight. Raises SaveFailed as `save` does."""
        if self._in_flight is None:
            return
        in_flight, self._in_flight = self._in_flight, None
        try:
            with heartbeat.at(Phase.SAVE):
                in_flight.wait()
        except SaveFailed as failure:
            self._failed(failure, self._step, is_last=False)
        else:
            self._trainer.saved_step = self._step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._in_flight is not None and _everywhere(self._in_flight.is_done):
            self.wait()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.wait()
        self._memory.release()

    def _wait_for_the_previous(self) -> None:
        if self._in_flight is None:
            return
        started = time.monotonic()
        self.wait()
        waited_seconds = time.monotonic() - started
        if waited_seconds > 0.1:
            self._say(
                f"waited {waited_seconds:.1f} s for checkpoint-{self._step}, which was still being "
                "written; a larger trainer.save_every_steps leaves more time"
            )

    def _write_now(self, *, is_last: bool) -> None:
        peers = self._all_peers()
        started = time.monotonic()
        name = f"writing checkpoint-{self._trainer.state.global_step}"
        with (
            progress.phase(name, kind="writing a checkpoint", comes_again=True),
            heartbeat.at(Phase.SAVE),
        ):
            self._draft_and_write(peers, started, is_last=is_last)

    def _draft_and_write(self, peers: Peers, started: float, *, is_last: bool) -> None:
        checkpoint = draft(self._trainer, peers)
        try:
            self._write(checkpoint, peers, started)
        except SaveFailed as failure:
            self._failed(failure, checkpoint.step, is_last=is_last)
        else:
            self._trainer.saved_step = checkpoint.step

    def _write(self, checkpoint: Draft, peers: Peers, started: float) -> None:
        write(checkpoint, peers)
        self._longest_seconds = max(self._longest_seconds, time.monotonic() - started)

    def _failed(self, failure: SaveFailed, step: int, *, is_last: bool) -> None:
        if not failure.is_of_disk:
            raise failure
        problem = f"checkpoint-{step} could not be written ({failure}); earlier ones are untouched"
        if is_last:
            raise SaveFailed(
                f"{problem}. It was the run's last: no later one would try again. Free the disk "
                "or fix it, and resume the run",
                is_of_disk=True,
            ) from failure
        if self._on_error == "stop":
            raise SaveFailed(
                f"{problem}. checkpoint.on_save_error=stop ends the run; free the disk or fix "
                "it, or set checkpoint.on_save_error=warn to train on until the next save",
                is_of_disk=True,
            ) from failure
        self._say(f"warning: {problem}; training continues, and the next save tries again")

    def _say(self, text: str) -> None:
        if self._trainer.is_world_process_zero():
            logger.warning(text)
            if self.console is not None:
                progress.write(text, self.console)

    def _all_peers(self) -> Peers:
        if self._peers is None:
            self._peers = peers_of(self._trainer)
        return self._peers


def _everywhere(value: bool) -> bool:
    """Return whether it is true on all ranks. Collective, among those of the training itself."""
    if not dist.is_initialized():
        return value
    flag = torch.tensor(int(value))
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)
