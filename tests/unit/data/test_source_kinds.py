"""Every kind of file, and the documents and tokens that come of it, told independently of it."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
import pytest

from shardwright.train.config.data import TextData
from shardwright.train.data import prepare
from shardwright.train.data.sources.files.reading import check_files, read_file
from shardwright.train.data.sources.registry import source_of
from shardwright.train.errors import UserError
from tests.unit.data.conftest import MakeConfig
from tests.unit.data.kinds import (
    CHATS,
    COMPRESS,
    DOCUMENTS,
    KINDS,
    NESTED,
    Kind,
    in_tar,
    in_zip,
    lines_of,
    table,
)


def texts(path: Path, field: str = "text", by_line: bool = False) -> list[str]:
    """Return the documents of a file, the pieces of each joined."""
    documents: list[str] = []
    for text, begins, *_ in read_file(path, field, by_line):
        if begins:
            documents.append(text)
        else:
            documents[-1] += text
    return documents


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.name}-{kind.text_field}")
def test_a_file_of_every_kind_gives_its_documents(kind: Kind, tmp_path: Path) -> None:
    (tmp_path / kind.name).write_bytes(kind.content)
    check_files(str(tmp_path / kind.name), kind.text_field)
    found = texts(tmp_path / kind.name, kind.text_field)
    assert [text for text in found if text] == kind.expected


def test_a_directory_of_all_kinds_becomes_the_tokens_of_all(
    make_config: MakeConfig, run_dir: Path, tmp_path: Path
) -> None:
    kinds = [kind for kind in KINDS if kind.text_field == "text"]
    for number, kind in enumerate(kinds):
        (tmp_path / "corpus" / f"{number:03}").mkdir(parents=True)
        (tmp_path / "corpus" / f"{number:03}" / kind.name).write_bytes(kind.content)
    saved = tmp_path / "corpus" / "saved"
    datasets.Dataset.from_dict({"text": DOCUMENTS}).save_to_disk(saved, num_shards=2)
    prepared = prepare(
        make_config(
            data={"paths": [str(tmp_path / "corpus")], "eval_fraction": 0.0},
            tokenizer={"kind": "byte_bpe", "vocab_size": 261},
            trainer={"max_steps": 1, "global_batch_size": 2, "micro_batch_size": 1},
        ),
        run_dir,
    )
    expected = [text for kind in kinds for text in kind.expected] + DOCUMENTS
    tokens = prepared.train.sources[0].store.tokens
    written = "".join(f"{text}</s>" for text in expected)
    assert prepared.tokenizer.decode(tokens.tolist(), skip_special_tokens=False) == written
    assert len(tokens) == sum(len(text.encode()) + 1 for text in expected)
    assert np.count_nonzero(tokens == prepared.tokenizer.eos_token_id) == len(expected)


@pytest.mark.parametrize("ending", [*COMPRESS])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".tar"])
def test_what_is_cut_off_is_no_end(kind: str, ending: str, tmp_path: Path) -> None:
    rows = [{"text": f"row {i} " + np.random.default_rng(i).bytes(40).hex()} for i in range(3000)]
    content = {
        ".jsonl": lines_of(rows),
        ".json": json.dumps(rows).encode(),
        ".tar": in_tar({f"{i}.json": json.dumps(row).encode() for i, row in enumerate(rows)}),
    }[kind]
    whole = COMPRESS[ending](content)
    path = tmp_path / f"a{kind}{ending}"
    path.write_bytes(whole)
    assert texts(path) == [row["text"] for row in rows]
    # Within a row; of a .tar, where another file's header would stand.
    path.write_bytes(whole[: 1024 * (len(whole) // 2048)])
    with pytest.raises(UserError, match=rf"a{kind}{ending}(, line \d+ is not JSON | \()"):
        texts(path)


def test_an_array_is_read_in_memory_for_its_longest_object(tmp_path: Path) -> None:
    rows = [{"text": 'word "quoted" \\ ' * 1000} for _ in range(1000)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    tracemalloc.start()
    count = sum(len(piece.text) for piece in read_file(tmp_path / "a.json", "text", False))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == sum(len(row["text"]) for row in rows)
    assert peak_bytes < 4 * 2**20 < (tmp_path / "a.json").stat().st_size / 4


def test_memory_does_not_grow_with_the_files_of_an_archive(tmp_path: Path) -> None:
    peaks = []
    for count in (200, 3000):
        (tmp_path / "a.tar").write_bytes(in_tar({f"{i}.txt": b"text" for i in range(count)}))
        tracemalloc.start()
        assert sum(1 for _ in read_file(tmp_path / "a.tar", "text", False)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 2**18


def test_an_object_of_many_chunks_is_tried_a_few_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []
    decode = json.JSONDecoder.raw_decode

    def counted(self: json.JSONDecoder, text: str, at: int = 0) -> tuple[Any, int]:
        tried.append(len(text))
        return decode(self, text, at)

    monkeypatch.setattr(json.JSONDecoder, "raw_decode", counted)
    long = 'line "of" a row\n' * 500_000
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a"}, {"text": long}, {"text": "b"}]))
    assert texts(tmp_path / "a.json") == ["a", long, "b"]
    assert len(tried) < 12
    assert sum(tried) < 6 * len(long)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('[{"text": "x"},\n {"text": }]', r"line 2 is not JSON \(Expecting value"),
        ('[{"text": "x"}\n {"text": "y"}]', r"line 2 is not JSON \(a comma or the array's end"),
        ('[{"text": "x"},\n', r"line 2 is not JSON \(Expecting value"),
        ('[{"text": "x"}\n\n', r"line 3 is not JSON \(the array does not end"),
        ('[{"text": "x"}]\n{}', r"line 2 is not JSON \(there is more behind the array's end"),
        ('[{"text": "x"},\n 12]', "line 2 is not a JSON object; write each row as"),
        ('[{"text": "x"},\n {"text": "y\n"}]', r"line 2 is not JSON \(Invalid control character"),
        ('"text"', "line 1 is not a JSON object"),
        ('{"data": [{"text": "x"}]}', "line 1 has no such column .it has: data"),
        ("[" * 100_000, "line 1 is nested too deeply"),
        ('[{"text": "x", "n": ' + "1" * 5_000 + "}]", "line 1 is not JSON .Exceeds the limit"),
    ],
)
def test_a_broken_array_is_named_by_its_line(content: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=reason):
        texts(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        ("other", r"has no such column \(it has: messages, number\)"),
        ("messages.0.text", r"has no such column \(it has: content, role\)"),
        ("messages.text", r"has no such column \(it has: content, role\)"),
        ("messages", "not text"),
        ("number", r"holds int(64)? there, not text"),
        ("number.inner", r"holds int(64)? there, not text"),
        ("messages.0", "not text"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
def test_a_path_that_leads_to_no_text_is_refused(
    kind: str, field: str, reason: str, tmp_path: Path
) -> None:
    chats = [chat for chat in CHATS if chat]
    rows = [{"messages": chat, "number": 1} for chat in chats]
    content = lines_of(rows) if kind == "jsonl" else table(kind, messages=chats, number=[1, 1])
    (tmp_path / f"a.{kind}").write_bytes(content)
    with pytest.raises(UserError, match=rf"data\.text_field={field}: .*a\.{kind}.* {reason}"):
        texts(tmp_path / f"a.{kind}", field)


def test_only_the_column_with_the_text_is_read(tmp_path: Path) -> None:
    from shardwright.train.data.sources.files.tables import Place, _columns

    pyarrow.parquet.write_table(
        pyarrow.table({"messages": CHATS, "row": NESTED, "text": DOCUMENTS}), tmp_path / "a.parquet"
    )
    schema = pyarrow.parquet.ParquetFile(tmp_path / "a.parquet").schema
    paths = [schema.column(i).path for i in range(len(schema))]
    assert _columns(Place("messages", rest=("0", "content")), paths) == [
        "messages.list.element.content"
    ]
    assert _columns(Place("row", ("body", "text")), paths) == ["row.body.text"]
    assert _columns(Place("text"), paths) == ["text"]


@pytest.mark.parametrize("pack", [in_zip, in_tar])
def test_a_table_in_an_archive_is_not_passed_over(
    pack: Callable[[Mapping[str, bytes]], bytes], tmp_path: Path
) -> None:
    path = tmp_path / ("a.zip" if pack is in_zip else "a.tar")
    path.write_bytes(pack({"a.txt": b"text", "b.parquet": table("parquet", text=["x"])}))
    with pytest.raises(UserError, match=r"holds b\.parquet, which is not read within an archive"):
        texts(path)


def test_an_archive_without_a_text_is_empty(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(in_zip({"a.md": b"text", "b.txt": b""}))
    (tmp_path / "b.tar").write_bytes(in_tar({"a.md": b"text"}))
    (tmp_path / "c.tar").touch()
    nothing = "holds nothing to train on"
    for name, what in {"a.zip": nothing, "b.tar": nothing, "c.tar": "is empty"}.items():
        with pytest.raises(UserError, match=rf"{name} {what}; fill it or leave it out"):
            check_files(str(tmp_path / name), "text")


def test_broken_archives_are_named(tmp_path: Path) -> None:
    content = in_zip({"a.txt": b"some text " * 1000})
    (tmp_path / "a.zip").write_bytes(content[:-30])
    (tmp_path / "b.zip").write_bytes(content.replace(content[60:64], b"\0\0\0\0"))
    (tmp_path / "c.tar").write_bytes(b"no archive" * 100)
    for name in ("a.zip", "b.zip", "c.tar"):
        with pytest.raises(UserError, match=rf"cannot read .*{name}.* \(.+\); make it readable"):
            texts(tmp_path / name)


def test_the_same_bytes_under_another_format_are_another_corpus(tmp_path: Path) -> None:
    found = []
    for name in ("a.txt.zst", "a.csv.zst", "a.tsv.xz", "a.tsv.bz2"):
        (tmp_path / name).write_bytes(b"the same")
        data = TextData(kind="text", paths=(str(tmp_path / name),))
        found.append(repr(source_of(data).identity(tmp_path)))
    assert len(set(found)) == 4
