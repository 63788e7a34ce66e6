"""Files of remote filesystems: listed, streamed, and read on where a connection broke."""

from __future__ import annotations

import http.server
import io
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from shardwright.train.config.data import TextData
from shardwright.train.data import prepare
from shardwright.train.data.sources.corpus import check_corpus, read_corpus, read_shard, shards_of
from shardwright.train.data.sources.files import remote
from shardwright.train.data.sources.files.paths import check_overlap, expand, is_glob
from shardwright.train.data.sources.registry import source_of
from shardwright.train.data.sources.source import Reading
from shardwright.train.errors import UserError
from tests.unit.data.conftest import MakeConfig
from tests.unit.data.kinds import DOCUMENTS, KINDS, ROWS, in_zip, lines_of, table

LONG = lines_of({"text": f"row {i} " + "word " * 50} for i in range(20_000))


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAIT_SECONDS", 0.0)
    remote._is_directory.cache_clear()


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    system = MemoryFileSystem()
    system.store.clear()
    yield system
    system.store.clear()


def section(*paths: str, **settings: Any) -> TextData:
    return TextData(kind="text", paths=paths, eval_fraction=0.0, **settings)


def texts(data: TextData, reading: Reading | None = None) -> list[str]:
    documents: list[str] = []
    for piece in read_corpus(data, Path(), reading):
        if piece.begins:
            documents.append(piece.text)
        else:
            documents[-1] += piece.text
    return documents


# --- filesystems that fsspec knows ----------------------------------------------------------------


def test_every_kind_is_read_from_a_filesystem_of_fsspec(memory: MemoryFileSystem) -> None:
    for number, kind in enumerate(KINDS):
        url = f"memory://corpus/{number}/{kind.name}"
        memory.pipe_file(url, kind.content)
        data = section(url, text_field=kind.text_field)
        check_corpus(data)
        assert texts(data) == kind.expected, kind.name


def test_globs_and_directories_are_listed(memory: MemoryFileSystem) -> None:
    for name in ("b/2.txt", "a/1.txt", "a/deep/3.jsonl", "a/notes.md", "a/.hidden.txt"):
        memory.pipe_file(f"memory://corpus/{name}", b'{"text": "three"}' if "3" in name else b"x")
    memory.pipe_file("memory://corpus/s/state.json", b"{}")
    memory.pipe_file("memory://corpus/s/data.arrow", table("arrow", text=["four"]))

    def names(pattern: str) -> list[str]:
        return [str(file).removeprefix("memory:///corpus/") for file in expand(pattern)]

    assert names("memory://corpus/**/*.txt") == ["a/.hidden.txt", "a/1.txt", "b/2.txt"]
    assert names("memory://corpus/?/*.txt") == ["a/.hidden.txt", "a/1.txt", "b/2.txt"]
    assert names("memory://corpus") == ["a/1.txt", "a/deep/3.jsonl", "b/2.txt", "s/data.arrow"]
    assert names("memory://corpus/a/") == ["a/1.txt", "a/deep/3.jsonl"]
    assert texts(section("memory://corpus")) == ["x", "three", "x", "four"]
    assert is_glob("memory://corpus")
    assert is_glob("memory://corpus/*/1.txt")
    assert not is_glob("memory://corpus/a/1.txt")
    with pytest.raises(UserError, match=r"no file matches memory://corpus/\*\.csv; correct the p"):
        expand("memory://corpus/*.csv")
    with pytest.raises(UserError, match=r"memory://corpus/none\.txt does not exist; correct the a"):
        expand("memory://corpus/none.txt")
    with pytest.raises(UserError, match=r"1\.txt is named by .*1\.txt and by memory://corpus/a, a"):
        check_overlap(["memory://corpus/a/1.txt", "memory://corpus/a"])


def test_what_is_bad_in_a_remote_file_is_skipped_too(memory: MemoryFileSystem) -> None:
    memory.pipe_file("memory://corpus/a.jsonl", b'{"text": "one"}\n{\n')
    memory.pipe_file("memory://corpus/b.txt", b"")
    reading = Reading()
    assert texts(section("memory://corpus/*"), reading) == ["one"]
    places = {kind: found["places"] for kind, found in reading.skipped.items()}
    assert places == {
        "rows that are not JSON": ["memory:///corpus/a.jsonl, line 2"],
        "empty files": ["memory:///corpus/b.txt"],
    }
    with pytest.raises(UserError, match=r"memory:///corpus/b\.txt is empty; fill it or leave it o"):
        check_corpus(section("memory://corpus/b.txt"))


