"""Corpora: which documents there are, in which order, and which are held out."""

from __future__ import annotations

import functools
import http.server
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from shardwright.train.config import DataConfig
from shardwright.train.data.sources.corpus import (
    Piece,
    Reading,
    check_corpus,
    corpus_identity,
    is_held_out,
    read_corpus,
    source_weights,
)
from shardwright.train.errors import UserError

BOOK = """\ufeffThe Project Gutenberg eBook of The Book

*** START OF THE PROJECT GUTENBERG EBOOK THE BOOK ***

All our knowledge
begins with experience.

But it does not
all arise out of it.

*** END OF THE PROJECT GUTENBERG EBOOK THE BOOK ***
The licence.
"""


def section(**values: object) -> DataConfig:
    return TypeAdapter(DataConfig).validate_python(values)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve tmp_path/www; yield the address and a list that grows by each path asked for."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            asked.append(self.path)

        def log_message(self, format: str, *args: object) -> None:
            pass

    (tmp_path / "www").mkdir()
    handler = functools.partial(Handler, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http_server.server_address[1]}", asked
        http_server.shutdown()


def test_stdlib_is_the_interpreters_library_without_tests_and_packages(tmp_path: Path) -> None:
    data = section(kind="stdlib")
    check_corpus(data)
    pieces = list(read_corpus(data, tmp_path))
    source = "".join(piece.text for piece in pieces)
    assert 3e6 < len(source) < 1e8
    assert "class TestCase(object):" in source
    assert "class TestAssertEqual" not in source
    assert sum(piece.begins for piece in pieces) == sum(piece.ends for piece in pieces) > 500


def test_the_order_is_fixed_and_max_documents_takes_the_first(corpus: Path) -> None:
    data = section(kind="text", paths=[f"{corpus}/*.txt"])
    few = section(kind="text", paths=[f"{corpus}/*.txt"], max_documents=3)
    texts = [piece.text for piece in read_corpus(data, corpus)]
    assert texts == [path.read_text() for path in sorted(corpus.iterdir())]
    assert [piece.text for piece in read_corpus(few, corpus)] == texts[:3]


def test_each_path_is_a_source_with_its_weight(corpus: Path) -> None:
    paths = [f"{corpus}/0*.txt", f"{corpus}/1*.txt"]
    data = section(kind="text", paths=paths, weights=[0.5, 2.0])
    assert [piece.source for piece in read_corpus(data, corpus)] == [0] * 10 + [1] * 10
    assert source_weights(data) == (0.5, 2.0)
    assert source_weights(section(kind="text", paths=paths)) == (1.0, 1.0)


def test_a_document_is_held_out_by_its_text_alone(corpus: Path) -> None:
    data = section(kind="text", paths=[f"{corpus}/*.txt"], eval_fraction=0.3)
    backwards = section(
        kind="text", paths=[f"{corpus}/{i}*.txt" for i in "3210"], eval_fraction=0.3
    )
    held_out = {piece.text for piece in read_corpus(data, corpus) if piece.held_out}
    assert held_out == {p.text for p in read_corpus(backwards, corpus) if p.held_out}
    assert 3 < len(held_out) < 25


def test_the_held_out_share_is_the_fraction() -> None:
    texts = [f"document {i}" for i in range(20_000)]
    assert sum(is_held_out(text, 0.05) for text in texts) == pytest.approx(1000, abs=120)
    assert not any(is_held_out(text, 0.0) for text in texts)


