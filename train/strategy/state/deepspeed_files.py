"""Model and optimizer state in the files of DeepSpeed's own checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from shardwright.train.checkpoint.format.hashed import HashedFolder
from shardwright.train.model import adapter_base, quantised
from shardwright.train.optimizer import eight_bit
from shardwright.train.run_directory.names import ENGINE_FOLDER
from shardwright.train.strategy.state.host_memory import HostMemory
from shardwright.train.strategy.state.snapshot import Snapshot, needed_bytes
from shardwright.train.strategy.zero import swapped

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

TAG = ENGINE_FOLDER


class DeepSpeedState:
    """What this rank writes of the model and the optimizer.

    Building it is collective and touches no disk; a copy ``into`` memory is untouched by later
    steps. The engine's own `save_checkpoint` is what collects the state; it would wait in its last
    barrier for a rank that failed to write.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        texts: dict[str, str],
        *,
        is_first: bool,
        into: HostMemory | None,
    ) -> None:
        """``texts`` are small files beside the state that the first rank writes, by their name."""
        collected = _Collected()
        of_trained = quantised.digest_of(engine.module) is not None
        with _collecting(engine, collected):
            # The root is cut off again; it keeps the names relative.
            engine.save_checkpoint(
                _ROOT, tag=TAG, save_latest=False, exclude_frozen_parameters=of_trained
            )
        self._states = collected.states
        if of_trained:
            _leave_out(adapter_base.frozen_names(engine.module), self._states)
        for state in self._states.values():
            if _OPTIMIZER in state and getattr(engine.optimizer, "swap_optimizer", False):
                assert into is None, "refused as a contradiction"
                state[_OPTIMIZER] = swapped.mapped(engine.optimizer, state[_OPTIMIZER])
        # Stage 0 steps whole parameters, and so with any optimizer.
        if eight_bit.in_use(getattr(engine.optimizer, "optimizer", engine.optimizer)):
            self._states = eight_bit.dequantised(self._states)
        self._texts = {"latest": TAG, **texts} if is_first else {}
        if into is not None:
            snapshot = Snapshot(into, needed_bytes(self._states))
            self._states = {name: snapshot.of(state) for name, state in self._states.items()}
            snapshot.wait()

    def write(self, folder: HashedFolder) -> None:
        for name, state in self._states.items():
            with folder.create(name) as stream:
                torch.save(state, cast("IO[bytes]", stream))
        for name, text in self._texts.items():
            folder.write(name, text.encode())

    def finish(self, folder: HashedFolder, written: list[Any]) -> None:
        pass


def _leave_out(names: set[str], states: dict[str, Any]) -> None:
    """Take weights out by each of their names: DeepSpeed 0.19 does so by the first alone."""
    for state in states.values():
        if "module" in state:
            state["module"] = {n: t for n, t in state["module"].items() if n not in names}


_ROOT = "/checkpoint"
_OPTIMIZER = "optimizer_state_dict"


class _Collected(TorchCheckpointEngine):
    """Keeps the states that it is given to save, by the relative names of their files."""

    def __init__(self) -> None:
        self.states: dict[str, Any] = {}

    def create(self, info: Any) -> None:
        pass

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def save(self, state_dict: Any, path: str) -> None:
        self.states[Path(path).relative_to(_ROOT).as_posix()] = state_dict


@contextmanager
def _collecting(engine: DeepSpeedEngine, collected: _Collected) -> Iterator[None]:
    """Have the engine hand over its state instead of writing it, and write nothing besides.

    Besides, it would copy two scripts that unpickle anything, and the files swapped to NVMe.
    """
    writing = engine.checkpoint_engine
    engine.checkpoint_engine = collected
    engine._copy_recovery_script = lambda save_path: None
    engine.zero_nvme_offload_optimizer = lambda: False
    try:
        yield
    finally:
        engine.checkpoint_engine = writing
        del engine._copy_recovery_script, engine.zero_nvme_offload_optimizer
