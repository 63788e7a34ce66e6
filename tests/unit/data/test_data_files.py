"""Local files: what is read of each format, and the message for each way of being unreadable."""

from __future__ import annotations

import glob
import gzip
import json
import os
import tarfile
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import pyarrow
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
import pytest

from shardwright.train.config.data import HubData
from shardwright.train.data.sources import hub
from shardwright.train.data.sources.files.paths import check_overlap, expand
from shardwright.train.data.sources.files.pieces import PIECE_BYTES
from shardwright.train.data.sources.files.reading import (
    HASHED_BYTES,
    check_file,
    check_files,
    identity,
    read_file,
)
from shardwright.train.errors import UserError


def texts(path: Path, field: str = "text", by_line: bool = False) -> list[str]:
    """Return the documents of a file, the pieces of each joined."""
    documents: list[str] = []
    for text, begins, *_ in read_file(path, field, by_line):
        if begins:
            documents.append(text)
        else:
            documents[-1] += text
    return documents


@contextmanager
def as_ordinary_user() -> Iterator[None]:
    """Give up root's right to read everything for a while."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_txt_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffzwölf\r\nBoxkämpfer\n".encode())
    assert texts(tmp_path / "a.txt") == ["zwölf\nBoxkämpfer\n"]


def test_each_line_of_a_txt_file_is_a_document_by_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    assert texts(tmp_path / "a.txt", by_line=True) == ["one", "", "two"]


def test_each_row_of_a_jsonl_file_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"body": "one\\ntwo"}\n\n{"body": null}\n{"body": "\\ud83d"}'
    )
    assert texts(tmp_path / "a.jsonl", "body") == ["one\ntwo", "\ufffd"]


def test_each_row_of_a_csv_file_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,text\n1,"one\ntwo, ""quoted"""\n2,three\n')
    assert texts(tmp_path / "a.csv") == ['one\ntwo, "quoted"', "three"]


