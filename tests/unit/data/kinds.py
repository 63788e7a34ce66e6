"""Every kind of file that holds texts, as its own programs write it, with the documents in it."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import pyarrow
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet

DOCUMENTS = ["one\ntwo", 'a "quoted", sentence', "zwölf Boxkämpfer \U0001f600", "tab\tand\nline"]
ROWS = [{"id": i, "text": text} for i, text in enumerate(DOCUMENTS)]


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


def delimited(separator: str) -> bytes:
    quoted = ['"' + text.replace('"', '""') + '"' for text in DOCUMENTS]
    lines = [f"{i}{separator}{text}\n" for i, text in enumerate(quoted)]
    return "".join([f"id{separator}text\n", *lines]).encode()


def lines_of(rows: Iterable[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


TEXTS: dict[str, tuple[bytes, list[str]]] = {
    ".txt": ("\n".join(DOCUMENTS).encode(), ["\n".join(DOCUMENTS)]),
    ".jsonl": (lines_of(ROWS), DOCUMENTS),
    ".json": (json.dumps(ROWS, indent=2, ensure_ascii=False).encode(), DOCUMENTS),
    ".csv": (delimited(","), DOCUMENTS),
    ".tsv": (delimited("\t"), DOCUMENTS),
}
"""What is in a file of each text format, and its documents."""


def in_zip(files: Mapping[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def in_tar(files: Mapping[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def table(kind: str, **columns: list[Any]) -> bytes:
    out = io.BytesIO()
    content = pyarrow.table(columns)
    if kind == "parquet":
        pyarrow.parquet.write_table(content, out, row_group_size=2)
    elif kind == "feather":
        pyarrow.feather.write_feather(content, out)
    else:
        with pyarrow.ipc.new_stream(out, content.schema) as stream:
            stream.write_table(content)
    return out.getvalue()


CHATS = [
    [{"role": "user", "content": "one"}, {"role": "model", "content": "two"}],
    [],
    None,
    [{"role": "user", "content": "three"}],
]
NESTED = [{"body": {"text": text}, "title": None} for text in DOCUMENTS]
WEB = {
    "000.jpg": b"\xff\xd8",
    "000.json": b'{"text": "tells of the picture"}',
    "000.txt": b"one",
    "001.json": b'{"text": "two"}',
    "deep/002.txt": "zwölf".encode(),
    "deep/002.cls": b"7",
}


class Kind(NamedTuple):
    name: str
    content: bytes
    expected: list[str]
    text_field: str = "text"


KINDS = [
    *(
        Kind(f"a{kind}{ending}", compress(content), expected)
        for kind, (content, expected) in TEXTS.items()
        for ending, compress in COMPRESS.items()
    ),
    *(
        Kind(
            f"a.jsonl{end}",
            pack(b"") + pack(lines_of(ROWS[:1])) + pack(b"") + pack(lines_of(ROWS[1:])),
            DOCUMENTS,
        )
        for end, pack in COMPRESS.items()
        if end
    ),
    *(
        Kind(f"a.{kind}", table(kind, id=[1, 2, 3, 4], text=DOCUMENTS), DOCUMENTS)
        for kind in ("parquet", "arrow", "feather")
    ),
    Kind("lines.json", lines_of(ROWS), DOCUMENTS),
    Kind("apart.json", b"\n\n".join(json.dumps(r, indent=1).encode() for r in ROWS), DOCUMENTS),
    Kind("one.json", b'{"text": "one"}', ["one"]),
    Kind("null.json", b' [ {"text": null}, {"text": "\\ud83d"} ] ', ["\ufffd"]),
    Kind("nested.jsonl", lines_of(NESTED), DOCUMENTS, "body.text"),
    Kind("dotted.jsonl", b'{"a.b": "one", "a": {"b": "two"}}', ["one"], "a.b"),
    Kind("list.jsonl", lines_of([{"text": ["one", None, "two"]}, {"text": []}]), ["one", "two"]),
    *(
        Kind(f"chats.{kind}", content, expected, field)
        for kind, content in (
            ("jsonl", lines_of({"messages": chat} for chat in CHATS)),
            ("json", json.dumps([{"messages": chat} for chat in CHATS]).encode()),
            ("parquet", table("parquet", messages=CHATS)),
            ("arrow", table("arrow", messages=CHATS)),
        )
        for field, expected in (
            ("messages.0.content", ["one", "three"]),
            ("messages.content", ["one", "two", "three"]),
        )
    ),
    *(
        Kind(f"nested.{kind}", table(kind, row=NESTED, other=[0] * 4), DOCUMENTS, "row.body.text")
        for kind in ("parquet", "feather", "arrow")
    ),
    *(
        Kind(f"list.{kind}", table(kind, text=[["one", None, "two"], None, []]), ["one", "two"])
        for kind in ("parquet", "feather", "arrow")
    ),
    Kind(
        "a.zip",
        in_zip(
            {
                "b/two.jsonl.gz": gzip.compress(lines_of(ROWS)),
                "a.txt": b"first",
                "notes.md": b"no text to train on",
                "__MACOSX/._a.txt": b"\x00\x05",
                "empty.txt": b"",
                "z.json": b'[{"text": "last"}]',
            }
        ),
        [*DOCUMENTS, "first", "last"],
    ),
    *(
        Kind(f"web.tar{ending}", compress(in_tar(WEB)), ["one", "two", "zwölf"])
        for ending, compress in COMPRESS.items()
    ),
    Kind("lines.tar", in_tar({"a.jsonl": lines_of(ROWS), "b.csv": delimited(",")}), DOCUMENTS * 2),
]
