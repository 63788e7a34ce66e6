"""Copies of live state in host memory, which training continues without changing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch

from shardwright.train.strategy.state.host_memory import HostMemory, aligned


def needed_bytes(value: Any) -> int:
    """Return what a snapshot of a tree takes: each storage in it once and whole."""
    return aligned({s._cdata: s.nbytes() for s in _storages(value)}.values())


class Snapshot:
    """Copies tensors to host memory, of which it is told at first how much it will need.

    Each storage is copied once and whole, so that tensors which share one share its copy too,
    and a file of the copy has the bytes that a file of the original would have had.
    """

    def __init__(self, memory: HostMemory, needed_bytes: int) -> None:
        # With its original, whose address must not be given to another meanwhile.
        self._storages: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self._on_gpu = False
        self._memory = memory
        memory.begin(needed_bytes, pinned=torch.cuda.is_initialized())

    def of(self, value: Any) -> Any:
        """Return a copy of a tree of dictionaries, lists and tuples with what hangs on it."""
        if isinstance(value, torch.Tensor):
            return self.tensor(value)
        if isinstance(value, dict):
            copied = copy.copy(value)  # its class and attributes too
            copied.update((key, self.of(item)) for key, item in value.items())
            return copied
        if type(value) in (list, tuple):
            return type(value)(self.of(item) for item in value)
        return copy.deepcopy(value)

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of a tensor; it is complete once `wait` has returned."""
        if _is_special(tensor):
            return copy.deepcopy(tensor.detach()).cpu()
        storage = tensor.untyped_storage()
        if (known := self._storages.get(storage._cdata)) is None:
            known = storage, self._copied(storage)
            self._storages[storage._cdata] = known
        copied = torch.empty(0, dtype=tensor.dtype).set_(
            known[1], tensor.storage_offset(), tensor.size(), tensor.stride()
        )
        return copied.requires_grad_(tensor.requires_grad)

    def part(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of a tensor alone, whatever else its storage holds; `wait` as above."""
        if _is_special(tensor):
            return copy.deepcopy(tensor.detach()).cpu()
        # Without gaps, in the same order of dimensions.
        strides = torch.empty_like(tensor, device="meta").stride()
        host = torch.empty(0, dtype=tensor.dtype).set_(
            self._memory.take(tensor.nbytes), 0, tensor.size(), strides
        )
        return self._fill(host, tensor.detach())

    def wait(self) -> None:
        """Wait for the copies from a GPU, and let the originals go."""
        if self._on_gpu:
            torch.cuda.synchronize()
        self._storages.clear()

    def _copied(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        host = torch.empty(0, dtype=torch.uint8).set_(self._memory.take(storage.nbytes()))
        return self._fill(host, source).untyped_storage()

    def _fill(self, host: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        self._on_gpu |= source.is_cuda
        return host.copy_(source, non_blocking=source.is_cuda)


def _storages(value: Any) -> Iterator[torch.UntypedStorage]:
    """Yield the storages that `Snapshot.of` copies, those that are shared more than once."""
    if isinstance(value, torch.Tensor):
        if not _is_special(value):
            yield value.untyped_storage()
    elif isinstance(value, dict):
        for item in value.values():
            yield from _storages(item)
    elif type(value) in (list, tuple):
        for item in value:
            yield from _storages(item)


def _is_special(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is quantised or the like, and knows itself how to be copied."""
    return type(tensor) not in (torch.Tensor, torch.nn.Parameter)
