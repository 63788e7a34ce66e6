"""Best-fit packing: which documents share a row, so that few of them are cut.

After Ding et al., "Fewer Truncations Improve Language Modeling" (2024): a document that is longer
than a row is cut into whole rows and a rest, and then rests and shorter documents are put, the
longest first, each into the row in which it leaves the least room (best-fit decreasing). So only
what cannot be whole is cut, and what stays free in a row is padding.

As many documents at a time as `Limits` says, so that memory is bounded; the result is a function of
where documents end, the length of rows and these limits alone. Token stores stay as they are: what
is written lists for each row the parts of the store that it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardwright.train.console import progress
from shardwright.train.data.tokens.store import TokenStore, mapped

FORMAT = 1
Numbers = NDArray[np.int64]


class Limits(NamedTuple):
    """What is packed together, at most."""

    documents: int = 2**16
    tokens: int = 2**26
    """A longer document is packed alone."""


LIMITS = Limits()


class Room(NamedTuple):
    """What a row takes."""

    tokens: int
    overlap: int
    """Tokens that what is cut has in common with what it is cut from: for clm 1, as the last token
    of a row is predicted there and nothing from it."""


class Pieces(NamedTuple):
    """Documents, or parts of them, as they lie in a store; each shape (n,)."""

    starts: Numbers
    stops: Numbers


class Counts(NamedTuple):
    """What came of a store."""

    documents: int
    cut: int
    """Documents that are in more than one row."""
    rows: int
    tokens: int
    """In rows, those twice that are in two of them."""


class Rows:
    """Which parts of a token store each row has, memory-mapped."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory, self.name = directory, name

    @cached_property
    def _pieces(self) -> Numbers:
        """Start and stop of each piece, row after row, shape (n, 2)."""
        return mapped(_paths(self.directory, self.name)[0], np.dtype(np.int64)).reshape(-1, 2)

    @cached_property
    def _ends(self) -> Numbers:
        """The index after each row's last piece, shape (rows,)."""
        return mapped(_paths(self.directory, self.name)[1], np.dtype(np.int64))

    @cached_property
    def tokens(self) -> NDArray[np.int32]:
        """How many each row has, shape (rows,)."""
        return mapped(_paths(self.directory, self.name)[2], np.dtype(np.int32))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: int) -> Pieces:
        first = int(self._ends[row - 1]) if row else 0
        pieces = np.asarray(self._pieces[first : self._ends[row]])
        return Pieces(pieces[:, 0], pieces[:, 1])

    def __reduce__(self) -> tuple[type[Rows], tuple[Path, str]]:
        # A worker process maps the files anew.
        return Rows, (self.directory, self.name)


def write_rows(
    store: TokenStore, room: Room, directory: Path, name: str, limits: Limits = LIMITS
) -> Counts:
    """Fit a store's documents into rows, write what `Rows` reads, and return what came of it."""
    documents = cut = rows = tokens = 0
    with ExitStack() as opened:
        files = [opened.enter_context(path.open("wb")) for path in _paths(directory, name)]
        shown = opened.enter_context(progress.phase(f"fitting {name}", unit="document"))
        for begin, ends in _together(store, limits):
            starts = np.concatenate(([begin], ends[:-1]))
            pieces, of_documents = cut_up(starts, ends, room)
            arranged, last = arrange(pieces, room.tokens)
            lengths = arranged.stops - arranged.starts
            filled = np.add.reduceat(lengths, np.concatenate(([0], last[:-1])))
            before = files[0].tell() // (2 * arranged.starts.itemsize)
            files[0].write(np.stack(arranged, axis=1).tobytes())
            files[1].write((last + before).tobytes())
            files[2].write(filled.astype(np.int32).tobytes())
            documents += len(ends)
            cut += int((np.bincount(of_documents) > 1).sum())
            rows, tokens = rows + len(last), tokens + int(lengths.sum())
            shown.advance(len(ends))
    return Counts(documents, cut, rows, tokens)


