"""Judge each step of a training against those before it, on all ranks alike.

The ranks add up their losses on the device, in a collective of two numbers before each update. So
nothing waits: the verdict closes the gate there, and the numbers are on the host a step later.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from shardwright.train.errors import UserError
from shardwright.train.loop.spikes.threshold import Limits, Seen, Spike, Window, seen_in
from shardwright.train.strategy.finite import Travelling

if TYPE_CHECKING:
    from pathlib import Path

    from shardwright.train.config import TrainerConfig
    from shardwright.train.loop.resuming import Resumed
    from shardwright.train.strategy.training import Training

WINDOW = "spikes.json"
"""In a checkpoint: the recent steps, by which the next ones are judged."""


class SpikeWatch:
    """The recent steps of a training, and the verdict on each new one."""

    def __init__(
        self,
        trainer: TrainerConfig,
        device: torch.device,
        found: Callable[[Spike], None],
        checkpoint: Path | None = None,
    ) -> None:
        """``found`` is told of each spike, on all ranks alike, between two steps or before a save.

        ``checkpoint`` is that from which the run is resumed.
        """
        self._found = found
        self._skips = trainer.on_spike == "skip_update"
        seen = seen_at(checkpoint) if checkpoint is not None else []
        self.window = Window(trainer.spike_window_steps, trainer.spike_factor, seen)
        self._limits_of: dict[int, Limits] = {}
        self._limits = torch.full((2,), math.inf, device=device)
        self._shared = torch.zeros(2, device=device)
        """Loss and norm of this step, the same on every rank."""
        self._is_judged = False
        self._concluded: deque[Travelling] = deque()
        self._on_host: torch.Tensor | None = None
        if device.type == "cuda":
            self._on_host = torch.zeros(2, 2, pin_memory=True)

    @classmethod
    def of(
        cls, trainer: Training, resumed: Resumed | None, found: Callable[[Spike], None]
    ) -> SpikeWatch | None:
        """Return what watches a training, from where it is resumed; None where nothing is to."""
        settings, checkpoint = trainer.config.trainer, resumed.checkpoint if resumed else None
        if settings.on_spike == "ignore":
            return None
        return cls(settings, trainer.args.device, found, checkpoint)

    def begin(self, step: int) -> None:
        """Prepare to judge a step; tell of the spikes that are known without waiting."""
        while len(self._concluded) > (self._on_host is not None):
            self._take(self._concluded.popleft().arrived())
        self._is_judged = False
        self._limits_of[step] = limits = self.window.limits_for(step)
        # Filled on the device, as a copy would make the host wait for what is computed there.
        for place, value in zip(self._limits, limits, strict=True):
            place.fill_(value)

    def judge(self, loss: torch.Tensor, norm: torch.Tensor) -> torch.Tensor | None:
        """Return on the device whether the update is to be left out; None where none ever is.

        ``loss`` is this rank's of the step, ``norm`` that of the reduced gradients. Collective the
        first time in a step.
        """
        if not self._is_judged:
            self._is_judged = True
            numbers = torch.stack([loss, norm.to(loss)])
            if dist.is_initialized() and dist.get_world_size() > 1:
                # Of the norm too: ranks that round differently would decide differently.
                dist.all_reduce(numbers)
                numbers /= dist.get_world_size()
            self._shared.copy_(numbers)
        if not self._skips:
            return None
        return (self._shared > self._limits).any() & self._shared.isfinite().all()

    def conclude(self, step: int) -> None:
        """Take a step as done; have its numbers travel to the host."""
        into = self._on_host[step % 2] if self._on_host is not None else None
        self._concluded.append(Travelling(step, self._shared.clone(), into))

    def settle(self) -> None:
        """Tell of all spikes up to the last step; waits for the device."""
        while self._concluded:
            self._take(self._concluded.popleft().arrived())

    def _take(self, numbers: tuple[int, float, float]) -> None:
        seen = Seen(*numbers)
        self.window.take(seen)
        limits = self._limits_of.pop(seen.step)
        if limits.are_exceeded_by(seen):
            self._found(Spike(seen, limits))


def seen_at(checkpoint: Path) -> list[Seen]:
    """Return the recent steps that a checkpoint knows; none where the run did not watch them."""
    path = checkpoint / WINDOW
    if not path.exists():
        return []
    try:
        return seen_in(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is refused: {error}; remove {checkpoint.name} to use an older one"
        ) from None
