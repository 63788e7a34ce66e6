"""Model and optimizer state in the files of DeepSpeed's own checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from train.checkpoint.hashed import HashedFolder
from train.checkpoint.snapshot import Snapshot

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

TAG = "engine"


class DeepSpeedState:
    """What this rank writes of the model and the optimizer.

    Building it is collective and touches no disk; a ``copy`` is untouched by later steps. The
    engine's own `save_checkpoint` is what collects the state; it would wait in its last barrier for
    a rank that failed to write.
    """

    def __init__(
        self, engine: DeepSpeedEngine, texts: dict[str, str], *, is_first: bool, copy: bool
    ) -> None:
        """``texts`` are small files beside the state that the first rank writes, by their name."""
        collected = _Collected()
        with _collecting(engine, collected):
            # The root is cut off again; it keeps the names relative.
            engine.save_checkpoint(
                _ROOT, tag=TAG, save_latest=False, exclude_frozen_parameters=False
            )
        self._states = collected.states
        self._swapped = list(_swapped_files(engine))
        self._texts = {"latest": TAG, **texts} if is_first else {}
        if copy:
            assert not self._swapped, "refused as a contradiction"
            snapshot = Snapshot()
            self._states = {name: snapshot.of(state) for name, state in self._states.items()}
            snapshot.wait()

    def write(self, folder: HashedFolder) -> None:
        for name, state in self._states.items():
            with folder.create(name) as stream:
                torch.save(state, cast("IO[bytes]", stream))
        for source, name in self._swapped:
            folder.copy(source, name)
        for name, text in self._texts.items():
            folder.write(name, text.encode())

    def finish(self, folder: HashedFolder, written: list[Any]) -> None:
        pass


_ROOT = "/checkpoint"


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


def _swapped_files(engine: DeepSpeedEngine) -> Iterator[tuple[Path, str]]:
    """Yield the files of optimizer state on NVMe and the names that DeepSpeed gives their copies.

    ``engine/offloaded_tensors/rank<NN>/...``; buffers of gradients are left out.
    """
    if not engine.zero_nvme_offload_optimizer():
        return
    from deepspeed.checkpoint.ds_to_universal import dp_index_to_str

    rank = engine.local_rank if engine.use_node_local_storage() else engine.global_rank
    target = Path(TAG, "offloaded_tensors", f"rank{dp_index_to_str(rank)}")
    source = Path(engine.optimizer.optimizer_swapper.swap_folder)
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        name = path.relative_to(source)
        if not any("gradient" in part for part in name.parts):
            yield path, (target / name).as_posix()
