"""Fixed-length samples out of token stores, by arithmetic: nothing is copied or listed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardwright.train.data.batches.sampler import all_permuted, permuted
from shardwright.train.data.tokens.store import TokenStore

LINES_AT_ONCE = 2**20


class Window(NamedTuple):
    """Some consecutive tokens of a store."""

    tokens: NDArray[np.int64]
    """Ids, shape (n,)."""
    word_starts: NDArray[np.uint8] | None
    """1 where a token begins a word, shape (n,)."""
    document_ends: NDArray[np.int64] | None = None
    """Where documents end within it, above 0 and below n; None where that is not kept."""
    not_predicted: NDArray[np.int64] | None = None
    """Tokens after the first that what is before them does not lead to; None is none."""


class Extent(NamedTuple):
    """How much of a store its samples hold."""

    samples: int
    tokens: int
    """In samples, each counted once."""
    tokens_left_out: int
    """In none: cut off lines, or too few for a last sample."""
    lines_cut: int
    """Samples that are the beginning of a longer line."""
    longest_line: int
    """In tokens; 0 where documents are packed."""


@dataclass(frozen=True)
class Samples:
    """One store's samples.

    For clm a sample is ``sequence_length`` + 1 tokens at a stride of ``sequence_length``, so that
    each token is predicted once; for mlm it is the ``sequence_length`` - 2 tokens that a frame of
    two special tokens leaves room for. Of a line store a sample is a line, cut to that length.
    Where there is a ``window``, a sample is that many tokens.
    """

    store: TokenStore
    sequence_length: int
    causal: bool
    window: int | None = field(default=None, kw_only=True)

    @cached_property
    def _stride(self) -> int:
        if self.window is not None:
            return self.window
        return self.sequence_length if self.causal else self.sequence_length - 2

    def __len__(self) -> int:
        if self.store.line_ends is not None:
            return len(self.store.line_ends)
        return max(0, len(self.store.tokens) - self.causal) // self._stride

    def extent(self) -> Extent:
        """Count what the samples hold; of a line store this reads where all lines end."""
        ends, count = self.store.line_ends, len(self)
        stored = len(self.store.tokens)
        if ends is None:
            held = count * self._stride + (self.causal and count > 0)
            return Extent(count, held, stored - held, 0, 0)
        # One more than the stride: for clm the last label, for mlm the end, which is in the frame.
        room = self._stride + 1
        held = cut = longest = 0
        for first in range(0, count, LINES_AT_ONCE):
            before = ends[first - 1] if first else 0
            lengths = np.diff(ends[first : first + LINES_AT_ONCE], prepend=before)
            held += int(np.minimum(lengths, room).sum())
            cut += int((lengths > room).sum())
            longest = max(longest, int(lengths.max()))
        return Extent(count, held, stored - held, cut, longest)

    def __getitem__(self, index: int) -> Window:
        assert 0 <= index < len(self)
        ends = self.store.line_ends
        if ends is None:
            start = index * self._stride
            stop = start + self._stride + self.causal
        else:
            start = int(ends[index - 1]) if index else 0
            # A line's end token is to be predicted; for mlm the frame takes its place.
            stop = int(ends[index]) - (not self.causal)
            stop = min(stop, start + self._stride + self.causal)
        starts = self.store.word_starts
        return Window(
            np.asarray(self.store.tokens[start:stop], dtype=np.int64),
            None if starts is None else np.asarray(starts[start:stop]),
            _between(self.store.document_ends, start, stop),
        )

    def lengths(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many tokens of each of some samples are trained on, shape (n,).

        Those are the positions of its row in a batch, padding left out: for mlm with its frame.
        """
        ends = self.store.line_ends
        if ends is None:
            return np.full(len(indices), self.sequence_length)
        starts = np.where(indices > 0, ends[np.maximum(indices - 1, 0)], 0)
        # For clm the last token is predicted only; for mlm it gives way to the frame's two.
        kept = np.minimum(ends[indices] - starts - 1, self._stride)
        return np.asarray(kept if self.causal else kept + 2)


@dataclass(frozen=True)
class Mixture:
    """What one epoch is made of: of each source its weight times its number of samples.

    Where a weight is no whole number the source's samples go round in a fixed random order, so
    that the next epoch continues where the last one stopped.
    """

    sources: Sequence[Any]
    """For each source its samples."""
    weights: tuple[float, ...]
    seed: int

    @cached_property
    def quotas(self) -> tuple[int, ...]:
        """Samples of each source in one epoch; at least 1 of one that has any, and a weight."""
        pairs = zip(self.sources, self.weights, strict=True)
        return tuple(max(1, round(len(s) * w)) if len(s) and w else 0 for s, w in pairs)

    def __len__(self) -> int:
        return sum(self.quotas)

    def locate(self, epoch: int, index: int) -> tuple[int, int]:
        """Return source and number of the sample that is ``index`` in an epoch, unshuffled."""
        assert 0 <= index < len(self)
        source = 0
        while index >= self.quotas[source]:
            index -= self.quotas[source]
            source += 1
        size, quota = len(self.sources[source]), self.quotas[source]
        if quota % size == 0:
            return source, index % size
        turn = (epoch * quota + index) % size
        return source, permuted((self.seed, -1 - source), size, turn)

    def numbers(self, source: int, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the numbers that `locate` gives, of samples counted within one source."""
        size, quota = len(self.sources[source]), self.quotas[source]
        if quota % size == 0:
            return np.asarray(indices % size)
        return self.in_turn(source, (epoch * quota + indices) % size)

    def in_turn(self, source: int, turns: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return which samples of a source, of a weight that is no whole number, come when."""
        return all_permuted((self.seed, -1 - source), len(self.sources[source]), turns)

    def get(self, epoch: int, index: int) -> Any:
        source, number = self.locate(epoch, index)
        return self.sources[source][number]


def _between(ends: NDArray[np.int64] | None, start: int, stop: int) -> NDArray[np.int64] | None:
    """Return the ends that are above ``start`` and below ``stop``, counted from ``start``."""
    if ends is None:
        return None
    first, last = np.searchsorted(ends, start, "right"), np.searchsorted(ends, stop, "left")
    return np.asarray(ends[first:last]) - start
