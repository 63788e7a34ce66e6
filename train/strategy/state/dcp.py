"""Model and optimizer state as torch distributed checkpoints, for DDP and FSDP alike."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.state_dict import get_state_dict

from shardwright.train.checkpoint.format.hashed import HashedFolder
from shardwright.train.model import adapter_base, quantised
from shardwright.train.optimizer import eight_bit
from shardwright.train.run_directory.names import ENGINE_FOLDER
from shardwright.train.strategy.state.host_memory import HostMemory, aligned
from shardwright.train.strategy.state.plans import Plans
from shardwright.train.strategy.state.snapshot import Snapshot

if TYPE_CHECKING:
    from shardwright.train.strategy.training import Training


class DistributedState:
    """What this rank writes of the model and the optimizer; replicated tensors are written once.

    Building it is collective and touches no disk; a copy ``into`` memory is untouched by later
    steps. It does what `torch.distributed.checkpoint.save` does, which mixes collectives with
    writing.
    """

    def __init__(self, trainer: Training, plans: Plans, *, into: HostMemory | None) -> None:
        optimizer = trainer.torch_optimizer()
        model_state, optimizer_state = get_state_dict(trainer.model, optimizer)
        if quantised.digest_of(trainer.model) is not None:
            frozen = adapter_base.frozen_names(trainer.model)
            model_state = {n: value for n, value in model_state.items() if n not in frozen}
        state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
        if eight_bit.in_use(optimizer):
            state["optimizer"] = eight_bit.appearing_in_fp32(optimizer_state)
        self._planner = _Planner()
        self._planner.set_up_planner(
            state,
            is_coordinator=trainer.args.process_index == 0,
        )
        self._plan = plans.of(self._planner)
        # Copies are in host memory already: nothing to fetch ahead from a GPU.
        self._copy_ahead_bytes = 10_000_000 if into is None else 0
        if into is not None:
            self._planner.keep_copies(self._plan.mine, into)

    def write(self, folder: HashedFolder) -> Any:
        writer = self._writer(folder)
        return writer.write_data(self._plan.mine, self._planner).value()

    def finish(self, folder: HashedFolder, written: list[Any]) -> None:
        if self._plan.metadata is not None:
            # The writer adds to what it is given, and the plan is kept.
            self._writer(folder).finish(dataclasses.replace(self._plan.metadata), written)

    def _writer(self, folder: HashedFolder) -> FileSystemWriter:
        writer = FileSystemWriter(
            folder.path / ENGINE_FOLDER,
            sync_files=False,  # the folder does it
            per_thread_copy_ahead=self._copy_ahead_bytes,
        )
        writer.fs = _HashedFileSystem(folder)
        return writer


class _Planner(DefaultSavePlanner):
    """Takes what is to be written from the live state, or from copies of it."""

    def __init__(self) -> None:
        super().__init__()
        self._copies: dict[Any, Any] | None = None

    def keep_copies(self, plan: SavePlan, memory: HostMemory) -> None:
        """Copy this rank's part to host memory and let go of the live state."""
        snapshot = Snapshot(memory, aligned(_bytes(item) for item in plan.items))
        copies: dict[Any, Any] = {}
        for item in plan.items:
            data = self.resolve_data(item)
            copies[item.index] = snapshot.part(data) if isinstance(data, torch.Tensor) else data
        snapshot.wait()
        self._copies, self.state_dict = copies, {}

    def resolve_data(self, write_item: WriteItem) -> Any:
        if self._copies is not None:
            return self._copies[write_item.index]
        return eight_bit.dequantised(super().resolve_data(write_item))


def _bytes(item: WriteItem) -> int:
    """Return how much of a tensor is written; 0 of what is none."""
    if item.tensor_data is None:
        return 0
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


class _HashedFileSystem(FileSystem):
    """Creates files through a `HashedFolder`."""

    def __init__(self, folder: HashedFolder) -> None:
        self._folder = folder

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        assert mode == "wb"
        with self._folder.create(self._name(path)) as stream:
            yield stream

    def rename(self, path: Any, new_path: Any) -> None:
        self._folder.rename(self._name(path), self._name(new_path))

    def _name(self, path: Any) -> str:
        return Path(path).relative_to(self._folder.path).as_posix()
