"""Files of remote filesystems, streamed: fsspec knows these, and HTTP goes without it."""

from __future__ import annotations

import contextlib
import functools
import io
import time
from collections.abc import Callable, Mapping, Set
from typing import IO, TYPE_CHECKING, Any

from shardwright.train.data.sources.files.errors import Unreachable
from shardwright.train.data.sources.files.file import Remote, is_http, name_of
from shardwright.train.data.sources.files.formats import KNOWN, NOTES, is_known, is_note
from shardwright.train.errors import UserError

if TYPE_CHECKING:
    from http.client import HTTPResponse

TRIES = 5
"""In a row that bring nothing, before a file is given up."""
WAIT_SECONDS = 0.5
"""Before the second try, twice as long before each further one."""
TIMEOUT_SECONDS = 60.0
BUFFER_BYTES = 2**20
VERSIONS = (
    *("ETag", "etag", "checksum", "sha256", "md5", "md5Hash", "content_md5", "blob_id", "oid"),
    *("generation", "version_id", "mtime", "LastModified", "last_modified", "updated", "modified"),
    "created",
)
"""What filesystems call that which changes with a file; the first ones are of its content."""
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs"}
"""What brings a filesystem that fsspec only knows by name; `abfs` is `az` by another name."""


def file_of(url: str) -> Remote:
    """Return the file at an address; raise UserError where there is none."""
    if is_http(url):
        return _of_http(url)
    system, path = _filesystem(url)
    try:
        return _of_fsspec(system, path, system.info(path))
    except FileNotFoundError:
        raise UserError(f"data.paths: {url} does not exist; correct the address") from None
    except Exception as error:  # filesystems' errors share no base class
        raise Unreachable(url, error) from None


def is_many(url: str) -> bool:
    """Return whether an address is to be matched, or is that of a directory."""
    if is_http(url):
        return "*" in url
    return any(sign in url for sign in "*?[") or _is_directory(url)


@functools.cache
def _is_directory(url: str) -> bool:
    if url.endswith("/") or is_known(name_of(url)):
        return url.endswith("/")
    system, path = _filesystem(url)
    try:
        return bool(system.isdir(path))
    except Exception as error:
        raise Unreachable(url, error) from None


def expand(url: str) -> list[Remote]:
    """Return the files that an address names or matches, sorted; raise UserError for none."""
    if not is_many(url):
        return [file_of(url)]
    if is_http(url):
        raise UserError(
            f"data.paths: {url}: HTTP does not list files, so that nothing can be matched; give "
            "the address of each file, or a filesystem that lists them (hf://, s3://, gs://)"
        )
    system, path = _filesystem(url)
    is_directory = _is_directory(url)
    try:
        found = system.find(path, detail=True) if is_directory else system.glob(path, detail=True)
    except Exception as error:
        raise Unreachable(url, error) from None
    files = [
        _of_fsspec(system, name, details)
        for name, details in sorted(found.items())
        if details.get("type") != "directory"
    ]
    if is_directory:
        notes = {url.rpartition("/")[0] for url in map(str, files) if name_of(url) == NOTES[0]}
        files = [file for file in files if _is_text(file, notes)]
    if files:
        return files
    if is_directory:
        raise UserError(
            f"data.paths: {url} is a directory with no file that ends in one of {KNOWN}; give "
            "another, or convert its files"
        )
    raise UserError(
        f"data.paths: no file matches {url}; correct the pattern (** descends into directories)"
    )


def _is_text(file: Remote, saved: Set[str]) -> bool:
    """Return whether a file in a directory is one of its texts, and no note of datasets' own."""
    if not is_known(file.name) or file.name.startswith("."):
        return False
    return not (is_note(file.name) and file.url.rpartition("/")[0] in saved)


def _filesystem(url: str) -> tuple[Any, str]:
    """Return the filesystem of an address, and the path in it."""
    import fsspec

    protocol = url.partition("://")[0]
    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = PACKAGES.get(protocol)
        remedy = f"pip install {package}" if package else f"install what it needs ({error})"
        raise UserError(f"data.paths: {url}: {protocol}:// is not installed; {remedy}") from None
    except ValueError as error:
        raise UserError(
            f"data.paths: {url}: {error}; give a path, or the address of a filesystem that fsspec "
            "knows (s3://, gs://, hf://, https://)"
        ) from None
    except Exception as error:  # no login, no such bucket
        raise Unreachable(url, error) from None
    return system, path


