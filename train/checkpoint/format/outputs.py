"""A tensor as it is to be written, and which elements go where."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Output:
    """A tensor as it is to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Place:
    """Where some consecutive elements of a tensor go."""

    start: int
    """The first one's place in the whole flattened tensor."""
    length: int
    output: str
    output_start: int


def share(lengths: Iterable[int], index: int, count: int) -> Iterator[tuple[int, int, int]]:
    """Yield what one of ``count`` writers takes of tensors that all of them could write. Pure.

    Which tensor by its number, its first element and the one behind its last. Laid end to end, the
    tensors are cut into equal runs: so each writer has consecutive elements, in few files.
    """
    known = list(lengths)
    total = sum(known)
    begin, end = (total * n // count for n in (index, index + 1))
    at = 0
    for number, length in enumerate(known):
        first, last = max(begin - at, 0), min(end - at, length)
        if first < last:
            yield number, first, last
        at += length
