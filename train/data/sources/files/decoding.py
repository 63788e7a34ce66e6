"""Files as text: opened by how their names end, decoded a chunk at a time."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, Any

from shardwright.train.data.sources.files.errors import unreadable
from shardwright.train.data.sources.files.file import File
from shardwright.train.data.sources.files.formats import compression
from shardwright.train.data.sources.files.pieces import PIECE_BYTES
from shardwright.train.data.sources.files.ranges import Range, chunks
from shardwright.train.errors import UserError

BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError)


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
    file: File, limit_bytes: int | None = None, within: Range | None = None
) -> Iterator[str]:
    """Yield a UTF-8 file's text, or ``within`` a range its lines, in chunks.

    Its only line end is "\\n".
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
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
        raise UserError(
            f"data.paths: {file} is not UTF-8 at byte {position} "
            f"(0x{error.object[error.start]:02x}); convert it to UTF-8 or leave it out"
        ) from None


def _chunks(file: IO[bytes], limit_bytes: int | None) -> Iterator[tuple[int, bytes, bool]]:
    """Yield where each chunk begins, the chunk, and whether it is the last, which is empty."""
    offset = 0
    while limit_bytes is None or offset < limit_bytes:
        chunk = file.read(PIECE_BYTES)
        yield offset, chunk, not chunk
        offset += len(chunk)
        if not chunk:
            break


def _check_no_archive(file: File, beginning: bytes) -> None:
    if beginning[257:262] == b"ustar":
        raise UserError(
            f"data.paths: {file} is a tar archive, not a text; unpack it and name its files"
        )


def _check_no_zeros(file: File, beginning: str) -> None:
    if beginning.count("\0") * 4 > len(beginning):  # ASCII in UTF-16 is UTF-8 with zeros, too
        raise UserError(
            f"data.paths: {file} is UTF-16 or UTF-32 without a mark, or not text: it is full of "
            "zero bytes; convert it to UTF-8 or leave it out"
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
