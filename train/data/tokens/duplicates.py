"""Documents of which there is another before them, byte for byte: found by hashes, and left out.

Beside the tokens of a corpus, or of each shard, lies a record of every document in their order.
Those that are kept are copied when the stores are joined.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardwright.train.data.sources.corpus import Piece
from shardwright.train.data.tokens.store import StoreWriter, TokenStore

FILE = "documents.hashes"
RECORD = np.dtype(
    [("high", "<u8"), ("low", "<u8"), ("units", "<i8"), ("source", "<i4"), ("held_out", "<i4")]
)
"""Of a document: its hash, and how many ends its store has of it: one, or one for each line."""
_RECORD = struct.Struct("<16sqii")
assert _RECORD.size == RECORD.itemsize
MOST_AT_ONCE = 2**22
"""Hashes that are sorted together, in 60 bytes each; of more, parts by their first bits are."""
RECORDS_AT_ONCE = 2**16
TOKENS_AT_ONCE = 2**22

Bools = NDArray[np.bool_]


class Dropped(NamedTuple):
    """What was left out of stores."""

    documents: int
    tokens: int


class Recorder:
    """Writes the record of each document of a corpus as its pieces go by; a context manager."""

    def __init__(self, directory: Path, *, by_line: bool) -> None:
        self._path = directory / FILE
        self._by_line = by_line

    def __enter__(self) -> Recorder:
        self._file = self._path.open("wb")
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def passing(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """Yield the pieces, and note each document before what follows its last one.

        A long document is hashed piece by piece.
        """
        hasher, units, is_open = new_hash(), 0, False
        for piece in pieces:
            if piece.begins:
                hasher, units, is_open = new_hash(), 0, False
            hasher.update(piece.text.encode("utf-8", "surrogatepass"))
            if self._by_line:
                lines, is_open = lines_in(piece, is_open)
                units += lines
            yield piece
            if piece.ends:
                count = units if self._by_line else 1
                self._file.write(_RECORD.pack(hasher.digest(), count, piece.source, piece.held_out))


def new_hash() -> Any:
    return hashlib.blake2b(digest_size=16, person=b"document")


def lines_in(piece: Piece, is_open: bool) -> tuple[int, bool]:
    """Return how many lines of a store end in a piece, and whether one stays open. Pure.

    Those without any text are left out of the store; ``is_open`` says whether the line that the
    piece begins in has some already.
    """
    count = 0
    *lines, rest = piece.text.split("\n")
    for line in lines:
        count += is_open or not _is_blank(line)
        is_open = False
    is_open = is_open or not _is_blank(rest)
    return (count + is_open, False) if piece.ends else (count, is_open)


def _is_blank(text: str) -> bool:
    return not text or text.isspace()


def first_ones(directories: Sequence[Path]) -> list[Bools]:
    """Return for each directory which of its documents none before is the same as, shape (n,).

    The memory that it takes is one byte for each document, and that of `MOST_AT_ONCE`.
    """
    counts = [(directory / FILE).stat().st_size // RECORD.itemsize for directory in directories]
    bits = max(0, (sum(counts) // MOST_AT_ONCE).bit_length())
    kept = np.ones(sum(counts), dtype=bool)
    for part in range(2**bits):
        hashes, places = _part(directories, part, bits)
        order = np.lexsort((hashes["low"], hashes["high"]))  # stable: the first one stays first
        ordered = hashes[order]
        kept[places[order[1:][ordered[1:] == ordered[:-1]]]] = False
        del hashes, places, order, ordered  # before the next part comes into memory
    return np.split(kept, np.cumsum(counts)[:-1])


def _part(directories: Sequence[Path], part: int, bits: int) -> tuple[Any, NDArray[np.int64]]:
    """Return the hashes that begin with some bits, and their places among all documents."""
    wanted: list[Any] = [np.empty(0, RECORD)[["high", "low"]]]
    places = [np.empty(0, np.int64)]
    first = 0
    for directory in directories:
        for records in records_of(directory):
            mine: Any = slice(None)
            if bits:
                mine = np.flatnonzero(records["high"] >> np.uint64(64 - bits) == part)
            hashes = np.empty(len(records["high"][mine]), wanted[0].dtype)
            hashes["high"], hashes["low"] = records["high"][mine], records["low"][mine]
            wanted.append(hashes)
            places.append(np.arange(first, first + len(records))[mine])
            first += len(records)
    return np.concatenate(wanted), np.concatenate(places)


def records_of(directory: Path) -> Iterator[NDArray[Any]]:
    """Yield the records of a directory's documents in their order, some at a time."""
    with (directory / FILE).open("rb") as file:
        while len(records := np.fromfile(file, RECORD, RECORDS_AT_ONCE)):
            yield records


def copy_records(directory: Path, kept: Bools, to: BinaryIO) -> None:
    """Write the records of a directory's documents that are kept."""
    first = 0
    for records in records_of(directory):
        to.write(records[kept[first : first + len(records)]].tobytes())
        first += len(records)


def extend(
    writer: StoreWriter, directory: Path, name: str, key: tuple[bool, int], kept: Bools
) -> tuple[int, Dropped]:
    """Append the documents of a store that are kept; return how many, and what is left out.

    ``key`` is whether it is held out, and its source; ``kept`` tells of all of the directory.
    """
    store = TokenStore(directory, name)
    ends = store.document_ends if store.line_ends is None else store.line_ends
    assert ends is not None, "of a corpus without duplicates they are kept"
    first, unit, token, documents, dropped = 0, 0, 0, 0, Dropped(0, 0)
    for records in records_of(directory):
        mine = (records["held_out"] == key[0]) & (records["source"] == key[1])
        stays = kept[first : first + len(records)][mine]
        first += len(records)
        units = unit + np.cumsum(records["units"][mine])
        for is_kept, begin, end in _runs(stays):
            until = int(units[end - 1])
            stop = int(ends[until - 1]) if until else 0
            if is_kept:
                _copy(writer, store, ends[unit:until], token, stop)
                if store.text_sizes is not None:
                    writer.add_texts(store.text_sizes[unit:until])
                documents += end - begin
            else:
                dropped = Dropped(dropped.documents + end - begin, dropped.tokens + stop - token)
            unit, token = until, stop
    assert token == len(store.tokens), "every document has a record"
    return documents, dropped


def _runs(flags: Bools) -> Iterator[tuple[bool, int, int]]:
    """Yield value, begin and end of each run of equal values. Pure."""
    changes = np.flatnonzero(np.diff(flags)) + 1
    bounds = [0, *changes.tolist(), len(flags)] if len(flags) else []
    for begin, end in pairwise(bounds):
        yield bool(flags[begin]), begin, end


def _copy(
    writer: StoreWriter, store: TokenStore, ends: NDArray[np.int64], start: int, stop: int
) -> None:
    """Append tokens of a store, of which ``ends`` are those of documents or lines."""
    words = store.word_starts
    for begin in range(start, stop, TOKENS_AT_ONCE):
        end = min(begin + TOKENS_AT_ONCE, stop)
        low, high = np.searchsorted(ends, [begin, end], "right")
        writer.append(
            store.tokens[begin:end],
            () if words is None else words[begin:end],
            np.asarray(ends[low:high]) - begin,
        )
