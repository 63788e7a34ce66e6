"""Local text files, read a piece or a row at a time and checked before a run starts."""

from __future__ import annotations

import codecs
import contextlib
import csv
import glob
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from shardwright.train.errors import UserError

TABLES = (".parquet", ".arrow", ".feather")
FORMATS = (".txt", ".jsonl", ".csv", *TABLES)
PIECE_BYTES = 2**18
CHECKED_BYTES = 2**20
HASHED_BYTES = 2**20
ROWS_AT_ONCE = 256
BYTES_AT_ONCE = 2**22


class Text(NamedTuple):
    """A document, or one piece of a long one."""

    text: str
    begins: bool = True
    ends: bool = True


def is_glob(pattern: str) -> bool:
    """Whether a path is to be matched, and does not name one file outright."""
    pattern = os.path.expanduser(pattern)
    # A name may hold a glob's characters and still be a file's; a directory stands for its files.
    return os.path.isdir(pattern) or (glob.has_magic(pattern) and not os.path.lexists(pattern))


def expand(pattern: str) -> list[Path]:
    """Return the files that a path or glob names, sorted; raise UserError where there is none.

    A directory names those below it that are of a known format.

    A file that several links lead to is named once.
    """
    by_glob = is_glob(pattern)
    pattern = os.path.expanduser(pattern)
    if os.path.isdir(pattern):
        found = _below(pattern)
    elif not by_glob:
        found = [pattern]
    else:
        matched = sorted({os.path.normpath(p) for p in _matching(pattern) if os.path.isfile(p)})
        found = list({os.path.realpath(p): p for p in reversed(matched)}.values())[::-1]
        if not found:
            raise UserError(
                f"data.paths: no file matches {pattern} (from {os.getcwd()}); "
                "correct the pattern (** descends into directories)"
            )
    return [Path(p) for p in found]


def _below(directory: str) -> list[str]:
    if os.path.isfile(os.path.join(directory, "dataset_dict.json")):
        raise UserError(
            f"data.paths: {directory} holds splits that `save_to_disk` wrote; write data=hub "
            f"data.name={directory} data.split=train"
        )
    matched = sorted(set(_matching(os.path.join(glob.escape(directory), "**", "*"))))
    # Beside what datasets has saved lie the results of its own computations.
    found = [
        path
        for path in matched
        if os.path.isfile(path)
        and is_known(Path(path))
        and not (
            os.path.basename(path).startswith("cache-")
            and os.path.exists(os.path.join(os.path.dirname(path), "state.json"))
        )
    ]
    if not found:
        raise UserError(
            f"data.paths: {directory} is a directory with no file that ends in one of "
            f"{', '.join(FORMATS)} (text files also .gz); give another, or convert its files"
        )
    return list({os.path.realpath(path): path for path in reversed(found)}.values())[::-1]


def is_known(path: Path) -> bool:
    """Return whether a file's name ends as one of a format that is read. Pure."""
    kind = _format_of_any(path)
    return kind in FORMATS and not (kind in TABLES and path.suffix == ".gz")


def _matching(pattern: str) -> Iterator[str]:
    """Yield what a glob matches, some of it twice, where ``**`` visits each directory once.

    `glob.glob` follows links to directories: one that leads to a directory above it 40 times, and
    two of them on each of these 40 levels (Python 3.13).
    """
    parts = pattern.split(os.sep)
    if "**" not in parts:
        yield from glob.glob(pattern)
        return
    at = parts.index("**")
    above = os.sep.join(parts[:at]) or (os.sep if pattern.startswith(os.sep) else ".")
    below = parts[at + 1 :] or ["*"]
    for folder in _folders(sorted(glob.glob(above))):
        yield from _matching(os.path.join(glob.escape(folder), *below))


def _folders(roots: list[str]) -> Iterator[str]:
    """Yield directories and those below them, each once; hidden ones are left out, as by glob."""
    seen: set[str] = set()
    waiting = roots[::-1]
    while waiting:
        folder = waiting.pop()
        real = os.path.realpath(folder)
        if real in seen or not os.path.isdir(folder):
            continue
        seen.add(real)
        yield folder
        with contextlib.suppress(OSError):
            names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
            waiting += [os.path.join(folder, n) for n in names[::-1] if not n.startswith(".")]