def cut_up(starts: Numbers, ends: Numbers, room: Room) -> tuple[Pieces, Numbers]:
    """Cut documents that are longer than a row; return all pieces, and of which document each is.

    Pure. What is left of a cut document is dropped where it has no more than the overlap.
    """
    stride = room.tokens - room.overlap
    whole = np.maximum(ends - starts - room.overlap, 0) // stride
    rest = ends - starts - whole * stride
    counts = whole + ((rest > room.overlap) | (whole == 0))
    of_documents = np.repeat(np.arange(len(starts)), counts)
    within = np.arange(len(of_documents)) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = starts[of_documents] + within * stride
    return Pieces(begins, np.minimum(begins + room.tokens, ends[of_documents])), of_documents


def arrange(pieces: Pieces, room: int) -> tuple[Pieces, Numbers]:
    """Put pieces into rows; return them row after row, and the index after each row's last. Pure.

    Rows come in the order of their first pieces, and pieces in that of the store.
    """
    lengths = pieces.stops - pieces.starts
    row_of = np.arange(len(lengths))
    short = np.flatnonzero(lengths < room)
    row_of[short] = len(lengths) + best_fit(lengths[short], room)
    _, row_of = np.unique(row_of, return_inverse=True)
    first = np.full(int(row_of.max()) + 1, np.iinfo(np.int64).max)
    np.minimum.at(first, row_of, pieces.starts)
    order = np.lexsort((pieces.starts, first[row_of]))
    arranged, rows = Pieces(pieces.starts[order], pieces.stops[order]), row_of[order]
    return arranged, np.append(np.flatnonzero(np.diff(rows)) + 1, len(rows))


def best_fit(lengths: Numbers, room: int) -> Numbers:
    """Return for each length the number of the row that it goes into, from 0. Pure.

    The longest first, each into the row with the least room of those that have enough, or into a
    new one. Which rows have how much room is a set of bits, of which the lowest from a length on is
    found at once.
    """
    rows = np.empty(len(lengths), dtype=np.int64)
    with_room: list[list[int]] = [[] for _ in range(room + 1)]
    bits = opened = 0
    order = np.argsort(-lengths, kind="stable")
    for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        enough = bits >> length
        if enough:
            least = length + (enough & -enough).bit_length() - 1
            row = with_room[least].pop()
            if not with_room[least]:
                bits ^= 1 << least
        else:
            least, row = room, opened
            opened += 1
        rows[index] = row
        if left := least - length:
            with_room[left].append(row)
            bits |= 1 << left
    return rows


def _together(store: TokenStore, limits: Limits) -> Iterator[tuple[int, Numbers]]:
    """Yield where documents that are packed together begin in a store, and where each ends."""
    ends = store.document_ends
    assert ends is not None, "best-fit packing keeps where documents end"
    first = begin = 0
    while first < len(ends):
        part = np.asarray(ends[first : first + limits.documents])
        part = part[: max(1, int(np.searchsorted(part, begin + limits.tokens, "right")))]
        yield begin, part
        first, begin = first + len(part), int(part[-1])


def _paths(directory: Path, name: str) -> tuple[Path, Path, Path]:
    suffixes = ("pieces", "row_ends", "row_tokens")
    pieces, ends, tokens = (directory / f"{name}.{suffix}" for suffix in suffixes)
    return pieces, ends, tokens


@dataclass(frozen=True)
class Share:
    """How many of some documents are cut, and how much of the rows is padding."""

    documents: int
    longer: int
    """Than a sample: cut in whatever way they are packed."""
    cut: int
    """Of the others."""
    padding: float
    """Of all positions."""

    def __str__(self) -> str:
        longer = self.longer / max(1, self.documents)
        cut = self.cut / max(1, self.documents - self.longer)
        return (
            f"{self.longer:,} of {self.documents:,} documents ({longer:.1%}) are longer than a "
            f"sample, and cut in any case; of the others {self.cut:,} ({cut:.1%}) are cut, and "
            f"{self.padding:.2%} of the positions are padding"
        )


def share_of(counts: Any, sequence_length: int, *, causal: bool) -> Share:
    """Return what came of stores, by their `Counts`. Pure."""
    found = [Counts(*each) for each in counts]
    rows = sum(each.rows for each in found)
    # For clm a row's last token is predicted alone; for mlm its frame has two.
    used = sum(each.tokens + (-each.rows if causal else 2 * each.rows) for each in found)
    return Share(
        sum(each.documents for each in found),
        longer=sum(each.cut for each in found),  # it cuts no other
        cut=0,
        padding=1 - used / max(1, rows * sequence_length),
    )
