"""A corpus in shards: read independently, their texts end to end are those of the whole."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from shardwright.train.config.data import StdlibData, TextData
from shardwright.train.data.sources import shards
from shardwright.train.data.sources.corpus import Piece, read_corpus, read_shard, shards_of
from shardwright.train.data.sources.files import decoding, pieces, ranges
from shardwright.train.data.sources.files.ranges import Range
from shardwright.train.data.sources.files.reading import read_file
from shardwright.train.data.sources.shards import Shard, Span, joined, size_wanted
from shardwright.train.data.sources.source import Reading
from shardwright.train.errors import UserError

ALPHABET = ("a", "b ", " ", "é", "漢", "😀", "\n", "\n", "\r\n", "\r", "\r", "\n\n", "\u2028")


def divide(monkeypatch: pytest.MonkeyPatch, most_bytes: int) -> None:
    monkeypatch.setattr(shards, "LEAST_BYTES", most_bytes)
    monkeypatch.setattr(shards, "MOST_BYTES", most_bytes)


def small_chunks(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    for module in (pieces, decoding, ranges):
        monkeypatch.setattr(module, "PIECE_BYTES", size)


def text_data(*paths: Path | str, **settings: Any) -> TextData:
    return TextData(kind="text", paths=tuple(map(str, paths)), **settings)


def in_shards(data: Any, folder: Path) -> tuple[list[list[Piece]], Reading]:
    """Return the pieces of each shard, and what was met while they were read."""
    total = Reading()
    found = []
    for shard in shards_of(data, folder):
        reading = Reading()
        found.append(list(read_shard(data, shard, folder, reading)))
        total.add(reading)
    return found, total


def assert_same(data: Any, folder: Path) -> list[list[Piece]]:
    reading = Reading()
    whole = list(read_corpus(data, folder, reading))
    found, total = in_shards(data, folder)
    assert [piece for pieces in found for piece in pieces] == whole
    assert total == reading
    return found


@pytest.mark.parametrize("seed", range(40))
def test_a_line_is_read_in_the_range_in_which_it_begins(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever lies at the bounds: half a character, half a line end, a line longer than a range,
    one so long that it is cut into pieces, no line end at the end of all."""
    draw = random.Random(seed)
    small_chunks(monkeypatch, draw.choice([4, 7, 16, 64]))
    text = "".join(draw.choices(ALPHABET, k=draw.randrange(1, 200)))
    long_line = "word " * draw.randrange(60) + "漢" * draw.randrange(100)
    text = text + long_line + draw.choice(["\r", "\r\n", "\n", ""]) + text[: draw.randrange(90)]
    path = tmp_path / "some.txt"
    path.write_bytes(("\ufeff" * draw.randrange(2) + text + "x").encode())
    whole = list(read_file(path, "text", by_line=True))
    size = path.stat().st_size
    for _ in range(10):
        cuts = sorted({0, size, *(draw.randrange(size) for _ in range(draw.randrange(8)))})
        found = [
            piece
            for begin, end in itertools.pairwise(cuts)
            for piece in read_file(path, "text", True, Range(begin, end))
        ]
        assert found == whole, cuts


def test_every_bound_of_a_file_divides_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch, 4)
    path = tmp_path / "some.txt"
    path.write_bytes("é\r\n\r\r\nab\n\n漢字漢字漢字 x\r😀\r\n\n".encode() + b"end\r")
    whole = list(read_file(path, "text", by_line=True))
    size = path.stat().st_size
    for bound in range(1, size):
        parts = (Range(0, bound), Range(bound, size))
        found = [p for within in parts for p in read_file(path, "text", True, within)]
        assert found == whole, bound


