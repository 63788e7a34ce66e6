"""How many bytes of tensors are alive, and were at the most: of real tensors and of fake ones."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations in its block give, each once, until it is freed.

    What it is not to count is named before, by `leave_out`. A storage that is emptied where it is,
    as FSDP does with what it has gathered, counts as what it holds.
    """

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._left_out: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.peak = 0
        """Since the last `begin`."""

    def begin(self) -> None:
        """Look for the peak from here on."""
        self.peak = self.now()

    def now(self) -> int:
        """Return the bytes that are alive."""
        found = (reference() for reference in list(self._held.values()))
        return sum(storage.nbytes() for storage in found if storage is not None)

    def leave_out(self, tensors: Iterable[torch.Tensor]) -> None:
        """Do not count what these tensors hold, and what shares it."""
        for tensor in tensors:
            _note(self._left_out, tensor)
            self._held.pop(tensor.untyped_storage()._cdata, None)

    def take_in(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count what is alive already."""
        for tensor in tensors:
            self._add(tensor)

    def _add(self, tensor: torch.Tensor) -> None:
        local = getattr(tensor, "_local_tensor", tensor)  # a DTensor has no storage of its own
        if local.untyped_storage()._cdata not in self._left_out:
            _note(self._held, local)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(given):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf)
        self.peak = max(self.peak, self.now())
        return given


def _note(among: dict[int, weakref.ref[torch.UntypedStorage]], tensor: torch.Tensor) -> None:
    """Keep a storage by its address, for as long as it is there."""
    storage = tensor.untyped_storage()
    key = storage._cdata
    if key not in among:
        among[key] = weakref.ref(storage, lambda _, key=key: among.pop(key, None))  # type: ignore[misc]
