"""Files as text: opened by how their names end, decoded a chunk at a time."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import re
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, Any

from shardwright.train.data.sources.files.errors import (
    BadDocument,
    file_is_bad,
    row_is_bad,
    unreadable,
)
from shardwright.train.data.sources.files.file import File
from shardwright.train.data.sources.files.formats import compression
from shardwright.train.data.sources.files.pieces import PIECE_BYTES, Text
from shardwright.train.data.sources.files.ranges import Range, chunks
from shardwright.train.data.sources.files.skipping import Skipping

BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError)
_BAD_BYTES = re.compile("[\udc80-\udcff]")


@contextlib.contextmanager
def open_bytes(file: File) -> Iterator[IO[bytes]]:
    """Open a file for what is in it, below its compression; raise UserError where it breaks.

    Several compressed streams behind one another are one.
    """
    with contextlib.ExitStack() as opened:
        try:
            raw = opened.enter_context(file.open("rb"))
            yield opened.enter_context(_decompressed(raw, compression(file.name)))
        except BROKEN as error:
            raise unreadable(file, error) from None


def _decompressed(raw: IO[bytes], kind: str | None) -> Any:
    match kind:
        case None:
            return contextlib.nullcontext(raw)
        case ".gz":
            return gzip.GzipFile(fileobj=raw)
        case ".bz2":
            return bz2.BZ2File(raw)
        case ".xz":
            return lzma.LZMAFile(raw)
        case _:
            # Comes with the tables; Python itself has it from 3.14.
            import pyarrow

            return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")


def decoded(
    file: File,
    limit_bytes: int | None = None,
    within: Range | None = None,
    bad: Skipping | None = None,
) -> Iterator[str]:
    """Yield a UTF-8 file's text, or ``within`` a range its lines, in chunks.

    Its only line end is "\\n". What cannot be read is a UserError, or if ``bad`` skips its end;
    bytes that are not UTF-8 are then given as `has_bad_bytes` knows them.
    """
    bad = bad or Skipping()
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape" if bad.skips else "strict")
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    offset = pending = 0
    try:
        with open_bytes(file) as stream:
            read = _chunks(stream, limit_bytes) if within is None else chunks(stream, within)
            for offset, chunk, is_last in read:
                if offset == 0:
                    _check_no_archive(file, chunk)
                pending = len(decoder.getstate()[0])
                text = newlines.decode(decoder.decode(chunk, final=is_last), final=is_last)
                if offset == 0:
                    _check_no_zeros(file, text)
                yield text.removeprefix("\ufeff") if offset == 0 else text
    except UnicodeDecodeError as error:
        position = offset - pending + error.start
        raise file_is_bad(
            "",
            file,
            f" is not UTF-8 at byte {position} (0x{error.object[error.start]:02x}); convert it to "
            "UTF-8 or leave it out",
        ) from None
    except BadDocument as error:
        bad.meet(error)


def has_bad_bytes(text: str, begin: int = 0, end: int = sys.maxsize) -> bool:
    """Return whether a text that was decoded so has bytes in it that are not UTF-8. Pure."""
    # Nothing that is UTF-8 becomes one of these.
    return not text.isascii() and _BAD_BYTES.search(text, begin, end) is not None


def until_bad_bytes(chunks: Iterable[str], file: File, bad: Skipping) -> Iterator[str]:
    """Yield a text as far as it is UTF-8."""
    for chunk in chunks:
        found = None if chunk.isascii() else _BAD_BYTES.search(chunk)
        yield chunk if found is None else chunk[: found.start()]
        if found is not None:
            byte = ord(found[0]) - 0xDC00
            bad.meet(file_is_bad("", file, f" is not UTF-8 (byte 0x{byte:02x}); convert it"))
            return


def lines_without_bad_bytes(lines: Iterable[Text], file: File, bad: Skipping) -> Iterator[Text]:
    """Yield lines that are UTF-8; of one that is given in pieces, what comes before."""
    number, is_bad = 0, False
    for piece in lines:
        number += piece.begins
        is_bad = is_bad and not piece.begins
        if is_bad:
            continue
        if not has_bad_bytes(piece.text):
            yield piece
            continue
        is_bad = True
        bad.meet(row_is_bad("that are not UTF-8", f"{file}, line {number}", " is not UTF-8"))
        if not piece.begins:
            yield Text("", begins=False, ends=True)


def _chunks(stream: Any, limit_bytes: int | None) -> Iterator[tuple[int, bytes, bool]]:
    """Yield where each chunk begins, the chunk, and whether it is the last, which is empty."""
    offset = 0
    while limit_bytes is None or offset < limit_bytes:
        chunk, broken = _read(stream)
        if chunk or broken is None:
            yield offset, chunk, not chunk
        offset += len(chunk)
        if broken is not None:
            raise broken
        if not chunk:
            break


def _read(stream: Any) -> tuple[bytes, Exception | None]:
    """Return a chunk, or what there is of it before the stream breaks, and how it does."""
    parts: list[bytes] = []
    left = PIECE_BYTES
    try:
        # A single read of as much would lose all of it where its end is broken.
        while left and (part := stream.read1(left)):
            parts.append(part)
            left -= len(part)
    except BROKEN as error:
        return b"".join(parts), error
    return b"".join(parts), None


def _check_no_archive(file: File, beginning: bytes) -> None:
    if beginning[257:262] == b"ustar":
        raise file_is_bad("", file, " is a tar archive, not a text; unpack it and name its files")


def _check_no_zeros(file: File, beginning: str) -> None:
    if beginning.count("\0") * 4 > len(beginning):  # ASCII in UTF-16 is UTF-8 with zeros, too
        raise file_is_bad(
            "",
            file,
            " is UTF-16 or UTF-32 without a mark, or not text: it is full of zero bytes; convert "
            "it to UTF-8 or leave it out",
        )


def lines(chunks: Iterable[str]) -> Iterator[str]:
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
