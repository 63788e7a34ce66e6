"""One block of host memory for the copies of a run's every save, pinned where there is a GPU."""

from __future__ import annotations

import logging
import mmap
import weakref
from collections.abc import Iterable

import torch

from shardwright.train.units import size

logger = logging.getLogger(__name__)

_ALIGNMENT = 64
"""At what multiples tensors begin, in bytes, as torch's own do."""


class HostMemory:
    """Memory that is allocated once, at the size of a rank's part of a checkpoint, and kept.

    Each save carves its copies out of it anew, so the one before has to be on the disk by then.

    Not torch's pinned memory: its allocator rounds each tensor up to a power of two and keeps the
    block for good (c10/core/CachingHostAllocator.h, 2.13), which comes to twice the files' size.
    What is mapped by pages and registered with CUDA takes what it was asked for.
    """

    def __init__(self) -> None:
        self._block: _Block | None = None
        self._taken_bytes = 0

    def begin(self, needed_bytes: int, *, pinned: bool) -> None:
        """Make room for the copies of one save; what earlier ones have taken is overwritten."""
        self._taken_bytes = 0
        if self._block is None or self._block.bytes < needed_bytes:
            self.release()  # before the larger one is there
            self._block = _Block(needed_bytes, pinned=pinned) if needed_bytes else None

    def take(self, wanted_bytes: int) -> torch.UntypedStorage:
        """Return the next part as a storage of its own, of which a file gets nothing else."""
        if wanted_bytes == 0:
            return torch.UntypedStorage(0)
        assert self._block is not None
        start, self._taken_bytes = self._taken_bytes, self._taken_bytes + aligned([wanted_bytes])
        assert self._taken_bytes <= self._block.bytes, "more than was asked for"
        return self._block.part(start, wanted_bytes)

    def release(self) -> None:
        """Give the memory back, once nothing uses what was taken of it."""
        if self._block is not None:
            self._block.unpin()
            self._block = None


class _Block:
    """Whole pages. They are the process's own until the last part of them is gone."""

    def __init__(self, wanted_bytes: int, *, pinned: bool) -> None:
        self.bytes = -(-wanted_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        # Private, as after a fork no child is to write into it.
        self._pages = mmap.mmap(-1, self.bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.unpin = weakref.finalize(self, _unpin, self._pages if pinned and self._pin() else None)

    def part(self, start: int, length: int) -> torch.UntypedStorage:
        found = torch.frombuffer(self._pages, dtype=torch.uint8, count=length, offset=start)
        return found.untyped_storage()

    def _pin(self) -> bool:
        address = self.part(0, self.bytes).data_ptr()
        code = torch.cuda.cudart().cudaHostRegister(address, self.bytes, 0)
        if int(code) == 0:
            return True
        logger.warning(
            "%s of host memory for checkpoint.async=true could not be pinned (%s): each save holds "
            "up training for longer; a higher limit of locked memory (ulimit -l) may allow it",
            size(self.bytes),
            code,
        )
        return False


def _unpin(pages: mmap.mmap | None) -> None:
    if pages is not None:
        address = torch.frombuffer(pages, dtype=torch.uint8).data_ptr()
        torch.cuda.cudart().cudaHostUnregister(address)


def aligned(sizes: Iterable[int]) -> int:
    """Return what parts of these sizes take together, in bytes. Pure."""
    return sum(-(-wanted // _ALIGNMENT) * _ALIGNMENT for wanted in sizes)
