"""data.filter: a function of the user's own decides over documents, in a process of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from shardwright.train.config import RunConfig
from shardwright.train.config.data import HubData, TextData
from shardwright.train.data import prepare
from shardwright.train.data.prepare import summary
from shardwright.train.data.sources import filtering
from shardwright.train.data.sources import shards as of_corpus
from shardwright.train.data.sources.corpus import (
    check_corpus,
    corpus_identity,
    located,
    read_corpus,
    read_shard,
    shards_of,
)
from shardwright.train.data.sources.files.pieces import PIECE_BYTES
from shardwright.train.data.sources.source import Reading
from shardwright.train.errors import UserError

MakeConfig = Callable[..., RunConfig]
CODE = '''
"""A filter."""
import os
from beside import LONGEST

CONSTANT = 5

def keep(text):
    print("this is no answer")
    if "bad" in text:
        return False
    return text.upper() if "loud" in text else True

def short(text):
    return len(text) <= LONGEST

def blank(text):
    return "  " if "bad" in text else True

def fails(text):
    if "bad" in text:
        raise ValueError("no such luck")
    return True

def nothing(text):
    if "bad" in text:
        return None
    return True

def dies(text):
    if "bad" in text:
        os.abort()
    return True

def by_fields(text, fields):
    return f"{text} {sorted(fields.items())}"

def by_default(text, least=3):
    return len(text) >= least

def of_three(text, fields, more):
    return True

def dies_once(text):
    if not os.path.exists(__file__ + ".died"):
        open(__file__ + ".died", "w").close()
        os._exit(7)
    return True
'''


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    filtering.stop()


@pytest.fixture
def data(tmp_path: Path) -> Callable[..., TextData]:
    """Return a function from a function's name and texts to a corpus of them."""
    (tmp_path / "own.py").write_text(CODE)
    (tmp_path / "beside.py").write_text("LONGEST = 10\n")

    def of(name: str, *texts: str, file: str = "own.py") -> TextData:
        rows = tmp_path / "rows.jsonl"
        rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        filter_ = f"{tmp_path / file}:{name}"
        return TextData(kind="text", paths=(str(rows),), eval_fraction=0, filter=filter_)

    return of


def texts_of(data: TextData | HubData, folder: Path, reading: Reading | None = None) -> list[str]:
    whole: list[str] = []
    for piece in read_corpus(data, folder, reading):
        if piece.begins:
            whole.append("")
        whole[-1] += piece.text
    return whole


def test_documents_are_kept_dropped_or_rewritten(
    data: Callable[..., TextData], tmp_path: Path
) -> None:
    reading = Reading()
    corpus = data("keep", "one", "a bad one", "a loud one", *["two"] * 600, "bad", "three")
    assert texts_of(corpus, tmp_path, reading) == ["one", "A LOUD ONE", *["two"] * 600, "three"]
    assert reading.filtered == 2
    assert texts_of(data("short", "x" * 10, "x" * 11), tmp_path) == ["x" * 10]
    reading = Reading()
    assert texts_of(data("blank", "bad", "good"), tmp_path, reading) == ["good"]
    assert reading.filtered == 1


def test_a_long_document_is_decided_over_whole(
    data: Callable[..., TextData], tmp_path: Path
) -> None:
    long = "word " * PIECE_BYTES
    found = list(read_corpus(data("keep", long, long + "bad", "loud " + long), tmp_path))
    assert sum(piece.begins for piece in found) == 2
    assert len(found) > 4
    assert "".join(piece.text for piece in found) == long + ("loud " + long).upper()


def test_shards_are_filtered_as_the_whole_is(
    data: Callable[..., TextData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_corpus, "LEAST_BYTES", 1000)
    texts = [
        f"{'bad' if n % 3 == 0 else 'loud' if n % 3 == 1 else 'plain'} {n}" for n in range(400)
    ]
    corpus, whole, parts = data("keep", *texts), Reading(), Reading()
    divided = shards_of(corpus, tmp_path)
    assert len(divided) > 2
    pieces = [piece for s in divided for piece in read_shard(corpus, s, tmp_path, parts)]
    assert pieces == list(read_corpus(corpus, tmp_path, whole))
    assert parts.filtered == whole.filtered == 134


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails", r"ValueError: no such luck \(.*own.py, line \d+\)$"),
        ("nothing", r"it returned NoneType; return True to keep a document, False to drop it, or"),
        ("dies", r"its process was killed by SIGABRT$"),
    ],
)
def test_a_document_that_it_fails_at_is_named(
    data: Callable[..., TextData], tmp_path: Path, name: str, message: str
) -> None:
    corpus = data(name, *["good"] * 9, "  a bad document " + "x" * 99, "good")
    with pytest.raises(UserError) as raised:
        texts_of(corpus, tmp_path)
    begin = re.escape(repr("a bad document " + "x" * 45))
    where = rf"data.filter={re.escape(str(tmp_path))}/own.py:{name} failed at the document that "
    assert re.search(rf"^{where}begins with {begin}: {message}", str(raised.value))


