"""The ranks that write one checkpoint together, and agree on its outcome."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from shardwright.train.units import counted

T = TypeVar("T")

SLOWEST_WRITE_SECONDS = 4 * 3600
"""How long one rank waits for another to have written its part."""


class SaveFailed(RuntimeError):
    """A checkpoint could not be written; every rank raises it alike. The message says why."""

    is_of_disk: bool
    """Whether the file system is all that was to blame."""

    def __init__(self, reason: str, *, is_of_disk: bool) -> None:
        super().__init__(reason)
        self.is_of_disk = is_of_disk


class Peers:
    """All ranks, on a group of their own: a thread may use it beside the training's collectives.

    Making it is collective.
    """

    def __init__(self, rank: int, *, node_local: bool = False) -> None:
        """``node_local``: each node has a disk of its own for what its ranks write."""
        self.rank = rank
        self._group = None
        self._world_size = 1
        if dist.is_initialized():
            timeout = timedelta(seconds=SLOWEST_WRITE_SECONDS)
            self._group = dist.new_group(backend="gloo", timeout=timeout)
            self._world_size = dist.get_world_size(self._group)
        # The ranks of a node follow each other.
        node_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if node_local else self._world_size
        self.disk = rank // node_size
        """Number of the disk that this rank shares with others."""
        self.disks = -(-self._world_size // node_size)
        self._on_disk = range(
            self.disk * node_size, min(self._world_size, (self.disk + 1) * node_size)
        )
        self.is_first = rank == self._on_disk[0]
        """Whether this rank acts for all of its disk."""

    def attempt(self, act: Callable[[], T]) -> T:
        """Call a function, not collective itself, on every rank; return what this rank got.

        Collective, at the cost of two numbers. Raises SaveFailed on all ranks where one of them
        raised anything.
        """
        failure: tuple[bool, str] | None = None
        try:
            value = act()
        except OSError as error:
            place = f": {error.filename}" if error.filename else ""
            failure = True, f"rank {self.rank}: {error.strerror or error}{place}"
        except Exception:
            failure = False, f"rank {self.rank}:\n{traceback.format_exc()}"
        self._agree(failure)
        return value

    def collect(self, act: Callable[[], T]) -> list[T]:
        """Do what `attempt` does; return what each rank of a disk got to the disk's first one.

        The others get nothing back, so that no more is sent than one rank needs.
        """
        value = self.attempt(act)
        if not self.is_first:
            dist.send_object_list([value], dst=self._on_disk[0], group=self._group)
            return []
        values = [value]
        for rank in self._on_disk[1:]:
            received: list[Any] = [None]
            dist.recv_object_list(received, src=rank, group=self._group)
            values += received
        return values

    def of_each_disk(self, value: T) -> list[T]:
        """Return what the first rank of each disk gives, in their order. Collective."""
        if self.disks == 1:
            return [value]
        everyone: list[Any] = [None] * self._world_size
        mine = (value,) if self.is_first else None
        dist.all_gather_object(everyone, mine, group=self._group)
        return [found for given in everyone if given is not None for found in given]

    def _agree(self, failure: tuple[bool, str] | None) -> None:
        """Raise SaveFailed on all ranks where there is a failure on one. Collective."""
        everyone: list[Any] = [failure]
        if self._group is not None:
            failed = torch.tensor(int(failure is not None))
            dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=self._group)
            if not failed:
                return
            everyone = [None] * self._world_size
            dist.all_gather_object(everyone, failure, group=self._group)
        if failures := [found for found in everyone if found is not None]:
            raise SaveFailed(
                _in_short([text for _, text in failures]),
                is_of_disk=all(is_of_disk for is_of_disk, _ in failures),
            )


def _in_short(reasons: list[str]) -> str:
    more = len(reasons) - 1
    return reasons[0] + (f" (and {counted(more, 'more rank')})" if more else "")
