"""An engine whose checkpoints are those of torch itself, which name parameters and their places."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from shardwright.train.strategy.engine import Engine

if TYPE_CHECKING:
    from shardwright.train.strategy.state.host_memory import HostMemory
    from shardwright.train.strategy.state.plans import Plans
    from shardwright.train.strategy.training import EngineState, Training


class DistributedEngine(Engine):
    def save_state(
        self, trainer: Training, *, is_first: bool, into: HostMemory | None
    ) -> EngineState:
        from shardwright.train.strategy.state.dcp import DistributedState

        return DistributedState(trainer, self._plans, into=into)

    @functools.cached_property
    def _plans(self) -> Plans:
        from shardwright.train.strategy.state.plans import Plans

        return Plans()
