"""A tensor as it is to be written, and which elements go where."""

from __future__ import annotations

import math
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
