"""The ranks that write one checkpoint together, and agree on its outcome."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

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
        # The ranks of a node follow each other.
        node_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if node_local else None
        self.disk = 0 if node_size is None else rank // node_size
        """Number of the disk that this rank shares with others."""
        self.is_first = rank == 0 if node_size is None else rank % node_size == 0
        """Whether this rank acts for all of its disk."""
        self._group = None
        if dist.is_initialized():
            timeout = timedelta(seconds=SLOWEST_WRITE_SECONDS)
            self._group = dist.new_group(backend="gloo", timeout=timeout)

    def attempt(self, act: Callable[[], T]) -> list[T]:
        """Call a function, not collective itself, on every rank; return what each rank got.

        Collective. Raises SaveFailed on all ranks where one of them raised anything.
        """
        failure: tuple[bool, str] | None = None
        value: T | None = None
        try:
            value = act()
        except OSError as error:
            place = f": {error.filename}" if error.filename else ""
            failure = True, f"rank {self.rank}: {error.strerror or error}{place}"
        except Exception:
            failure = False, f"rank {self.rank}:\n{traceback.format_exc()}"
        everyone: list[Any] = [(failure, value)]
        if self._group is not None:
            everyone = [None] * dist.get_world_size(self._group)
            dist.all_gather_object(everyone, (failure, value), group=self._group)
        if failures := [failed for failed, _ in everyone if failed is not None]:
            raise SaveFailed(
                _in_short([text for _, text in failures]),
                is_of_disk=all(is_of_disk for is_of_disk, _ in failures),
            )
        return [value for _, value in everyone]


def _in_short(reasons: list[str]) -> str:
    more = len(reasons) - 1
    return reasons[0] + (f" (and {counted(more, 'more rank')})" if more else "")
