"""Files that are hashed while they are written, and flushed to the disk."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

if TYPE_CHECKING:
    from typing_extensions import Buffer

_BLOCK_BYTES = 2**26


class HashedStream(io.RawIOBase):
    """Hashes and writes bytes in the order in which they come; it cannot seek.

    The first error is kept in ``error`` and what comes after is dropped, for the owner of the file
    to raise: torch's zip writer, left half-way, hides it behind an error about positions.
    """

    # No fileno: torch's legacy format would write tensors around `write`.

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self._digest = xxhash.xxh3_128()
        self._written_bytes = 0
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._written_bytes

    def write(self, data: Buffer, /) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _BLOCK_BYTES):
            self._write_block(view[start : start + _BLOCK_BYTES])
        self._written_bytes += len(view)
        return len(view)

    def _write_block(self, block: memoryview) -> None:
        if self.error is not None:
            return
        self._digest.update(block)
        try:
            written = 0
            while written < len(block):
                written += self._file.write(block[written:]) or 0
        except OSError as error:
            # torch's writer, left half-way, never lets go of this stream (2.13): with the frames
            # of a traceback the trainer and its process group would outlive the training.
            self.error = error.with_traceback(None)

    def finish(self) -> dict[str, Any]:
        """Flush to the disk; return size and hash. Raises the first OSError of all."""
        if self.error is not None:
            raise OSError(self.error.errno, self.error.strerror)
        os.fsync(self._file.fileno())
        return {"bytes": self._written_bytes, "xxh3_128": self._digest.hexdigest()}


class HashedFolder:
    """Writes files below an existing directory and knows the size and hash of each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: dict[str, dict[str, Any]] = {}
        """``bytes`` and ``xxh3_128`` of each whole file, by its relative path."""

    @contextmanager
    def create(self, name: str) -> Iterator[HashedStream]:
        """Give a stream into a new file; when the block ends well the file is whole and on disk.

        Raises OSError, which names the file.
        """
        path = self.path / name
        try:
            self._make_folders(path)
            with path.open("wb", buffering=0) as file:
                stream = HashedStream(file)
                yield stream
                self.files[name] = stream.finish()
        except OSError as error:
            if error.filename is not None:
                raise
            raise OSError(error.errno, error.strerror, str(path)) from error

    def write(self, name: str, data: Buffer) -> None:
        """Write one whole file. Raises OSError."""
        with self.create(name) as stream:
            stream.write(data)

    def rename(self, name: str, new_name: str) -> None:
        """Give a file of the folder another name. Raises OSError."""
        os.rename(self.path / name, self.path / new_name)
        self.files[new_name] = self.files.pop(name)

    def _make_folders(self, path: Path) -> None:
        # Not what has vanished above: an unmounted disk would be written beside.
        if not self.path.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path))
        path.parent.mkdir(parents=True, exist_ok=True)
