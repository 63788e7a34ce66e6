"""Copies of live state in host memory, which training continues without changing."""

from __future__ import annotations

import copy
from typing import Any

import torch


class Snapshot:
    """Copies tensors to host memory, pinned where they come from a GPU.

    Each storage is copied once and whole, so that tensors which share one share its copy too,
    and a file of the copy has the bytes that a file of the original would have had.
    """

    def __init__(self) -> None:
        # With its original, whose address must not be given to another meanwhile.
        self._storages: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self._on_gpu = False

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
        is_cuda = tensor.is_cuda
        self._on_gpu |= is_cuda
        host = torch.empty_like(tensor, device="cpu", pin_memory=is_cuda, requires_grad=False)
        return host.copy_(tensor.detach(), non_blocking=is_cuda)

    def wait(self) -> None:
        """Wait for the copies from a GPU, and let the originals go."""
        if self._on_gpu:
            torch.cuda.synchronize()
        self._storages.clear()

    def _copied(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        is_cuda = storage.device.type == "cuda"
        self._on_gpu |= is_cuda
        source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        host = torch.empty(source.numel(), dtype=torch.uint8, pin_memory=is_cuda)
        return host.copy_(source, non_blocking=is_cuda).untyped_storage()


def _is_special(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is quantised or the like, and knows itself how to be copied."""
    return type(tensor) not in (torch.Tensor, torch.nn.Parameter)
