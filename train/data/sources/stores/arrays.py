"""Token ids as arrays: .npy, raw .bin, Megatron's .bin with its .idx, datatrove's .ds."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardwright.train.data.sources.files.errors import unreadable
from shardwright.train.data.sources.mapped import forgetting, pages_of
from shardwright.train.data.sources.stores.ids import Ids, in_pieces, split
from shardwright.train.errors import UserError

MEGATRON = b"MMIDIDX\x00\x00"
MEGATRON_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
HEADER = struct.Struct("<9sQBQQ")


def documents_of_npy(path: Path, dtype: str, separator: int | None) -> Iterator[Ids]:
    """Yield the documents of a NumPy array: of ids one after the other, or of rows."""
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise unreadable(path, error) from None
    if not np.issubdtype(ids.dtype, np.integer) or ids.ndim not in (1, 2):
        raise UserError(
            f"data.paths: {path} is an array of {ids.dtype} with {ids.ndim} dimensions; token ids "
            "are whole numbers in one, or two of equally long samples"
        )
    if dtype not in ("auto", ids.dtype.name):
        raise UserError(
            f"data.dtype={dtype}: {path} says itself that it holds {ids.dtype}; set it to auto"
        )
    # Samples of one length are a corpus that somebody has cut: put together again, it is as it was.
    yield from _once(split(ids.reshape(-1), separator), ids)


def documents_of_raw(path: Path, dtype: str, separator: int | None) -> Iterator[Ids]:
    """Yield the documents of a .bin: Megatron's if there is its .idx, else of raw numbers."""
    index = path.with_suffix(".idx")
    if index.exists():
        yield from _of_megatron(path, index)
        return
    if dtype == "auto":
        raise UserError(
            f"data.paths: {path} has no .idx beside it, and does not say itself which numbers it "
            "holds; set data.dtype (uint16 or uint32, as a rule)"
        )
    ids = _mapped(path, dtype)
    yield from _once(split(ids, separator), ids)


def _of_megatron(path: Path, index: Path) -> Iterator[Ids]:
    try:
        header = index.read_bytes()[: HEADER.size] if index.stat().st_size < 2**12 else _head(index)
        magic, version, code, sequences, documents = HEADER.unpack(header)
        if magic != MEGATRON or version != 1 or code not in MEGATRON_TYPES:
            raise ValueError(f"its .idx begins with {magic!r}, version {version}, type {code}")
        numbers = _mapped(index, "uint8")[HEADER.size :]
        lengths = numbers[: 4 * sequences].view("<i4")
        ends = numbers[12 * sequences :][: 8 * documents].view("<i8")
        if len(lengths) != sequences or len(ends) != documents:
            raise ValueError("its .idx ends early")
    except (OSError, ValueError, struct.error) as error:
        raise unreadable(path, error) from None
    ids = _mapped(path, MEGATRON_TYPES[code])
    if int(lengths.sum(dtype=np.int64)) != len(ids):
        raise unreadable(path, ValueError("it is not as long as its .idx says"))
    # By the number of their first sequence; some writers leave out the last, which is all there is.
    bounds = [*(int(end) for end in ends if end > 0)]
    if not bounds or bounds[-1] != sequences:
        bounds.append(int(sequences))
    yield from _once(_cut(ids, _ends_of(lengths, bounds)), ids)


def _ends_of(lengths: NDArray[Any], bounds: list[int]) -> Iterator[int]:
    """Yield where each document ends in the ids, by the number of the sequence after its last."""
    end = first = 0
    for last in bounds:
        end += int(lengths[first:last].sum(dtype=np.int64))
        first = last
        yield end


def _cut(ids: NDArray[Any], ends: Iterable[int]) -> Iterator[Ids]:
    """Yield the documents that end there."""
    at = 0
    for end in ends:
        yield from in_pieces(ids[at:end])
        at = end


def _once(documents: Iterator[Ids], ids: NDArray[Any]) -> Iterator[Ids]:
    """Yield documents whose ids are not read a second time."""
    return forgetting(documents, pages_of(ids), lambda piece: piece.ids.nbytes)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEADER.size)


def documents_of_datatrove(path: Path, dtype: str, separator: int | None) -> Iterator[Ids]:
    """Yield the documents of a .ds, whose ends are in the .ds.index beside it."""
    index = Path(f"{path}.index")
    if not index.exists():
        if dtype == "auto":
            raise UserError(
                f"data.paths: {path} has no {index.name} beside it, and does not say itself which "
                "numbers it holds; set data.dtype to uint16 or uint32"
            )
        ids = _mapped(path, dtype)
        yield from _once(split(ids, separator), ids)
        return
    ends = _mapped(index, "uint64")
    count = int(ends[-1]) if len(ends) else 0
    size = os.path.getsize(path)
    width = size // count if count else 0
    if (count or size) and (width not in (2, 4) or width * count != size):
        raise unreadable(
            path, ValueError(f"its index tells of {count:,} tokens, and it has {size:,} bytes")
        )
    ids = _mapped(path, "uint16" if width == 2 else "uint32")
    yield from _once(_cut(ids, map(int, ends)), ids)


def _mapped(path: Path, dtype: str) -> NDArray[Any]:
    try:
        size = path.stat().st_size
        if size % np.dtype(dtype).itemsize:
            raise ValueError(f"its {size:,} bytes are no whole number of {dtype}")
        return np.memmap(path, dtype=dtype, mode="r") if size else np.empty(0, dtype)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