def check_overlap(patterns: Sequence[str]) -> None:
    """Raise UserError where a file is named by two patterns, and would be read twice."""
    named: dict[str, str] = {}
    for pattern in patterns:
        for path in expand(pattern):
            other = named.setdefault(os.path.realpath(path), pattern)
            if other != pattern:
                raise UserError(
                    f"data.paths: {path} is named by {other} and by {pattern}, and would be read "
                    "twice; name it once, and use data.weights to see it more often"
                )


def check_files(pattern: str, text_field: str) -> None:
    """Raise UserError where a file is missing or unreadable, going by its beginning, or empty.

    An empty file that a glob has matched is none of the user's choosing: reading skips it,
    as long as another is not empty.
    """
    paths = expand(pattern)
    empty = [path for path in paths if not check_file(path, text_field)]
    if empty and not is_glob(pattern):
        raise is_empty(empty[0])
    if len(empty) == len(paths):
        raise UserError(
            f"data.paths: {pattern} matches {len(paths):,} files, and all of them are empty; "
            "fill them or correct the pattern"
        )


def is_empty(path: Path) -> UserError:
    """Return the error for a file that was named and holds nothing."""
    return UserError(f"data.paths: {path} is empty; fill it or leave it out")


def check_file(path: Path, text_field: str) -> bool:
    """Return whether there is text in a file; raise UserError where it is missing or unreadable.

    Goes by its beginning: reads at most the first MiB, or the first row where that is longer.
    """
    if os.path.isdir(path):
        raise _is_directory(path)
    kind = _format(path)
    try:
        size_bytes = path.stat().st_size
    except FileNotFoundError:
        raise UserError(
            f"data.paths: {path} does not exist (looked in {os.getcwd()}); correct the path"
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from None
    has_content = size_bytes > 0
    if has_content and kind not in TABLES:
        # All of it, not any(): every chunk has to be decoded.
        has_content = sum(len(text.strip()) for text in _decoded(path, CHECKED_BYTES)) > 0
    if has_content and kind != ".txt":
        has_content = next(_rows(path, text_field), None) is not None
    return has_content or size_bytes > CHECKED_BYTES


def read_file(path: Path, text_field: str, by_line: bool) -> Iterator[Text]:
    """Yield the documents of a file: a row each, or the whole of a .txt (``by_line``: a line each).

    Memory is bounded by the longest row, or by ``PIECE_BYTES`` for a .txt. Raises UserError at the
    first byte or row that cannot be read.
    """
    if _format(path) != ".txt":
        for row in _rows(path, text_field):
            yield from pieces(row)
    elif by_line:
        yield from _line_pieces(_decoded(path))
    else:
        yield from _pieces(_decoded(path))


def pieces(text: str) -> Iterator[Text]:
    """Yield a document, a long one in pieces: what is made of each takes many times its size."""
    if len(text) <= PIECE_BYTES:
        yield Text(text)
    else:
        yield from _pieces(text[i : i + PIECE_BYTES] for i in range(0, len(text), PIECE_BYTES))


def identity(path: Path) -> list[str | int]:
    """Return what changes when a file's content does.

    Small files are hashed, so that a copy elsewhere counts as the same; of larger ones path, size,
    modification time and the time of the last change of any kind, which nobody can set, have to do.
    """
    try:
        stat = path.stat()
        if stat.st_size <= HASHED_BYTES:
            return [_format_of_any(path), hashlib.blake2b(path.read_bytes()).hexdigest()]
    except OSError as error:
        raise _unreadable(path, error) from None
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


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
    if not is_known(path):
        raise UserError(
            f"data.paths: {path} does not end in one of {', '.join(FORMATS)} "
            "(text files also .gz); convert or rename it"
        )
    return kind


def _is_directory(path: Path) -> UserError:
    inside = (kind for kind in FORMATS if next(path.rglob(f"*{kind}"), None))
    example = path / "**" / f"*{next(inside, '.txt')}"
    return UserError(f"data.paths: {path} is a directory; name its files, for example {example}")


def _unreadable(path: Path, error: Exception) -> UserError:
    if isinstance(error, IsADirectoryError):
        return _is_directory(path)
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
                if offset == 0:
                    _check_no_archive(path, chunk)
                pending = len(decoder.getstate()[0])
                text = newlines.decode(decoder.decode(chunk, final=not chunk), final=not chunk)
                if offset == 0:
                    _check_no_zeros(path, text)
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


def _check_no_archive(path: Path, beginning: bytes) -> None:
    if beginning[257:262] == b"ustar":
        raise UserError(
            f"data.paths: {path} is a tar archive, not a text; unpack it and name its files"
        )


def _check_no_zeros(path: Path, beginning: str) -> None:
    if beginning.count("\0") * 4 > len(beginning):  # ASCII in UTF-16 is UTF-8 with zeros, too
        raise UserError(
            f"data.paths: {path} is UTF-16 or UTF-32 without a mark, or not text: it is full of "
            "zero bytes; convert it to UTF-8 or leave it out"
        )


def _pieces(chunks: Iterable[str]) -> Iterator[Text]:
    """Yield one document in pieces, cut after a line where there is one, else before a space."""
    rest, begins = "", True
    for chunk in chunks:
        rest += chunk
        if cut := _cut(rest):
            yield Text(rest[:cut], begins, ends=False)
            rest, begins = rest[cut:], False
    yield Text(rest, begins, ends=True)


def _line_pieces(chunks: Iterable[str]) -> Iterator[Text]:
    """Yield each line as a document, a long one in pieces."""
    rest, begins = "", True
    for chunk in chunks:
        *lines, rest = (rest + chunk).split("\n")
        for line in lines:
            yield Text(line, begins, ends=True)
            begins = True
        if cut := _cut(rest):
            yield Text(rest[:cut], begins, ends=False)
            rest, begins = rest[cut:], False
    if rest or not begins:
        yield Text(rest, begins, ends=True)


def _cut(text: str) -> int:
    """Return where to end a piece; 0 where the text is too short to be one."""
    half = len(text) // 2
    if half < PIECE_BYTES // 2:
        return 0
    return text.rfind("\n", half) + 1 or max(text.rfind(" ", half), 0) or len(text)


def _lines(chunks: Iterable[str]) -> Iterator[str]:
    parts: list[str] = []
    for chunk in chunks:
        first, *others = chunk.split("\n")
        parts.append(first)
        if others:
            yield "".join(parts)
            *lines, last = others
            yield from lines
            parts = [last]
    if rest := "".join(parts):
        yield rest


def _rows(path: Path, text_field: str) -> Iterator[str]:
    """Yield the text column of a table; rows without a text are left out."""
    match _format(path):
        case ".jsonl":
            return _jsonl_rows(path, text_field)
        case ".csv":
            return _csv_rows(path, text_field)
        case _:
            return _table_rows(path, text_field)


def _jsonl_rows(path: Path, text_field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(_decoded(path)), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except RecursionError:
            raise UserError(
                f"data.paths: {path}, line {number} is nested too deeply; correct the line"
            ) from None
        except ValueError as error:  # no JSON, or a number of thousands of digits
            raise UserError(
                f"data.paths: {path}, line {number} is not JSON ({error}); correct the line"
            ) from None
        if not isinstance(row, dict):
            raise UserError(
                f"data.paths: {path}, line {number} is not a JSON object; "
                f'write each row as {{"{text_field}": "..."}}'
            )
        if text_field not in row:
            raise column_missing(f"{path}, line {number}", text_field, row)
        text = row[text_field]
        if text is None:
            continue
        if not isinstance(text, str):
            raise no_text(f"{path}, line {number}", text_field, type(text).__name__)
        yield _without_surrogates(text) if "\\u" in line else text


def _without_surrogates(text: str) -> str:
    """Return a text with U+FFFD for each half of a surrogate pair, which JSON can spell alone."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _csv_rows(path: Path, text_field: str) -> Iterator[str]:
    csv.field_size_limit(2**31 - 1)
    # Strict, or a quote that nothing closes would take all rows behind it into one.
    reader = csv.reader((line + "\n" for line in _lines(_decoded(path))), strict=True)
    first_line = 1
    try:
        header = next(filter(None, reader), None)
        if header is None:
            return
        if header.count(text_field) > 1:
            raise _twice(str(path), text_field)
        if text_field not in header:
            raise column_missing(str(path), text_field, header)
        column = header.index(text_field)
        first_line = reader.line_num + 1
        for row in reader:
            if len(row) > len(header):
                raise UserError(
                    f"data.paths: {path}, line {first_line} has {len(row)} fields, and the header "
                    f"names {len(header)}; put quotes around a field that holds a comma"
                )
            if len(row) > column:
                yield row[column]
            elif row:
                raise UserError(
                    f"data.paths: {path}, line {first_line} has {len(row)} fields and no "
                    f"{text_field}; correct the line"
                )
            first_line = reader.line_num + 1
    except csv.Error as error:
        what = f"is not CSV ({error})"
        if "unexpected end of data" in str(error):
            what = "opens a quote that is never closed"
        raise UserError(
            f"data.paths: {path}, line {first_line} {what}; correct the line, and write a quote "
            'within quotes as ""'
        ) from None


def _table_rows(path: Path, text_field: str) -> Iterator[str]:
    """Yield the text column of a Parquet, Arrow or Feather file."""
    import pyarrow

    read = _parquet_columns if path.suffix == ".parquet" else _arrow_columns
    try:
        if path.stat().st_size == 0:
            return
        for column in read(path, text_field):
            # One at a time: the rows of a batch may all be long.
            yield from (text for row in column if (text := row.as_py()) is not None)
    except UnicodeDecodeError as error:
        raise UserError(
            f"data.paths: {path} holds text in {text_field} that is not UTF-8 "
            f"(0x{error.object[error.start]:02x}); save it again as UTF-8, or leave it out"
        ) from None
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(path, error) from None


def _parquet_columns(path: Path, text_field: str) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        _check_column(path, text_field, file.schema_arrow)
        rows = _rows_at_once(file.metadata, text_field)
        for batch in file.iter_batches(batch_size=rows, columns=[text_field]):
            yield batch.column(0)


def _rows_at_once(metadata: Any, text_field: str) -> int:
    """Return how many rows to have in memory together, going by the size of an average one."""
    most = 1
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        for j in range(group.num_columns):
            chunk = group.column(j)
            if chunk.path_in_schema == text_field:
                most = max(most, chunk.total_uncompressed_size // max(1, group.num_rows))
    return max(1, min(ROWS_AT_ONCE, BYTES_AT_ONCE // most))


def _arrow_columns(path: Path, text_field: str) -> Iterator[Any]:
    """Yield a column of Arrow's file format, as Feather is, or of its streams, as datasets has."""
    import pyarrow.ipc

    with pyarrow.memory_map(str(path)) as source:
        magic = source.read(6)
        is_file = magic == b"ARROW1"
        if magic[:4] == b"FEA1":
            raise UserError(
                f"data.paths: {path} is Feather in its version 1, which is not read; save it "
                "again as version 2"
            )
        source.seek(0)
        if is_file:
            file = pyarrow.ipc.open_file(source)
            _check_column(path, text_field, file.schema)
            batches = (file.get_batch(index) for index in range(file.num_record_batches))
        else:
            batches = stream = pyarrow.ipc.open_stream(source)
            _check_column(path, text_field, stream.schema)
        for batch in batches:
            column = batch.column(batch.schema.get_field_index(text_field))
            for start in range(0, len(column), ROWS_AT_ONCE):
                yield column.slice(start, ROWS_AT_ONCE)


def _check_column(path: Path, text_field: str, schema: Any) -> None:
    """Raise UserError where a table has not just one column of that name, of texts."""
    import pyarrow

    names = schema.names
    if text_field not in names:
        raise column_missing(str(path), text_field, names)
    if names.count(text_field) > 1:
        raise _twice(str(path), text_field)
    kind = schema.field(text_field).type
    of_values = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    types = pyarrow.types
    # Null is the type of a column in which there is nothing at all.
    texts = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    if not any(is_text(of_values) for is_text in texts):
        raise no_text(str(path), text_field, str(kind))


def _twice(where: str, text_field: str) -> UserError:
    return UserError(
        f"data.text_field={text_field}: {where} has two columns of that name; rename one of them"
    )


def no_text(where: str, text_field: str, found: str) -> UserError:
    return UserError(
        f"data.text_field={text_field}: {where} holds {found} there, not text; "
        "set data.text_field to the column that holds the text"
    )