@pytest.mark.parametrize("most_bytes", [40, 300, 5000])
def test_shards_end_to_end_are_the_corpus(
    most_bytes: int, tmp_path: Path, sentences: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    divide(monkeypatch, most_bytes)
    rows = [sentences(i % 4, seed=i) for i in range(50)]
    lines = [json.dumps({"text": row or None}) for row in rows]
    (tmp_path / "rows.jsonl").write_bytes("\r\n".join([*lines[:20], "", *lines[20:]]).encode())
    table = pyarrow.table({"text": rows, "other": ["x" * 30] * 50})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=7)
    for i in range(9):
        (tmp_path / f"{i}.txt").write_text(sentences(i, seed=i) + "\n\n" + sentences(1))
    (tmp_path / "rows.csv").write_text("text\n" + "\n".join(f'"{row}"' for row in rows))
    paths = [
        tmp_path / "rows.jsonl",
        tmp_path / "*.txt",
        tmp_path / "*.parquet",
        tmp_path / "*.csv",
    ]
    for by_line in (False, True):
        data = text_data(*paths, line_by_line=by_line, eval_fraction=0.2)
        found = assert_same(data, tmp_path)
        assert len(found) >= {40: 30, 300: 10, 5000: 2}[most_bytes]
    assert {piece.source for part in found for piece in part} == {0, 1, 2, 3}
    assert {piece.held_out for part in found for piece in part} == {False, True}


def test_shards_depend_on_the_corpus_alone(tmp_path: Path) -> None:
    assert size_wanted(10) == shards.LEAST_BYTES
    assert size_wanted(100 * 2**30) == 100 * 2**20
    assert size_wanted(2**50) == shards.MOST_BYTES
    spans = [Span(0, "a", 3), Span(0, "b", 3), Span(1, "c", 9), Span(1, "d", 9, Range(0, 9))]
    together = [[span.path for span in shard.spans] for shard in joined(spans, 8)]
    assert together == [["a", "b"], ["c"], ["d"]]
    assert joined([], 8) == []
    assert str(Shard((spans[3],))) == "d, bytes 0 to 9"
    assert str(Shard(tuple(spans[:3]))) == "a and 2 more"
    assert str(Shard((Span(0, "t.parquet", 1, Range(2, 4)),))) == "t.parquet, row groups 2 to 4"


def test_the_first_documents_of_all_are_not_counted_in_shards(corpus: Path) -> None:
    assert shards_of(text_data(corpus), corpus)
    assert not shards_of(text_data(corpus, max_documents=3), corpus)


def test_the_standard_library_is_read_in_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.py").write_text(f"{name} = 1\n")
    monkeypatch.setattr(
        "shardwright.train.data.sources.stdlib.sysconfig.get_path", lambda _: str(tmp_path)
    )
    divide(monkeypatch, 10)
    assert len(assert_same(StdlibData(kind="stdlib"), tmp_path)) == 3


def test_a_blank_file_in_ranges_counts_as_one_empty_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    divide(monkeypatch, 10)
    (tmp_path / "blank.txt").write_text("\n" * 50)
    (tmp_path / "late.txt").write_text("\n" * 50 + "text")
    assert_same(text_data(tmp_path / "*.txt", line_by_line=True), tmp_path)
    _, reading = in_shards(text_data(tmp_path / "*.txt", line_by_line=True), tmp_path)
    assert reading.empty_files == 1
    with pytest.raises(UserError, match=r"blank\.txt holds nothing to train on"):
        in_shards(text_data(tmp_path / "blank.txt", line_by_line=True), tmp_path)


def test_an_error_in_a_range_names_the_place_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line and the byte as they are counted in all of it."""
    divide(monkeypatch, 50)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "good"}\r\n' * 20 + b"\r\n\rbad\n" + b'{"text": "good"}\n' * 20)
    with pytest.raises(UserError, match=r"rows\.jsonl, line 23 is not JSON"):
        in_shards(text_data(path), tmp_path)
    path.write_bytes(b'{"text": "good"}\n' * 20 + b'{"text": "\xff"}\n')
    with pytest.raises(UserError, match="is not UTF-8 at byte 350"):
        in_shards(text_data(path), tmp_path)