def test_all_pieces_of_a_long_document_go_the_same_way(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(f"{i} word\n" * 100_000)
    data = section(kind="text", paths=[f"{tmp_path}/*.txt"], eval_fraction=0.5)
    pieces = list(read_corpus(data, tmp_path))
    assert sum(piece.begins for piece in pieces) == sum(piece.ends for piece in pieces) == 4
    assert len(pieces) > 8
    ways = {(piece.text[0], piece.held_out) for piece in pieces}
    assert len(ways) == 4


def test_empty_documents_are_left_out(tmp_path: Path) -> None:
    rows = ["one", "", " \n ", "two"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    data = section(kind="text", paths=[f"{tmp_path}/a.jsonl"], eval_fraction=0.0)
    assert list(read_corpus(data, tmp_path)) == [
        Piece("one", begins=True, ends=True, source=0, held_out=False),
        Piece("two", begins=True, ends=True, source=0, held_out=False),
    ]


def test_reading_is_lazy(tmp_path: Path) -> None:
    good = '{"text": "x"}\n' * 100_000
    (tmp_path / "a.jsonl").write_text(good + "not JSON\n")
    pieces = read_corpus(section(kind="text", paths=[f"{tmp_path}/a.jsonl"]), tmp_path)
    assert next(pieces).text == "x"
    with pytest.raises(UserError, match="line 100001 is not JSON"):
        list(pieces)


def test_the_identity_changes_with_content_and_settings_alone(corpus: Path) -> None:
    def same(**changed: object) -> bool:
        data = section(**{"kind": "text", "paths": [f"{corpus}/*.txt"]} | changed)
        return corpus_identity(data, corpus) == before

    before = corpus_identity(section(kind="text", paths=[f"{corpus}/*.txt"]), corpus)
    assert same(sequence_length=64, cache_dir="elsewhere", weights=[2.0])
    assert not same(eval_fraction=0.02)
    assert not same(max_documents=5)
    assert not same(line_by_line=True)
    (corpus / "00.txt").write_text("changed")
    assert not same()


def test_kant_reads_the_paragraphs_of_books_downloaded_once(
    tmp_path: Path, server: tuple[str, list[str]]
) -> None:
    address, asked = server
    (tmp_path / "www" / "book.txt").write_text(BOOK)
    data = section(kind="kant", urls=[f"{address}/book.txt"])
    check_corpus(data)
    assert asked == []
    expected = ["All our knowledge begins with experience.", "But it does not all arise out of it."]
    for _ in range(2):
        assert [piece.text for piece in read_corpus(data, tmp_path / "cache")] == expected
        corpus_identity(data, tmp_path / "cache")
    assert asked == ["/book.txt"]


def test_kant_by_line_reads_the_lines_as_they_were_printed(
    tmp_path: Path, server: tuple[str, list[str]]
) -> None:
    address, _ = server
    (tmp_path / "www" / "book.txt").write_text(BOOK.replace("\n", "\r\n"))
    data = section(kind="kant", urls=[f"{address}/book.txt"], line_by_line=True)
    assert [piece.text for piece in read_corpus(data, tmp_path / "cache")] == [
        "All our knowledge",
        "begins with experience.",
        "But it does not",
        "all arise out of it.",
    ]


def test_kant_without_the_book_says_what_to_do(
    tmp_path: Path, server: tuple[str, list[str]]
) -> None:
    address, _ = server
    data = section(kind="kant", urls=[f"{address}/none.txt"])
    with pytest.raises(
        UserError,
        match=r"data\.urls: cannot download http://.*/none\.txt \(.+\).* use data=text data\.paths",
    ):
        list(read_corpus(data, tmp_path / "cache"))
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_kant_without_network_says_what_to_do(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/book.txt"
        with pytest.raises(UserError, match=r"cannot download .*refused.*Without a network"):
            list(read_corpus(section(kind="kant", urls=[url]), tmp_path))


def test_kant_refuses_what_is_no_web_address() -> None:
    with pytest.raises(UserError, match=r"data\.urls: file:///etc/passwd is not an http or https"):
        check_corpus(section(kind="kant", urls=["file:///etc/passwd"]))


@pytest.mark.parametrize("streaming", [True, False])
def test_hub_reads_a_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    name = str(tmp_path / "set")
    data = section(kind="hub", name=name, text_field="body", streaming=streaming)
    check_corpus(data)
    assert [piece.text for piece in read_corpus(data, tmp_path)] == ["one", "two"]
    before = corpus_identity(data, tmp_path)
    (tmp_path / "set" / "train.jsonl").write_text('{"body": "three"}\n')
    assert corpus_identity(data, tmp_path) != before

    other = section(kind="hub", name=name, text_field="text", streaming=streaming)
    with pytest.raises(UserError, match=r"data\.text_field=text: data\.name=.* \(it has: body\)"):
        list(read_corpus(other, tmp_path))
    missing = section(kind="hub", name=name, split="none", streaming=streaming)
    with pytest.raises(UserError, match=r"data\.name=.* split none\): cannot load it"):
        list(read_corpus(missing, tmp_path))


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"text": 3}', r"row 0 of data\.name=.* holds int there, not text; set data\.text_field"),
        ('{"text": ["a"]}', r"row 0 of data\.name=.* holds list there, not text"),
        ('{"text": ', r"cannot be read \(|cannot load it from the hub \("),
    ],
)
def test_a_data_set_without_text_is_refused(
    row: str, reason: str, streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text(f"{row}\n")
    data = section(kind="hub", name=str(tmp_path / "set"), streaming=streaming)
    with pytest.raises(UserError, match=reason):
        list(read_corpus(data, tmp_path))


def test_an_empty_file_among_many_is_passed_over_and_counted(corpus: Path) -> None:
    pattern = f"{corpus}/*.txt"
    data = section(kind="text", paths=[pattern])
    before = list(read_corpus(data, corpus))
    for i in range(3):
        (corpus / f"0{i}a.txt").write_text("\n" * i)
    check_corpus(data)
    reading = Reading()
    assert list(read_corpus(data, corpus, reading)) == before
    assert reading.empty_files == 3
    named = section(kind="text", paths=[f"{corpus}/1*.txt", f"{corpus}/00a.txt"])
    with pytest.raises(UserError, match=r"00a\.txt is empty; fill it or leave it out"):
        check_corpus(named)
    with pytest.raises(UserError, match=r"00a\.txt is empty; fill it or leave it out"):
        list(read_corpus(named, corpus))


def test_a_hub_name_that_cannot_be_reached_says_what_to_do(tmp_path: Path) -> None:
    data = section(kind="hub", name="no-such-owner-here/no-such-set-here")
    with pytest.raises(
        UserError,
        match=r"data\.name=no-such-owner.*cannot load it from the hub .*data=text data\.paths=.*"
        "HF_HOME.*HF_HUB_OFFLINE=1 and data.streaming=false",
    ):
        corpus_identity(data, tmp_path)


def test_checking_a_corpus_is_light(corpus: Path) -> None:
    code = (
        "import sys; from pydantic import TypeAdapter; "
        "from shardwright.train.config import DataConfig; "
        "from shardwright.train.data import check_corpus; "
        f"check_corpus(TypeAdapter(DataConfig).validate_python("
        f"dict(kind='text', paths=[{str(corpus / '*.txt')!r}]))); "
        "heavy = {'torch', 'numpy', 'transformers', 'datasets', 'pyarrow'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_bad_file_among_many_is_found_beforehand(
    corpus: Path, sentences: Callable[..., str]
) -> None:
    (corpus / "99.txt").write_bytes(sentences(3).encode("utf-16"))
    with pytest.raises(UserError, match=r"99\.txt is not UTF-8 at byte 0"):
        check_corpus(section(kind="text", paths=[f"{corpus}/*.txt"], on_bad_document="error"))
    check_corpus(section(kind="text", paths=[f"{corpus}/*.txt"]))