def _of_fsspec(system: Any, path: str, details: Mapping[str, Any]) -> Remote:
    url = system.unstrip_protocol(path)
    version = next((str(details[key]) for key in VERSIONS if details.get(key)), None)
    size = details.get("size")

    def opened(offset: int) -> Any:
        stream = system.open(path, "rb")
        if offset:
            stream.seek(offset)
        return stream

    return Remote(url, size, version, lambda: _buffered(url, size, opened))


def _of_http(url: str) -> Remote:
    headers = _headers(url)
    length = headers.get("Content-Length")
    size = None if length is None else int(length)
    version = headers.get("ETag") or headers.get("Last-Modified")

    def opened(offset: int) -> HTTPResponse:
        response = _requested(url, {"Range": f"bytes={offset}-"} if offset else {})
        found = response.headers.get("ETag") or response.headers.get("Last-Modified")
        if version is not None and found != version:
            response.close()
            raise Unreachable(url, ValueError("it was changed while it was read"))
        if offset and response.status != 206:  # it does not know ranges, and begins anew
            _passed_over(response, offset)
        return response

    return Remote(url, size, version, lambda: _buffered(url, size, opened))


def _headers(url: str) -> Mapping[str, str]:
    """Return what a server tells of a file, asked again as it is where it is to be read."""
    import http.client
    import urllib.error

    for number in range(TRIES):
        try:
            for method in ("HEAD", "GET"):
                try:
                    with _requested(url, {}, method) as response:
                        return response.headers
                except urllib.error.HTTPError as error:
                    if method == "GET" or error.code not in (403, 405, 501):
                        raise
        except urllib.error.HTTPError as error:
            if error.code in (404, 410):
                raise UserError(f"data.paths: {url} does not exist; correct the address") from None
            if error.code < 500 or number == TRIES - 1:
                raise Unreachable(url, error) from None
        except (OSError, http.client.HTTPException) as error:
            if number == TRIES - 1:
                raise Unreachable(url, error) from None
        time.sleep(WAIT_SECONDS * 2**number)
    raise AssertionError("the last try returns or raises")


def _requested(url: str, headers: Mapping[str, str], method: str = "GET") -> Any:
    # Brings HTTP, which a launcher of local files does not need.
    import urllib.request

    request = urllib.request.Request(
        url, headers={"User-Agent": "shardwright", **headers}, method=method
    )
    return urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)


def _passed_over(stream: Any, count: int) -> None:
    while count:
        found = len(stream.read(min(count, BUFFER_BYTES)))
        if not found:
            raise EOFError("it has become shorter")
        count -= found


def _buffered(url: str, size: int | None, opened: Callable[[int], Any]) -> IO[bytes]:
    return io.BufferedReader(_Stream(url, size, opened), BUFFER_BYTES)


class _Stream(io.RawIOBase):
    """Bytes of a remote file, opened again where the connection broke."""

    def __init__(self, url: str, size: int | None, opened: Callable[[int], Any]) -> None:
        self.url = url
        self.size = size
        self.opened = opened
        self.offset = 0
        self.stream: Any = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self.size is not None

    def tell(self) -> int:
        return self.offset

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if self.size is None:
            raise io.UnsupportedOperation(f"{self.url} has no length, and is read from its start")
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.offset, io.SEEK_END: self.size}[whence]
        if start + offset != self.offset:
            self._close_stream()
            self.offset = start + offset
        return self.offset

    def readinto(self, buffer: Any) -> int:
        if self.size is not None and self.offset >= self.size:
            return 0
        for number in range(TRIES):
            try:
                if self.stream is None:
                    self.stream = self.opened(self.offset)
                found = self.stream.read(len(buffer))
                if not found and self.size is not None:
                    raise EOFError(f"it ends there, of {self.size:,} bytes")
                buffer[: len(found)] = found
                self.offset += len(found)
                return len(found)
            except (UserError, FileNotFoundError, PermissionError) as error:
                self._close_stream()
                raise error if isinstance(error, UserError) else self._given_up(error) from None
            except Exception as error:  # filesystems' errors share no base class
                self._close_stream()
                if number == TRIES - 1:
                    raise self._given_up(error) from None
                time.sleep(WAIT_SECONDS * 2**number)
        raise AssertionError("the last try returns or raises")

    def close(self) -> None:
        self._close_stream()
        super().close()

    def _close_stream(self) -> None:
        if self.stream is not None:
            with contextlib.suppress(Exception):  # it is broken, or of no more use
                self.stream.close()
            self.stream = None

    def _given_up(self, error: Exception) -> Unreachable:
        return Unreachable(self.url, error, self.offset)
