"""Files that are mapped and read once: their pages do not stay in memory."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.feather
import pytest

from shardwright.train.data.sources.files.skipping import Skipping
from shardwright.train.data.sources.files.tables import rows
from shardwright.train.data.sources.mapped import FORGOTTEN_BYTES, forgetting, mapped, pages_of
from shardwright.train.data.sources.stores.arrays import documents_of_npy, documents_of_raw

MIB = 2**20
SIZE = 4 * FORGOTTEN_BYTES
LOOK_EVERY = 16
"""Pieces of a file. Each look reads what all libraries of this process have mapped."""


def resident_bytes(path: Path) -> int:
    """Return how much of a mapped file is in this process's memory."""
    maps = Path("/proc/self/smaps").read_text()
    found = re.findall(rf"{re.escape(str(path))}\n(?:\w+:.*\n)*?Rss: +(\d+) kB", maps)
    return 1024 * sum(map(int, found))


def test_what_is_read_is_given_back_and_can_be_read_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    pages = mapped(path)
    starts = range(0, SIZE, MIB)
    peaks = []

    def blocks() -> Iterator[bytes]:
        for start in starts:
            yield pages[start : start + MIB]
            peaks.append(resident_bytes(path))

    for block in forgetting(blocks(), pages, len):
        assert block == bytes(range(256)) * (MIB // 256)
    assert FORGOTTEN_BYTES // 2 < max(peaks) < 2 * FORGOTTEN_BYTES
    assert pages[:256] == bytes(range(256))


def test_an_empty_file_is_not_mapped(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot mmap an empty file"):
        mapped(tmp_path / "file")


def test_pages_are_known_of_parts_of_an_array(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((4, 8), np.uint16))
    array = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert isinstance(pages_of(array), mmap.mmap)
    assert pages_of(array.reshape(-1)[3:]) is pages_of(array)
    assert pages_of(np.zeros(3)) is None


@pytest.mark.parametrize("name", ["a.arrow", "a.feather", "ids.npy", "ids.bin"])
def test_a_source_does_not_stay_in_memory(name: str, tmp_path: Path) -> None:
    """A table is in one batch, as a program may write it that has memory for it."""
    path, peaks = tmp_path / name, []
    text = "x" * (MIB // 4)
    if path.suffix in (".arrow", ".feather"):
        table = pyarrow.table({"text": [text] * (4 * SIZE // MIB)})
        if path.suffix == ".feather":
            pyarrow.feather.write_feather(table, str(path), "uncompressed", chunksize=10**6)
        else:
            with pyarrow.ipc.new_stream(str(path), table.schema) as stream:
                stream.write_table(table)
        for number, row in enumerate(rows(path, "text", None, Skipping())):
            assert row.text == text
            if number % LOOK_EVERY == LOOK_EVERY - 1:
                peaks.append(resident_bytes(path))
    else:
        ids = np.arange(SIZE // 2, dtype=np.uint16)
        if path.suffix == ".npy":
            np.save(path, ids)
            documents = documents_of_npy(path, "auto", None)
        else:
            ids.tofile(path)
            documents = documents_of_raw(path, "uint16", None)
        at = 0
        for number, piece in enumerate(documents):
            assert np.array_equal(piece.ids, ids[at : at + len(piece.ids)])
            at += len(piece.ids)
            if number % LOOK_EVERY == LOOK_EVERY - 1:
                peaks.append(resident_bytes(path))
        assert at == len(ids)
    assert 0 < max(peaks) < 2 * FORGOTTEN_BYTES < SIZE
