"""What cannot be read: an error, or skipped, counted and shown, and nothing else is lost by it."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
import pytest

from shardwright.train.config.data import TextData
from shardwright.train.data import prepare
from shardwright.train.data.sources.corpus import check_corpus, read_corpus
from shardwright.train.data.sources.files.errors import Unreachable
from shardwright.train.data.sources.files.skipping import merged, told
from shardwright.train.data.sources.registry import source_of
from shardwright.train.data.sources.source import Reading
from shardwright.train.errors import UserError
from tests.unit.data.conftest import MakeConfig
from tests.unit.data.kinds import in_tar, in_zip, table, zstd

NO_FIELD = "rows or tables without data.text_field"
NO_TEXT = "rows or tables with no text in data.text_field"
NOT_JSON = "rows that are not JSON"
NOT_UTF8 = "rows that are not UTF-8"
FIELDS = "rows with too many or too few fields"
ENDS = "rests of files that cannot be read"
LONG = "documents over data.max_document_bytes"
RAW = pyarrow.array([b"one", b"\xff\xfe", b"two"], pyarrow.binary()).view(pyarrow.string())
MANY = "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(20_000)).encode()


class Case(NamedTuple):
    name: str
    content: bytes
    kept: list[str]
    skipped: dict[str, list[str]]
    """For each kind the places, without the path of the file."""
    settings: Mapping[str, Any] = MappingProxyType({})


JSONL = Case(
    "a.jsonl",
    b'{"text": "one"}\n{"text": \n[1]\n{"other": "x"}\n{"text": 3}\n{"text": "\xff"}\n'
    b'{"text": "two"}\n{"text": "x", \n\n{"text": \n{"text": null}\n{"text": "\\udc80"}\n',
    ["one", "two", "\ufffd"],
    {
        NOT_JSON: [", line 2", ", line 3", ", line 8", ", line 10"],
        NO_FIELD: [", line 4"],
        NO_TEXT: [", line 5"],
        NOT_UTF8: [", line 6"],
    },
)
CASES = [
    JSONL,
    Case(
        "a.csv",
        b'id,text\n1,one\n2\n3,x,y\n4,\xff\n5,"two\nthree"\n6,four\n',
        ["one", "two\nthree", "four"],
        {FIELDS: [", line 3", ", line 4"], NOT_UTF8: [", line 5"]},
    ),
    Case(
        "b.csv",
        b'id,text\n1,one\n2,"x" and a half\n3,lost\n',
        ["one"],
        {ENDS: [", line 3 is not CSV (',' expected after '\"')"]},
    ),
    Case(
        "a.json",
        b'[{"text": "one"},\n{"text": "\xff"},\n{"text": 3},\n{"a": "x"},\n'
        b'{"text": "two"},\n{"text": },\n{"text": "lost"}]',
        ["one", "two"],
        {
            NOT_UTF8: [", line 2"],
            NO_TEXT: [", line 3"],
            NO_FIELD: [", line 4"],
            ENDS: [", line 6 is not JSON (Expecting value)"],
        },
    ),
    Case(
        "a.txt", b"kept before \xff lost", ["kept before "], {ENDS: [" is not UTF-8 (byte 0xff)"]}
    ),
    Case(
        "lines.txt",
        b"one\n\xff bad\ntwo\n" + b"x" * 700_000 + b"\xff\nthree\nover \xe2\x82",
        ["one", "two", "x" * 524_274, "three"],
        {NOT_UTF8: [", line 2", ", line 4", ", line 6"]},
        {"line_by_line": True},
    ),
    Case(
        "a.parquet",
        table("parquet", text=RAW),
        ["one", "two"],
        {NOT_UTF8: [""]},
    ),
    Case("other.parquet", table("parquet", other=["x"]), [], {NO_FIELD: [""]}),
    Case(
        "a.zip",
        in_zip({"a.jsonl": b'{"text": "one"}\n{\n', "b.json": b'[{"text": "two"}', "c.txt": b"3"}),
        ["one", "two", "3"],
        {
            NOT_JSON: [":a.jsonl, line 2"],
            ENDS: [":b.json, line 1 is not JSON (the array does not end)"],
        },
    ),
    Case(
        "a.tar",
        in_tar({"a.txt": b"one", "b.parquet": b"PAR1", "c.txt": b"lost"}),
        ["one"],
        {ENDS: [" holds b.parquet, which is not read within an archive"]},
    ),
    Case(
        "long.jsonl",
        b"".join(b'{"text": "%s"}\n' % text for text in (b"one", b"x" * 11, "é".encode() * 5)),
        ["one", "é" * 5],
        {LONG: [", document 2"]},
        {"max_document_bytes": 10},
    ),
    Case(
        "long.txt",
        b"short\n" + b"word " * 200_000 + b"\nlast",
        ["short", "last"],
        {LONG: [", document 2"]},
        {"max_document_bytes": 999_999, "line_by_line": True},
    ),
    Case("notes.md", b"# no text", [], {"files of an unknown format": [""]}),
    Case("empty.txt", b"", [], {"empty files": [""]}),
]


def section(path: str, **settings: Any) -> TextData:
    return TextData(kind="text", paths=(path,), eval_fraction=0.0, **settings)


def read(data: TextData) -> tuple[list[str], Reading]:
    documents: list[str] = []
    reading = Reading()
    for piece in read_corpus(data, Path(), reading):
        if piece.begins:
            documents.append(piece.text)
        else:
            documents[-1] += piece.text
    return documents, reading


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_bad_is_skipped_and_counted(case: Case, tmp_path: Path) -> None:
    (tmp_path / "0.txt").write_text("good")
    (tmp_path / case.name).write_bytes(case.content)
    data = section(str(tmp_path / case.name), on_bad_document="skip", **case.settings)
    documents, reading = read(data)
    assert documents == case.kept
    assert {kind: found["count"] for kind, found in reading.skipped.items()} == {
        kind: len(places) for kind, places in case.skipped.items()
    }
    for kind, found in reading.skipped.items():
        for place, expected in zip(found["places"], case.skipped[kind][:3], strict=True):
            assert place.startswith(f"{tmp_path / case.name}{expected}")
    # As in a glob, where it is one of several.
    by_glob = section(f"{tmp_path}/*", **case.settings)
    check_corpus(by_glob)
    found_by_glob, again = read(by_glob)
    assert found_by_glob == ["good", *case.kept]
    assert again.skipped == reading.skipped


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("policy", ["auto", "error"])
def test_what_is_bad_in_a_file_that_is_named_outright_is_an_error(
    policy: str, case: Case, tmp_path: Path
) -> None:
    (tmp_path / case.name).write_bytes(case.content)
    with pytest.raises(UserError, match=rf"data\.(paths|text_field=text): .*{case.name}"):
        read(section(str(tmp_path / case.name), on_bad_document=policy, **case.settings))
    if policy == "error":
        with pytest.raises(UserError, match=rf"data\.(paths|text_field=text): .*{case.name}"):
            read(section(f"{tmp_path}/*", on_bad_document=policy, **case.settings))


@pytest.mark.parametrize("kind", [".gz", ".bz2", ".xz", ".zst"])
def test_what_was_read_before_a_stream_breaks_is_kept(kind: str, tmp_path: Path) -> None:
    compress: dict[str, Callable[[bytes], bytes]] = {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zst": zstd,
    }
    whole = compress[kind](MANY) if kind != ".bz2" else compress[kind](MANY) + compress[kind](MANY)
    path = tmp_path / f"a.jsonl{kind}"
    path.write_bytes(whole[: len(whole) - 100])
    documents, reading = read(section(str(path), on_bad_document="skip"))
    assert documents == [f"row {i % 20_000}" for i in range(len(documents))]
    assert reading.skipped[ENDS]["count"] == 1
    assert reading.skipped[ENDS]["places"][0].startswith(f"{path} (")
    if kind == ".bz2":
        assert len(documents) >= 20_000, "the first of two streams is whole"


def test_a_corpus_of_nothing_good_is_refused_beforehand(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.jsonl").write_text('{"body": "x"}\n' * 1000)
    with pytest.raises(UserError, match=r"0\.jsonl, line 1 has no such column \(it has: body\)"):
        check_corpus(section(f"{tmp_path}/*"))
    (tmp_path / "3.jsonl").write_text("no JSON\n" * 50 + '{"text": "x"}\n')
    check_corpus(section(f"{tmp_path}/*"))
    check_corpus(section(f"{tmp_path}/3.jsonl", on_bad_document="skip"))
    with pytest.raises(UserError, match=r"3\.jsonl, line 1 is not JSON"):
        check_corpus(section(f"{tmp_path}/3.jsonl"))


def test_shards_count_together_what_one_reading_counts(tmp_path: Path) -> None:
    (tmp_path / JSONL.name).write_bytes(JSONL.content)
    (tmp_path / "b.jsonl").write_bytes(JSONL.content)
    (tmp_path / "c.txt").touch()
    data = section(f"{tmp_path}/*")
    _, whole = read(data)
    total = Reading()
    for path in sorted(tmp_path.iterdir()):
        part = Reading()
        for texts in source_of(section(str(path), on_bad_document="skip")).texts(tmp_path, part):
            list(texts)
        total.add(Reading(**json.loads(json.dumps(vars(part)))))
    assert total == whole
    assert total.empty_files == 1
    assert total.skipped[NOT_JSON]["count"] == 8
    lines = list(told(total.skipped))
    assert f"1 empty files skipped: {tmp_path / 'c.txt'}" in lines
    assert any(line.startswith("8 rows that are not JSON skipped: ") for line in lines)
    assert [line.endswith(", ...") for line in lines].count(True) == 1
    merged(total.skipped, {})
    assert total == whole


def test_lines_of_a_later_range_are_counted_from_the_files_beginning(tmp_path: Path) -> None:
    from shardwright.train.data.sources.files.ranges import Range
    from shardwright.train.data.sources.files.reading import read_file
    from shardwright.train.data.sources.files.skipping import Skipped, Skipping

    path = tmp_path / JSONL.name
    path.write_bytes(JSONL.content)
    skipped: Skipped = {}
    cut = JSONL.content.index(b'{"text": 3}')
    documents = []
    for within in (Range(0, cut), Range(cut, len(JSONL.content))):
        bad = Skipping(skipped)
        documents += [t.text for t in read_file(path, "text", False, within, bad=bad)]
    assert documents == JSONL.kept
    assert skipped[NO_TEXT]["places"] == [f"{path}, line 5"]
    assert skipped[NOT_JSON]["places"] == [f"{path}, line {i}" for i in (2, 3, 8)]


def test_the_name_of_cached_tokens_changes_with_what_is_used_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")

    def identity(**settings: Any) -> str:
        data = section(str(tmp_path / "a.txt"), **settings)
        return json.dumps(dict(source_of(data).identity(tmp_path)))

    plain = json.loads(identity())
    assert plain.keys() == {"sources", "text_field"}
    used: list[dict[str, Any]] = [
        {},
        {"on_bad_document": "skip"},
        {"on_bad_document": "error"},
        {"max_document_bytes": 9},
    ]
    assert len({identity(**settings) for settings in used}) == 4


def test_a_preparation_tells_what_it_has_skipped(
    corpus: Path,
    make_config: MakeConfig,
    run_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="shardwright.train")
    (corpus / JSONL.name).write_bytes(JSONL.content)
    config = make_config(data={"paths": [str(corpus)]})
    prepare(config, run_dir)
    places = ", ".join(f"{corpus / JSONL.name}, line {number}" for number in (2, 3, 8))
    line = f"4 rows that are not JSON skipped: {places}, ..."
    assert caplog.messages.count(line) == 1
    noted = json.loads((run_dir / "data.json").read_text())["skipped"]
    assert {kind: found["count"] for kind, found in noted.items()} == {
        kind: len(places) for kind, places in JSONL.skipped.items()
    }
    (tmp_path / "other").mkdir()
    again = prepare(config, tmp_path / "other")
    assert again.skipped == noted, "from the cache, too"
    assert caplog.messages.count(line) == 2


def test_errors_go_from_a_process_to_another_as_what_they_say(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(in_zip({"a.jsonl": b"no JSON"}))
    with pytest.raises(UserError) as told:
        read(section(f"{tmp_path}/a.zip"))
    for error in (told.value, Unreachable("s3://a/b", OSError("gone"), 3)):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is UserError
        assert str(again) == str(error)