def test_each_row_of_a_parquet_file_is_a_document(tmp_path: Path) -> None:
    table = pyarrow.table({"id": [1, 2, 3], "text": ["one", None, "two"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt.gz", "one"), ("a.jsonl.gz", '{"text": "one"}'), ("a.csv.gz", "text\none\n")],
)
def test_text_files_may_be_compressed(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(content.encode()))
    check_file(tmp_path / name, "text")
    assert texts(tmp_path / name) == ["one"]


def test_a_long_document_comes_in_pieces_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    lines = 200_000
    path.write_text(
        "".join(f"line {i} of a text that is longer than memory\n" for i in range(lines))
    )
    tracemalloc.start()
    pieces = count = 0
    for text, begins, ends, _ in read_file(path, "text", by_line=False):
        assert begins == (pieces == 0)
        assert ends or text.endswith("\n")
        pieces += 1
        count += text.count("\n")
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == lines
    assert pieces > 20
    assert peak_bytes < 4 * 2**20 < path.stat().st_size / 2


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_a_long_row_comes_in_pieces_too(tmp_path: Path, name: str) -> None:
    text = "".join(f"line {i} of a row\n" for i in range(60_000))
    rows = ["before", text, "after"]
    if name == "a.jsonl":
        (tmp_path / name).write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    elif name == "a.csv":
        (tmp_path / name).write_text("text\n" + "".join(f'"{row}"\n' for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": rows}), tmp_path / name)
    found = list(read_file(tmp_path / name, "text", by_line=False))
    assert texts(tmp_path / name) == rows
    assert len(found) > 5
    assert max(len(piece.text) for piece in found) < 2 * PIECE_BYTES
    assert all(piece.text.endswith("\n") for piece in found[1:-1])


@pytest.mark.parametrize("name", ["a.parquet", "a.feather"])
def test_long_rows_of_a_table_become_texts_one_at_a_time(tmp_path: Path, name: str) -> None:
    row = "line of a row\n" * 150_000
    # Short ones around them, so that their average is that of rows which are read many at once.
    table = pyarrow.table({"text": ["short"] * 200 + [row] * 8 + ["short"] * 200})
    if name == "a.parquet":
        pyarrow.parquet.write_table(table, tmp_path / name)
    else:
        pyarrow.feather.write_feather(table, tmp_path / name)
    tracemalloc.start()
    count = sum(len(piece.text) for piece in read_file(tmp_path / name, "text", by_line=False))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 400 * len("short") + 8 * len(row)
    assert peak_bytes < 4 * len(row), "of texts: what Arrow holds is not counted"


def test_a_long_line_comes_in_pieces_too(tmp_path: Path) -> None:
    long = "word " * 300_000
    (tmp_path / "a.txt").write_text(f"before\n{long}\n\nafter\n{long}")
    found = list(read_file(tmp_path / "a.txt", "text", by_line=True))
    assert texts(tmp_path / "a.txt", by_line=True) == ["before", long, "", "after", long]
    assert max(len(piece.text) for piece in found) < 2 * PIECE_BYTES


def test_a_document_without_lines_is_cut_before_a_space(tmp_path: Path) -> None:
    text = "word " * 200_000
    (tmp_path / "a.txt").write_text(text)
    pieces = [piece.text for piece in read_file(tmp_path / "a.txt", "text", by_line=False)]
    assert "".join(pieces) == text
    assert all(piece.startswith(" word") for piece in pieces[1:])


def test_globs_descend_and_sort(tmp_path: Path) -> None:
    (tmp_path / "b" / "c").mkdir(parents=True)
    for name in ("b/c/2.txt", "b/1.txt", "[x].txt"):
        (tmp_path / name).write_text("text")
    assert expand(f"{tmp_path}/b/**/*.txt") == [tmp_path / "b/1.txt", tmp_path / "b/c/2.txt"]
    assert expand(f"{tmp_path}/[x].txt") == [tmp_path / "[x].txt"]


def test_a_copy_of_a_file_is_the_same_and_an_edited_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    for path in (tmp_path / "a.txt", tmp_path / "copy" / "b.txt"):
        path.write_text("text")
    before = identity(tmp_path / "a.txt")
    assert identity(tmp_path / "copy" / "b.txt") == before
    (tmp_path / "a.txt").write_text("tExt")
    assert identity(tmp_path / "a.txt") != before


def test_a_glob_without_match_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.paths: no file matches .*\*\.txt .* correct the p"):
        expand(f"{tmp_path}/*.txt")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"data\.paths: .*a\.txt does not exist .* correct the path"
    ):
        check_file(tmp_path / "a.txt", "text")


@pytest.mark.parametrize("name", ["corpus", "d.txt"])
@pytest.mark.parametrize(
    ("inside", "example"), [("a.arrow", "arrow"), ("deep/er/b.jsonl", "jsonl"), (None, "txt")]
)
def test_a_directory_is_refused(
    inside: str | None, example: str, name: str, tmp_path: Path
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    if inside:
        (folder / inside).parent.mkdir(parents=True, exist_ok=True)
        (folder / inside).touch()
    expected = f"data.paths: {folder} is a directory; name its files, for example {folder}/**/*."
    for look in (lambda: check_file(folder, "text"), lambda: identity(folder)):
        with pytest.raises(UserError) as told:
            look()
        assert str(told.value) == expected + example


def test_feather_in_its_first_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.feather").write_bytes(b"FEA1" + bytes(100) + b"FEA1")
    with pytest.raises(UserError, match=r"a\.feather is Feather in its version 1, .* version 2"):
        check_file(tmp_path / "a.feather", "text")


def test_a_directory_stands_for_its_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a directory with no file that ends in one of .txt, .j"):
        check_files(str(tmp_path), "text")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.jsonl").write_text('{"text": "b"}')
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a link.txt").symlink_to("a.txt")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "README.md").write_text("no text to train on")
    check_files(str(tmp_path), "text")
    found = [path.name for path in expand(str(tmp_path))]
    assert found == ["a link.txt", "b.jsonl", "empty.txt"]


def test_what_save_to_disk_wrote_is_read(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_dict({"text": ["a", "b"]})
    saved.save_to_disk(tmp_path / "one")
    (tmp_path / "one" / "cache-1.arrow").write_bytes(b"what a map has left")
    (file,) = expand(str(tmp_path / "one"))
    assert [row.text for row in read_file(file, "text", by_line=False)] == ["a", "b"]
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "two")
    with pytest.raises(UserError, match=r"two holds splits .* data=hub data.name=.*two data.split"):
        expand(str(tmp_path / "two"))
    for name in ("one", "two"):
        data = HubData(kind="hub", name=str(tmp_path / name))
        assert [row.text for row in hub.rows(data)] == ["a", "b"]
        assert hub.identity(data)
    other = HubData(kind="hub", name=str(tmp_path / "two"), split="dev")
    with pytest.raises(UserError, match=r"data.split=dev: .* no such split \(it has: train, test"):
        list(hub.rows(other))


@pytest.mark.parametrize("name", ["a.pdf", "a"])
def test_a_file_that_is_not_there_is_not_asked_for_its_ending(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"/{name} does not exist \(looked in"):
        check_file(tmp_path / name, "text")


@pytest.mark.parametrize("name", ["a.pdf", "a", "a.parquet.gz"])
def test_an_unknown_ending_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("text")
    with pytest.raises(
        UserError, match=r"does not end in one of \.txt, \.jsonl, .* convert or ren"
    ):
        check_file(tmp_path / name, "text")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b""),
        ("a.txt", b" \n\n"),
        ("a.jsonl", b""),
        ("a.csv", b""),
        ("a.csv", b"\n\n"),
        ("a.csv", b"text\n"),
        ("a.parquet", b""),
        ("a.txt.gz", gzip.compress(b"", mtime=0)),
    ],
)
def test_an_empty_file_that_is_named_outright_is_refused(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    what = "holds nothing to train on" if content else "is empty"
    with pytest.raises(UserError, match=rf"data\.paths: .*{name} {what}; fill it or leave it out"):
        check_files(str(tmp_path / name), "text")
    with pytest.raises(
        UserError, match=r"data\.paths: .*\* matches 1 files, and all of them are empty; fill them"
    ):
        check_files(f"{tmp_path}/a*", "text")
    suffix = "".join((tmp_path / name).suffixes)
    full = {
        ".txt": b"one",
        ".jsonl": b'{"text": "one"}',
        ".csv": b"text\none\n",
        ".txt.gz": gzip.compress(b"one"),
    }
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": ["one"]}), tmp_path / "b.parquet")
    else:
        (tmp_path / f"b{suffix}").write_bytes(full[suffix])
    check_files(f"{tmp_path}/*", "text")
    assert [t.strip() for t in texts(tmp_path / name)] in ([], [""])


def test_an_undecodable_byte_in_the_first_mebibyte_is_found_beforehand(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * 700_000 + b"\xff" + b"x" * 700_000)
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8 at byte 700000 \(0xff\); convert it"):
        check_file(tmp_path / "a.txt", "text")


@pytest.mark.parametrize("position", [262_143, 262_144, 3_000_001])
def test_an_undecodable_byte_is_named_wherever_it_is(tmp_path: Path, position: int) -> None:
    good = ("é" * (position // 2) + "x").encode()[:position]
    good = good if good.decode(errors="ignore").encode() == good else good[:-1] + b"x"
    (tmp_path / "a.txt").write_bytes(good + b"\xc3(" + b"x" * 10)
    with pytest.raises(UserError, match=rf"a\.txt is not UTF-8 at byte {position} \(0xc3\)"):
        texts(tmp_path / "a.txt")


def test_a_character_cut_at_the_end_of_a_file_is_undecodable(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("né".encode()[:-1])
    with pytest.raises(UserError, match="is not UTF-8 at byte 1"):
        check_file(tmp_path / "a.txt", "text")


def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.txt").chmod(0)
    with (
        as_ordinary_user(),
        pytest.raises(UserError, match=r"cannot read .*a\.txt \(Permission denied\); make it read"),
    ):
        check_file(tmp_path / "a.txt", "text")


def test_a_cut_gzip_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(os.urandom(1000).hex().encode())[:-20])
    with pytest.raises(UserError, match=r"cannot read .*a\.txt\.gz \(Compressed file ended before"):
        check_file(tmp_path / "a.txt.gz", "text")


def test_a_broken_parquet_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no parquet")
    with pytest.raises(UserError, match=r"cannot read .*a\.parquet \(.+\); make it readable"):
        check_file(tmp_path / "a.parquet", "text")


def test_a_missing_column_is_refused_with_the_columns_there_are(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"title": "x", "body": "y"}))
    (tmp_path / "a.csv").write_text("title,body\nx,y\n")
    table = pyarrow.table({"title": ["x"], "body": ["y"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        with pytest.raises(
            UserError,
            match=rf"data\.text_field=text: .*{name}.* no such column \(it has: body, title\); set",
        ):
            check_file(tmp_path / name, "text")


def test_a_column_that_holds_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": [1, 2]}')
    pyarrow.parquet.write_table(pyarrow.table({"text": [1]}), tmp_path / "a.parquet")
    with pytest.raises(
        UserError, match=r"a\.jsonl, line 1 holds list there, not text; set data\.t"
    ):
        check_file(tmp_path / "a.jsonl", "text")
    with pytest.raises(UserError, match=r"a\.parquet holds int64 there, not text"):
        check_file(tmp_path / "a.parquet", "text")


def test_a_broken_row_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": \n')
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n"text"\n')
    (tmp_path / "a.csv").write_text("id,text\n1,x\n2\n")
    with pytest.raises(UserError, match=r"a\.jsonl, line 2 is not JSON"):
        texts(tmp_path / "a.jsonl")
    with pytest.raises(
        UserError, match=r"b\.jsonl, line 2 is not a JSON object; write each row as"
    ):
        texts(tmp_path / "b.jsonl")
    with pytest.raises(UserError, match=r"a\.csv, line 3 has 1 fields and no text"):
        texts(tmp_path / "a.csv")


# --- what loses text, or takes something else for it ----------------------------------------------


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (['1,"one'] + [f"{i},more" for i in range(900)], "line 2 opens a quote that is never clo"),
        (["1,one, and two"], "line 2 has 3 fields, and the header names 2; put quotes around"),
        (["1,one", "2", "3,three"], "line 3 has 1 fields and no text"),
        (["1,one", '2,"two" and a half'], "line 3 is not CSV"),
    ],
)
def test_a_csv_row_that_would_lose_text_is_refused(
    rows: list[str], reason: str, tmp_path: Path
) -> None:
    (tmp_path / "a.csv").write_text("\n".join(["id,text", *rows]) + "\n")
    with pytest.raises(UserError, match=reason):
        texts(tmp_path / "a.csv")


def test_a_quote_is_closed_on_a_later_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,id\n"one\n\n""two""",1\nx,2\n')
    assert texts(tmp_path / "a.csv") == ['one\n\n"two"', "x"]


@pytest.mark.parametrize("escape", ["\\ud83d", "\\uD83D", "\\uDE00 x"])
def test_half_a_surrogate_pair_becomes_a_replacement_character(escape: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "{escape}"}}\n{{"text": "\\uD83D\\uDE00"}}\n')
    half, whole = texts(tmp_path / "a.jsonl")
    assert half == "\ufffd" + escape[6:]
    assert whole == "\U0001f600"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 1 is nested too deeply"),
        ('{"text": "x", "n": ' + "1" * 5_000 + "}", "line 1 is not JSON .Exceeds the limit"),
    ],
)
def test_json_that_python_does_not_take_is_refused(line: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(UserError, match=reason):
        texts(tmp_path / "a.jsonl")


def test_a_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,text\na,b\n")
    columns = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    table = pyarrow.Table.from_arrays(columns, names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        with pytest.raises(UserError, match=rf"{name} has two columns of that name; rename one"):
            check_file(tmp_path / name, "text")


def test_text_in_a_table_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    raw = pyarrow.array([b"good", b"\xff\xfe"], pyarrow.binary())
    table = pyarrow.table({"text": raw.view(pyarrow.string())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet holds text in text that is not UTF-8 .0xff"):
        texts(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["a.parquet", "a.feather", "a.arrow"])
def test_every_kind_of_text_column_of_every_table_is_read(
    name: str, kind: pyarrow.DataType, tmp_path: Path
) -> None:
    values = pyarrow.array(["one", None, "two", "one"]).cast(kind)
    table = pyarrow.table({"id": [1, 2, 3, 4], "text": values})
    path = tmp_path / name
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(table, path)
    elif name.endswith("feather"):
        pyarrow.feather.write_feather(table, path, compression="lz4")
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    check_file(path, "text")
    assert texts(path) == ["one", "two", "one"]


def test_a_data_set_saved_to_disk_is_read(tmp_path: Path) -> None:
    rows = [f"row {i}" for i in range(1000)]
    datasets.Dataset.from_dict({"text": rows}).save_to_disk(tmp_path, num_shards=2)
    paths = expand(f"{tmp_path}/*.arrow")
    assert [text for path in paths for text in texts(Path(str(path)))] == rows


def test_a_loop_of_links_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.txt").write_text("text")
    for name in ("up", "again"):
        (tmp_path / "a" / name).symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "a/2.txt").symlink_to(tmp_path / "a/1.txt")
    assert expand(f"{tmp_path}/**/*.txt") == [tmp_path / "a/1.txt"]
    assert expand(f"{tmp_path}/b/*.txt") == [tmp_path / "b/1.txt"]


def test_two_stars_match_as_they_do_for_glob(tmp_path: Path) -> None:
    for name in ("1.txt", "a/2.txt", "a/b/3.txt", ".h/4.txt", "a/[x]/5.txt", "a/b/c/d/6.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    for pattern in ("**/*.txt", "**", "a/**/*.txt", "**/b/**/*.txt", "*/**/[0-9].txt", "**/c/**"):
        found = glob.glob(f"{tmp_path}/{pattern}", recursive=True)
        expected = sorted(Path(p) for p in found if os.path.isfile(p))
        assert expand(f"{tmp_path}/{pattern}") == expected, pattern


def test_a_file_that_two_paths_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"a\.txt is named by .*a\.txt and by .*\*\.txt, and would"):
        check_overlap([f"{tmp_path}/a.txt", f"{tmp_path}/*.txt"])


def test_a_large_file_that_was_changed_under_its_old_time_is_another(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x" * (HASHED_BYTES + 1))
    stat, before = path.stat(), identity(path)
    assert identity(path) == before
    path.write_text("y" * (HASHED_BYTES + 1))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert identity(path) != before


def test_utf16_without_a_mark_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("plain text".encode("utf-16-le"))
    with pytest.raises(UserError, match=r"a\.txt is UTF-16 or UTF-32 without a mark"):
        check_file(tmp_path / "a.txt", "text")


def test_an_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "inside.txt").write_text("text " * 100)
    with tarfile.open(tmp_path / "a.txt.gz", "w:gz") as archive:
        archive.add(tmp_path / "inside.txt", "inside.txt")
    with pytest.raises(UserError, match=r"a\.txt\.gz is a tar archive, not a text; unpack it"):
        check_file(tmp_path / "a.txt.gz", "text")
