"""Keep what a block needs for its backward pass in host memory, copied while others compute.

A tensor leaves on a stream of its own, behind the work that made it, and comes back on that stream
while the block behind it computes: by the time that it is wanted it is there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch.autograd.graph import saved_tensors_hooks


class Copies(Protocol):
    """How tensors are copied between a device and host memory, without waiting for either."""

    def out(self, tensor: torch.Tensor) -> torch.Tensor:
        """Begin to copy a tensor to host memory; it may be let go of at once."""

    def back(self, host: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, Any]:
        """Begin to copy one back; return it, and what `wait` takes before it may be read."""

    def wait(self, tensor: torch.Tensor, arrival: Any) -> None:
        """Have what computes next wait until a tensor is back."""


class PlainCopies:
    """Of host memory: there is nothing to overlap with."""

    def out(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().clone()

    def back(self, host: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, Any]:
        return host.clone(), None

    def wait(self, tensor: torch.Tensor, arrival: Any) -> None:
        pass


class StreamCopies:
    """Of a GPU's: on a stream beside the one that computes, into page-locked memory.

    torch gives page-locked memory back, to be used again, once the copies that it is part of are
    done; `record_stream` has it wait so with a GPU's.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    def out(self, tensor: torch.Tensor) -> torch.Tensor:
        host = torch.empty(tensor.size(), dtype=tensor.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            host.copy_(tensor.detach(), non_blocking=True)
        tensor.record_stream(self._stream)
        return host

    def back(self, host: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, Any]:
        # On the stream that the copy out was on, and so behind it.
        with torch.cuda.stream(self._stream):
            tensor = host.to(device, non_blocking=True)
            return tensor, self._stream.record_event()

    def wait(self, tensor: torch.Tensor, arrival: Any) -> None:
        computing = torch.cuda.current_stream()
        computing.wait_event(arrival)
        tensor.record_stream(computing)


class HostCopies:
    """What autograd has put away in host memory, in its order.

    The backward pass takes the last first; with each that it takes, the one before it sets out.
    """

    def __init__(self, copies_of: Callable[[torch.device], Copies] | None = None) -> None:
        self._copies_of = copies_of or _copies_of
        self._copies: Copies | None = None
        self._away: list[weakref.ref[_Away]] = []

    def hooks(self) -> AbstractContextManager[None]:
        """Return the context in which what is saved for backward is put away."""
        found: AbstractContextManager[None] = saved_tensors_hooks(self.put_away, self.take_back)
        return found

    def put_away(self, tensor: torch.Tensor) -> Any:
        """Return what stands for a tensor; itself where it is a weight, which stays anyway."""
        if isinstance(tensor, torch.nn.Parameter) or not tensor.is_floating_point():
            return tensor
        if self._copies is None:
            self._copies = self._copies_of(tensor.device)
        self._newest()
        away = _Away(self._copies.out(tensor), tensor.device)
        self._away.append(weakref.ref(away))
        return away

    def take_back(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        assert self._copies is not None
        assert isinstance(packed, _Away)
        tensor, arrival = packed.coming or self._copies.back(packed.host, packed.device)
        packed.coming, packed.is_taken = None, True  # taken again, it is copied again
        self._copies.wait(tensor, arrival)
        if (before := self._newest()) is not None and before.coming is None:
            before.coming = self._copies.back(before.host, before.device)
        return tensor

    def _newest(self) -> _Away | None:
        """Return what was put away last and is still to be taken.

        What has been is forgotten, and what autograd has let go of, as of a pass that was given up.
        """
        while self._away:
            last = self._away[-1]()
            if last is not None and not last.is_taken:
                return last
            self._away.pop()
        return None


class _Away:
    """A tensor that is in host memory."""

    def __init__(self, host: torch.Tensor, device: torch.device) -> None:
        self.host, self.device = host, device
        self.coming: tuple[torch.Tensor, Any] | None = None
        """Its copy under way, and what tells that it is back."""
        self.is_taken = False


def _copies_of(device: torch.device) -> Copies:
    return StreamCopies() if device.type == "cuda" else PlainCopies()