def test_one_that_dies_by_no_documents_fault_is_said_too(
    data: Callable[..., TextData], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"with 'text 0' or one of the 59 after it: its process"):
        texts_of(data("dies_once", *(f"text {n % 30}" for n in range(60))), tmp_path)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import nothing_of_this_name", "it cannot be imported: ModuleNotFoundError: No module"),
        ("1 / 0", "it cannot be imported: ZeroDivisionError: division by zero"),
        ("keep = 5", "it cannot be imported: TypeError: keep is int, and is not called"),
        ("raise SystemExit(3)", "it cannot be imported: SystemExit: 3"),
        ("import os; os._exit(4)", "its process ended with exit code 4 while it was imported"),
    ],
)
def test_what_cannot_be_imported_is_an_error(
    data: Callable[..., TextData], tmp_path: Path, code: str, message: str
) -> None:
    (tmp_path / "wrong.py").write_text(f"{code}\n\ndef other(text): pass\n")
    corpus = data("keep", "text", file="wrong.py")
    with pytest.raises(UserError, match=f"wrong.py:keep: {message}"):
        texts_of(corpus, tmp_path)


@pytest.mark.parametrize(
    ("filter_", "message"),
    [
        (
            "own.py",
            "data.filter=own.py names no function or class; say file.py:NAME or",
        ),
        ("own.py:a b", "names no function"),
        ("own.py:keeps", r"own.py has no keeps; name a function or class of it"),
        ("none.py:keep", r"none.py is not there; give the path of a Python file"),
        ("broken.py:keep", r"broken.py, line 2: "),
        ("no.such.module:keep", r"there is no module no.such.module; install it, set PYTHONPATH"),
    ],
)
def test_what_shows_before_a_run_is_refused_before_it(
    data: Callable[..., TextData],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    filter_: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("\ndef keep(:\n")
    corpus = data("keep", "text")
    check_corpus(corpus)
    with pytest.raises(UserError, match=message):
        check_corpus(located(corpus.model_copy(update={"filter": filter_})))


def test_an_installed_module_may_have_it(data: Callable[..., TextData], tmp_path: Path) -> None:
    corpus = data("keep", "text").model_copy(update={"filter": "keyword:iskeyword"})
    (tmp_path / "rows.jsonl").write_text('{"text": "while"}\n{"text": "whale"}\n')
    check_corpus(corpus)
    assert located(corpus).filter == "keyword:iskeyword"
    assert texts_of(corpus, tmp_path) == ["while"]


def test_the_tokens_are_those_of_the_functions_file(
    data: Callable[..., TextData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = data("keep", "text")
    plain = corpus.model_copy(update={"filter": None})
    assert "filter" not in corpus_identity(plain, tmp_path)
    first = corpus_identity(corpus, tmp_path)
    assert first != corpus_identity(data("short", "text"), tmp_path)
    (tmp_path / "own.py").write_text(CODE + "\n")
    assert corpus_identity(corpus, tmp_path) != first
    monkeypatch.chdir(tmp_path)
    relative = corpus.model_copy(update={"filter": "own.py:keep"})
    assert located(relative).filter == str(tmp_path / "own.py:keep")


# --- the other fields of a row --------------------------------------------------------------------

ROWS: list[dict[str, Any]] = [
    {"text": "one", "score": 0.5, "meta": {"language": "en", "tags": ["a", "b"]}, "n": "1"},
    {"text": "two", "score": None, "meta": {"language": "de", "tags": []}, "n": "2"},
]


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    table = pyarrow.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=1)
    else:
        pyarrow.feather.write_feather(table, str(path))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_array(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.jsonl", write_lines),
        ("rows.json", write_array),
        ("rows.parquet", write_table),
        ("rows.arrow", write_table),
        ("rows.feather", write_table),
    ],
)
def test_a_function_of_two_arguments_gets_the_other_fields(
    data: Callable[..., TextData],
    tmp_path: Path,
    name: str,
    write: Callable[[Path, list[dict[str, Any]]], None],
) -> None:
    corpus = data("by_fields").model_copy(update={"paths": (str(tmp_path / name),)})
    write(tmp_path / name, ROWS)
    expected = []
    for row in ROWS:
        others = {key: value for key, value in row.items() if key != "text"}
        expected.append(f"{row['text']} {sorted(others.items())}")
    assert texts_of(corpus, tmp_path) == expected
    within = corpus.model_copy(update={"text_field": "meta.language"})
    assert texts_of(within, tmp_path) == [
        f"{row['meta']['language']} {sorted(row.items())}" for row in ROWS
    ]
    without = corpus.model_copy(update={"filter": None})
    assert texts_of(without, tmp_path) == ["one", "two"]


@pytest.mark.parametrize(("ending", "separator"), [(".csv", ","), (".tsv", "\t")])
def test_those_of_a_table_of_text_are_texts(
    data: Callable[..., TextData], tmp_path: Path, ending: str, separator: str
) -> None:
    path = tmp_path / f"rows{ending}"
    rows = [["score", "text", "n"], ["0.5", "one", "1"], ["", "two"]]
    path.write_text("".join(separator.join(row) + "\n" for row in rows))
    corpus = data("by_fields").model_copy(update={"paths": (str(path),)})
    assert texts_of(corpus, tmp_path) == [
        "one [('n', '1'), ('score', '0.5')]",
        "two [('score', '')]",
    ]


def test_a_document_in_no_row_has_none_and_a_long_one_keeps_its_own(
    data: Callable[..., TextData], tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("alone")
    corpus = data("by_fields").model_copy(update={"paths": (str(tmp_path / "a.txt"),)})
    assert texts_of(corpus, tmp_path) == ["alone []"]
    long = "word " * PIECE_BYTES
    write_lines(tmp_path / "rows.jsonl", [{"text": ["x", long, "y"], "n": 7}, {"text": "z"}])
    corpus = corpus.model_copy(update={"paths": (str(tmp_path / "rows.jsonl"),)})
    found = texts_of(corpus, tmp_path)
    assert found == ["x [('n', 7)]", f"{long} [('n', 7)]", "y [('n', 7)]", "z []"]


def test_a_data_set_has_them_too(data: Callable[..., TextData], tmp_path: Path) -> None:
    data("by_fields")
    datasets.Dataset.from_list(ROWS[:1]).save_to_disk(str(tmp_path / "saved"))
    hub = HubData(
        kind="hub",
        name=str(tmp_path / "saved"),
        eval_fraction=0,
        filter=f"{tmp_path}/own.py:by_fields",
    )
    (found,) = texts_of(hub, tmp_path)
    assert found.startswith("one [('meta', {'language': 'en', 'tags': ['a', 'b']}), ('n', '1'), ")


def test_one_with_a_default_gets_the_text_alone_and_one_of_three_nothing(
    data: Callable[..., TextData], tmp_path: Path
) -> None:
    assert texts_of(data("by_default", "no", "yes"), tmp_path) == ["yes"]
    with pytest.raises(
        UserError,
        match=r"own.py:of_three: it cannot be imported: TypeError: of_three takes 3 arguments, and "
        r"is called with a document's text, or with that and the other fields of its row",
    ):
        texts_of(data("of_three", "text"), tmp_path)


def test_a_run_says_how_many_were_dropped(
    corpus: Path, make_config: MakeConfig, run_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text("def some(text):\n    return len(text) % 3 > 0\n")
    kept = [p for p in corpus.iterdir() if len(p.read_text()) % 3]
    prepared = prepare(make_config(data={"filter": f"{tmp_path}/own.py:some"}), run_dir)
    assert prepared.filtered == 40 - len(kept) > 0
    assert prepared.training.documents + prepared.held_out.documents == len(kept)
    assert f"{prepared.filtered} documents dropped by data.filter" in list(
        summary(prepared, by_line=False)
    )
    assert json.loads((run_dir / "data.json").read_text())["filtered"] == prepared.filtered