def test_an_address_stays_what_it_is(memory: MemoryFileSystem) -> None:
    memory.pipe_file("memory://corpus/a.txt", b"text")
    source = source_of(section("memory://corpus/a.txt", "b/*.txt"))
    assert source.located().paths == ("memory://corpus/a.txt", f"{Path.cwd()}/b/*.txt")
    assert list(source.misplaced()) == []
    signed = source_of(section("https://example.org/a%20b.txt?signature=secret"))
    assert signed.title() == "local files, `a b.txt`"


def test_a_changed_object_is_another_corpus(memory: MemoryFileSystem) -> None:
    def identity() -> Any:
        return source_of(section("memory://corpus/*")).identity(Path())

    memory.pipe_file("memory://corpus/a.txt", b"text")
    before = identity()
    assert identity() == before
    memory.pipe_file("memory://corpus/a.txt", b"tExt")
    assert identity() != before


def test_shards_of_a_remote_file_are_all_of_it(
    memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shardwright.train.data.sources import shards

    monkeypatch.setattr(shards, "LEAST_BYTES", 2**18)
    monkeypatch.setattr(shards, "SHARDS", 2**20)
    memory.pipe_file("memory://corpus/a.jsonl", LONG)
    memory.pipe_file("memory://corpus/b.txt", b"text")
    data = section("memory://corpus/*")
    divided = shards_of(data, Path())
    assert len(divided) > 10
    pieces = [p for s in divided for p in read_shard(data, s, Path(), Reading())]
    assert pieces == list(read_corpus(data, Path()))


def test_a_run_is_prepared_from_a_remote_corpus(
    corpus: Path, make_config: MakeConfig, run_dir: Path, tmp_path: Path, memory: MemoryFileSystem
) -> None:
    for path in corpus.iterdir():
        memory.pipe_file(f"memory://corpus/{path.name}", path.read_bytes())
    there = prepare(make_config(data={"paths": ["memory://corpus/*.txt"]}), run_dir)
    (tmp_path / "other").mkdir()
    here = prepare(make_config(), tmp_path / "other")
    pairs = zip(there.train.sources, here.train.sources, strict=True)
    assert all((a.store.tokens == b.store.tokens).all() for a, b in pairs)


class Flaky(MemoryFileSystem):
    """A filesystem whose connections break."""

    protocol = "flaky"
    bytes_a_connection = 300_000
    opened = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped: str = super()._strip_protocol(path.replace("flaky://", "memory://"))
        return stripped

    def _open(self, path: str, *args: Any, **kwargs: Any) -> Any:
        Flaky.opened += 1
        found = super()._open(path, *args, **kwargs)
        left = self.bytes_a_connection
        read = found.read

        class Breaking(io.BytesIO):
            def read(self, size: int | None = -1) -> bytes:
                nonlocal left
                if left <= 0:
                    raise ConnectionResetError("connection reset by peer")
                chunk: bytes = read(min(left, -1 if size is None else size))
                left -= len(chunk)
                return chunk

            def seek(self, offset: int, whence: int = 0) -> int:
                return int(found.seek(offset, whence))

        return Breaking()


@pytest.fixture
def flaky(memory: MemoryFileSystem) -> type[Flaky]:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.opened = 0
    Flaky.bytes_a_connection = 300_000
    memory.pipe_file("/corpus/a.jsonl", LONG)
    return Flaky


def test_a_connection_that_breaks_is_opened_again_where_it_broke(flaky: type[Flaky]) -> None:
    found = texts(section("flaky://corpus/a.jsonl"))
    assert found == [json.loads(line)["text"] for line in LONG.splitlines()]
    assert flaky.opened == -(-len(LONG) // flaky.bytes_a_connection)


def test_a_connection_that_always_breaks_is_an_error_even_where_bad_documents_are_skipped(
    flaky: type[Flaky],
) -> None:
    flaky.bytes_a_connection = 0
    for policy in ("error", "skip"):
        flaky.opened = 0
        with pytest.raises(
            UserError,
            match=r"data\.paths: flaky:///corpus/a\.jsonl cannot be read from byte 0 on "
            r"\(connection reset by peer\); see that it can be reached",
        ):
            texts(section("flaky://corpus/a.jsonl", on_bad_document=policy))
        assert flaky.opened == remote.TRIES


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ImportError("Install s3fs to access S3"), r"s3:// is not installed; pip install s3fs"),
        (ValueError("Protocol not known: s3"), "Protocol not known: s3; give a path, or the addr"),
        (RuntimeError("Unable to locate credentials"), r"cannot be read \(Unable to locate cred"),
    ],
)
def test_a_filesystem_that_is_not_there_is_told_with_the_remedy(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(url: str) -> None:
        raise error

    monkeypatch.setattr(fsspec.core, "url_to_fs", fails)
    with pytest.raises(UserError, match=rf"data\.paths: s3://bucket/\*\.jsonl:? {reason}"):
        expand("s3://bucket/*.jsonl")


# --- HTTP -----------------------------------------------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    """Gives files, and breaks off as it is told."""

    files: dict[str, bytes]
    gives_ranges = True
    gives_heads = True
    breaks_after: int | None = None
    """Bytes of an answer; None for all."""
    busy = 0
    """Answers to come that say so."""
    asked: list[tuple[str, str | None]]
    tag = '"1"'

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # whoever breaks off is meant to


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        if self.server.gives_heads:
            self._answer(body=False)
        else:
            self.send_error(405)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        server = self.server
        server.asked.append((self.command, self.headers.get("Range")))
        name = self.path.partition("?")[0].lstrip("/")
        if server.busy:
            server.busy -= 1
            self.send_error(503)
            return
        if name not in server.files:
            self.send_error(404)
            return
        content = server.files[name]
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(found[1]) if found and server.gives_ranges else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", server.tag)
        self.end_headers()
        if body:
            self.wfile.write(content[start:][: server.breaks_after])

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.files, server.asked = {}, []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("gives_ranges", [True, False])
def test_kinds_are_read_over_http(server: Server, gives_ranges: bool) -> None:
    server.gives_ranges = gives_ranges
    for kind in KINDS:
        if kind.text_field != "text" or (kind.name == "a.zip" and not gives_ranges):
            continue
        server.files[kind.name] = kind.content
        data = section(server.url(kind.name) + "?signature=x")
        check_corpus(data)
        assert texts(data) == kind.expected, kind.name


def test_a_download_that_breaks_goes_on_at_the_byte(server: Server) -> None:
    server.files["a.jsonl"] = LONG
    server.breaks_after = 700_000
    found = texts(section(server.url("a.jsonl")))
    assert found == [json.loads(line)["text"] for line in LONG.splitlines()]
    starts = [range_ for method, range_ in server.asked if method == "GET"]
    assert starts == [None] + [f"bytes={at}-" for at in range(700_000, len(LONG), 700_000)]


def test_a_server_that_knows_no_ranges_is_read_to_where_it_broke(server: Server) -> None:
    server.files["a.jsonl"] = LONG
    server.gives_ranges = False
    server.breaks_after = len(LONG) - 10
    with pytest.raises(
        UserError, match=rf"a\.jsonl cannot be read from byte {len(LONG) - 10:,} on \(it ends there"
    ):
        texts(section(server.url("a.jsonl"), on_bad_document="skip"))
    assert len([1 for method, _ in server.asked if method == "GET"]) == remote.TRIES


def test_a_table_and_an_archive_are_read_by_their_ranges(server: Server) -> None:
    server.files["a.parquet"] = table("parquet", text=DOCUMENTS)
    server.files["a.zip"] = in_zip({"a.jsonl": lines_of(ROWS)})
    assert texts(section(server.url("a.parquet"), server.url("a.zip"))) == DOCUMENTS * 2
    assert any(range_ for _, range_ in server.asked)


def test_a_server_that_is_busy_is_asked_again(server: Server) -> None:
    server.files["a.txt"] = b"text"
    server.busy = 3
    assert texts(section(server.url("a.txt"))) == ["text"]
    server.busy = 100
    with pytest.raises(UserError, match=r"a\.txt cannot be read \(Service Unavailable\); see that"):
        check_corpus(section(server.url("a.txt")))


def test_a_server_without_heads_is_asked_otherwise(server: Server) -> None:
    server.files["a.txt"] = b"text"
    server.gives_heads = False
    assert texts(section(server.url("a.txt"))) == ["text"]


def test_a_file_that_is_changed_while_it_is_read_is_refused(server: Server) -> None:
    server.files["a.jsonl"] = LONG
    server.breaks_after = 500_000
    data = section(server.url("a.jsonl"), on_bad_document="skip")
    pieces = read_corpus(data, Path())
    next(pieces)
    server.tag = '"2"'
    with pytest.raises(UserError, match=r"a\.jsonl cannot be read .*it was changed while it was"):
        list(pieces)
    before = source_of(data).identity(Path())
    server.tag = '"3"'
    assert source_of(data).identity(Path()) != before


def test_what_http_cannot_do_is_told(server: Server) -> None:
    with pytest.raises(UserError, match=r"a\.txt does not exist; correct the address"):
        check_corpus(section(server.url("a.txt")))
    with pytest.raises(UserError, match=r"\*\.txt: HTTP does not list files.* give the address of"):
        check_corpus(section(server.url("*.txt")))
    server.files["corpus/"] = b"<html>"
    with pytest.raises(UserError, match=r"corpus/ does not end in one of \.txt"):
        check_corpus(section(server.url("corpus/")))
