"""Local text files, read a piece or a row at a time and checked before a run starts."""

from __future__ import annotations

import codecs
import csv
import glob
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from train.errors import UserError

FORMATS = (".txt", ".jsonl", ".csv", ".parquet")
PIECE_BYTES = 2**18
CHECKED_BYTES = 2**20
HASHED_BYTES = 2**20


class Text(NamedTuple):
    """A document, or one piece of a long one."""

    text: str
    begins: bool = True
    ends: bool = True


def expand(pattern: str) -> list[Path]:
    """Return the files that a path or glob names, sorted; raise UserError where there is none."""
    pattern = os.path.expanduser(pattern)
    # A name may hold a glob's characters and still be a file's.
    if os.path.lexists(pattern) or not glob.has_magic(pattern):
        found = [pattern]
    else:
        found = sorted(p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))
        if not found:
            raise UserError(
                f"data.paths: no file matches {pattern} (from {os.getcwd()}); "
                "correct the pattern (** descends into directories)"
            )
    return [Path(p) for p in found]


def check_file(path: Path, text_field: str) -> None:
    """Raise UserError where a file is missing, empty or unreadable, going by its beginning.

    Reads at most the first MiB, or the first row where that is longer.
    """
    kind = _format(path)
    try:
        if path.is_dir():
            raise UserError(
                f"data.paths: {path} is a directory; name its files, for example {path}/**/*.txt"
            )
        size_bytes = path.stat().st_size
    except FileNotFoundError:
        raise UserError(
            f"data.paths: {path} does not exist (looked in {os.getcwd()}); correct the path"
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from None
    has_content = size_bytes > 0
    if has_content and kind != ".parquet":
        # All of it, not any(): every chunk has to be decoded.
        has_content = sum(len(text.strip()) for text in _decoded(path, CHECKED_BYTES)) > 0
    if has_content and kind != ".txt":
        has_content = next(_rows(path, text_field), None) is not None
    if not has_content and size_bytes <= CHECKED_BYTES:
        raise UserError(f"data.paths: {path} is empty; fill it or leave it out")


def read_file(path: Path, text_field: str, by_line: bool) -> Iterator[Text]:
    """Yield the documents of a file: a row each, or the whole of a .txt (``by_line``: a line each).

    Memory is bounded by the longest row, or by ``PIECE_BYTES`` for a .txt. Raises UserError at the
    first byte or row that cannot be read.
    """
    if _format(path) != ".txt":
        yield from (Text(row) for row in _rows(path, text_field))
    elif by_line:
        yield from (Text(line) for line in _lines(_decoded(path)))
    else:
        yield from _pieces(_decoded(path))


def identity(path: Path) -> list[str | int]:
    """Return what changes when a file's content does.

    Small files are hashed, so that a copy elsewhere counts as the same; of larger ones path, size
    and modification time have to do.
    """
    try:
        stat = path.stat()
        if stat.st_size <= HASHED_BYTES:
            return [_format_of_any(path), hashlib.blake2b(path.read_bytes()).hexdigest()]
    except OSError as error:
        raise _unreadable(path, error) from None
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def column_missing(where: str, text_field: str, columns: Iterable[str]) -> UserError:
    """Return the error for a table without the text column."""
    names = ", ".join(sorted(columns)) or "none"
    return UserError(
        f"data.text_field={text_field}: {where} has no such column (it has: {names}); "
        "set data.text_field to the one that holds the text"
    )


def _format_of_any(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def _format(path: Path) -> str:
    kind = _format_of_any(path)
    if kind not in FORMATS or (kind == ".parquet" and path.suffix == ".gz"):
        raise UserError(
            f"data.paths: {path} does not end in one of {', '.join(FORMATS)} "
            "(text files also .gz); convert or rename it"
        )
    return kind


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or error
    return UserError(f"data.paths: cannot read {path} ({reason}); make it readable or leave it out")


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _decoded(path: Path, limit_bytes: int | None = None) -> Iterator[str]:
    """Yield a UTF-8 file's text in chunks, with "\\n" as its only line end."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    offset = pending = 0
    try:
        with _open(path) as file:
            while limit_bytes is None or offset < limit_bytes:
                chunk = file.read(PIECE_BYTES)
                pending = len(decoder.getstate()[0])
                text = newlines.decode(decoder.decode(chunk, final=not chunk), final=not chunk)
                yield text.removeprefix("\ufeff") if offset == 0 else text
                offset += len(chunk)
                if not chunk:
                    break
    except UnicodeDecodeError as error:
        position = offset - pending + error.start
        raise UserError(
            f"data.paths: {path} is not UTF-8 at byte {position} "
            f"(0x{error.object[error.start]:02x}); convert it to UTF-8 or leave it out"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from None


def _pieces(chunks: Iterable[str]) -> Iterator[Text]:
    """Yield one document in pieces, cut after a line where there is one, else before a space."""
    rest, begins = "", True
    for chunk in chunks:
        rest += chunk
        half = len(rest) // 2
        if half < PIECE_BYTES // 2:
            continue
        cut = rest.rfind("\n", half) + 1 or max(rest.rfind(" ", half), 0) or len(rest)
        yield Text(rest[:cut], begins, ends=False)
        rest, begins = rest[cut:], False
    yield Text(rest, begins, ends=True)


def _lines(chunks: Iterable[str]) -> Iterator[str]:
    rest = ""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split("\n")
        yield from lines
    if rest:
        yield rest


def _rows(path: Path, text_field: str) -> Iterator[str]:
    """Yield the text column of a table; rows without a text are left out."""
    readers = {".jsonl": _jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    return readers[_format(path)](path, text_field)


def _jsonl_rows(path: Path, text_field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(_decoded(path)), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"data.paths: {path}, line {number} is not JSON ({error}); correct the line"
            ) from None
        if not isinstance(row, dict):
            raise UserError(
                f"data.paths: {path}, line {number} is no JSON object; "
                f'write each row as {{"{text_field}": "..."}}'
            )
        if text_field not in row:
            raise column_missing(f"{path}, line {number}", text_field, row)
        text = row[text_field]
        if text is None:
            continue
        if not isinstance(text, str):
            raise _no_text(f"{path}, line {number}", text_field, type(text).__name__)
        if "\\ud" in line:
            # JSON can spell half a surrogate pair, which is no text.
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        yield text


def _csv_rows(path: Path, text_field: str) -> Iterator[str]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(line + "\n" for line in _lines(_decoded(path)))
    try:
        header = next(reader, [])
        if text_field not in header:
            raise column_missing(str(path), text_field, header)
        column = header.index(text_field)
        for row in reader:
            if len(row) > column:
                yield row[column]
            elif row:
                raise UserError(
                    f"data.paths: {path}, line {reader.line_num} has {len(row)} fields and no "
                    f"{text_field}; correct the line"
                )
    except csv.Error as error:
        raise UserError(
            f"data.paths: {path}, line {reader.line_num} is not CSV ({error}); correct the line"
        ) from None


def _parquet_rows(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if text_field not in schema.names:
                raise column_missing(str(path), text_field, schema.names)
            column = schema.field(text_field).type
            if not (pyarrow.types.is_string(column) or pyarrow.types.is_large_string(column)):
                raise _no_text(str(path), text_field, str(column))
            for batch in file.iter_batches(batch_size=256, columns=[text_field]):
                yield from (row for row in batch.column(0).to_pylist() if row is not None)
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(path, error) from None


def _no_text(where: str, text_field: str, found: str) -> UserError:
    return UserError(
        f"data.text_field={text_field}: {where} holds {found} there, not text; "
        "set data.text_field to the column that holds the text"
    )
