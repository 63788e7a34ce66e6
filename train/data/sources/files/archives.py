"""Files within archives: those of a .zip, and of a .tar as WebDataset writes it."""

from __future__ import annotations

import contextlib
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import PurePosixPath
from typing import IO, Any, Self, cast

from shardwright.train.data.sources.files.decoding import open_bytes
from shardwright.train.data.sources.files.errors import file_is_bad, unreadable
from shardwright.train.data.sources.files.file import File, Member
from shardwright.train.data.sources.files.formats import (
    TEXTS,
    ending,
    is_known,
)

IN_MEMORY_BYTES = 2**22


def members(file: File) -> Iterator[File]:
    """Yield the files to be read in place of one: those in an archive in its order, or itself.

    Each is to be read before the next is asked for. Of an archive they are those of a text format;
    whatever else there is is left out, but a table or an archive in it is a UserError.
    """
    match ending(file.name):
        case ".zip":
            yield from _of_zip(file)
        case ".tar":
            yield from _of_tar(file)
        case _:
            yield file


def _of_zip(file: File) -> Iterator[File]:
    with contextlib.ExitStack() as opened:
        try:
            archive = opened.enter_context(zipfile.ZipFile(opened.enter_context(file.open("rb"))))
        except (OSError, zipfile.BadZipFile) as error:
            raise unreadable(file, error) from None
        for info in archive.infolist():
            if not info.is_dir() and _is_read(file, info.filename):
                yield Member(str(file), info.filename, partial(_opened, archive, info))


def _opened(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> IO[bytes]:
    try:
        return archive.open(info)
    except (RuntimeError, NotImplementedError) as error:  # encrypted, or compressed in another way
        raise OSError(str(error)) from None


def _of_tar(file: File) -> Iterator[File]:
    """Yield a .tar's texts: of the files of one sample, named alike but for their endings, a .txt.

    A .json beside it only tells of it, as where there are pictures and what is said of them.
    """
    with contextlib.ExitStack() as opened:
        stream = opened.enter_context(open_bytes(file))
        archive = opened.enter_context(tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header))
        # Of the sample at hand. A stream does not turn back: a .json waits here for its .txt.
        sample, has_text = "", False
        waiting: list[Member] = []
        while (info := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # or it keeps what it knows of each
            if not info.isfile() or not _is_read(file, info.name):
                continue
            if sample != (sample := _sample(info.name)):
                yield from waiting
                waiting, has_text = [], False
            content: Any = archive.extractfile(info)
            if ending(info.name) == ".json":
                if not has_text:
                    waiting.append(Member(str(file), info.name, _kept(content)))
                continue
            if ending(info.name) == ".txt":
                waiting, has_text = [], True
            yield Member(str(file), info.name, partial(_itself, content))
        yield from waiting


class _Header(tarfile.TarInfo):
    """What stands before a file in a .tar; tarfile takes a broken one for the archive's end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the blocks that end it
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error}, before the archive's end") from None


def _kept(content: IO[bytes]) -> Callable[[], IO[bytes]]:
    kept = tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES)  # noqa: SIM115 - its reader closes it
    shutil.copyfileobj(content, kept)
    kept.seek(0)
    return partial(_itself, kept)


def _itself(stream: Any) -> IO[bytes]:
    return cast(IO[bytes], stream)


def _sample(name: str) -> str:
    """Return what the files of one sample are called, up to the first dot. Pure."""
    path = PurePosixPath(name)
    return str(path.parent / path.name.partition(".")[0])


def _is_read(archive: File, name: str) -> bool:
    """Return whether an archive's member is a text; raise UserError for what is lost in there."""
    path = PurePosixPath(name)
    if any(part.startswith(".") or part == "__MACOSX" for part in path.parts):
        return False  # as by a glob, and what one system adds
    if not is_known(path.name):
        return False
    if ending(path.name) not in TEXTS:
        raise file_is_bad(
            "",
            archive,
            f" holds {name}, which is not read within an archive as {', '.join(TEXTS)} are; "
            "unpack it",
        )
    return True
