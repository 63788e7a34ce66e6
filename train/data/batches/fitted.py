"""Samples that are rows of whole documents, as best-fit packing has arranged them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardwright.train.data.batches.samples import Extent, Samples, Window
from shardwright.train.data.tokens.fitting import Room, Rows


def room_of(sequence_length: int, *, causal: bool) -> Room:
    """Return what a row of so many positions takes. Pure.

    For clm the last token is predicted only, and for mlm a frame takes two positions.
    """
    return Room(sequence_length + 1, 1) if causal else Room(sequence_length - 2, 0)


@dataclass(frozen=True)
class FittedSamples(Samples):
    """One store's samples, each a row of documents or of parts of long ones.

    The last token of a document predicts the first of the next in its row, as where documents are
    packed back to back, but not the first of the rest of a cut one.
    """

    rows: Rows

    def __len__(self) -> int:
        return len(self.rows)

    def extent(self) -> Extent:
        return Extent(len(self), len(self.store.tokens), 0, 0, 0)

    def __getitem__(self, index: int) -> Window:
        assert 0 <= index < len(self)
        starts, stops = self.rows[index]
        parts = list(zip(starts.tolist(), stops.tolist(), strict=True))
        words = self.store.word_starts
        begins = np.cumsum(stops - starts)[:-1]
        return Window(
            np.concatenate([self.store.tokens[a:b] for a, b in parts]).astype(np.int64),
            None if words is None else np.concatenate([words[a:b] for a, b in parts]),
            document_ends=begins,
            not_predicted=begins[~self._begin_documents(starts[1:])],
        )

    def lengths(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        tokens = self.rows.tokens[indices].astype(np.int64)
        return np.asarray(tokens - 1 if self.causal else tokens + 2)

    def _begin_documents(self, starts: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return of each place in the store whether a document begins there."""
        ends = self.store.document_ends
        assert ends is not None, "best-fit packing keeps where documents end"
        before = np.searchsorted(ends, starts)
        return (starts == 0) | (ends[np.minimum(before, len(ends) - 1)] == starts)
