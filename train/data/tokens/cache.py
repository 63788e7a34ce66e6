"""Directories that are built once under a fingerprint, whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import filelock

from shardwright.train.config import DataConfig
from shardwright.train.data.tokens import uses
from shardwright.train.durable import flush, publish
from shardwright.train.errors import UserError

INDEX = "index.json"
SHARDS_SUFFIX = ".shards"
"""Of the directory beside an entry in which parts of it lie until it is whole."""
log = logging.getLogger(__name__)

NO_ROOM = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENOTDIR,
    errno.EEXIST,
}


class Entry(NamedTuple):
    """A whole directory of the cache, and what its builder said of it."""

    path: Path
    details: dict[str, Any]
    built: bool
    """By this call; otherwise it was there."""


def cache_root(data: DataConfig) -> Path:
    """Return the directory that holds tokens/, tokenizers/, downloads/ and compiled/."""
    return default_root() if data.cache_dir is None else Path(data.cache_dir).expanduser()


def default_root() -> Path:
    """Return the cache of runs that name none."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(user_cache) / "shardwright"


def fingerprint(value: Any) -> str:
    """Return a hash of a tree of plain values, as 32 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def hash_of(path: Path) -> str:
    """Return the hash of a file that an index keeps, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, new_hash).hexdigest()


def new_hash() -> Any:
    """Return what hashes the files of an entry."""
    return hashlib.blake2b(digest_size=16)


def find(parent: Path, name: str) -> Entry | None:
    """Return the entry of that name where there is a whole one, by the sizes of its files."""
    path = parent / name
    try:
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))
        whole = all((path / f).stat().st_size == size for f, size in index["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Entry(path, index["details"], built=False) if whole else None


def lock_of(parent: Path, name: str) -> Path:
    """Return the file whose lock is held by whoever builds an entry."""
    return parent / f"{name}.lock"


def take(parent: Path, name: str, run_dir: Path | None = None) -> Entry | None:
    """Return the entry of that name where there is a whole one, which this process then holds.

    ``run_dir`` is noted as a run that opens it again.
    """
    if not (parent / name).is_dir():
        return None
    uses.hold(parent, name, run_dir)
    return find(parent, name)


def build_once(parent: Path, name: str, build: Callable[[Path], dict[str, Any]]) -> Entry:
    """Return the entry of that name, letting ``build`` fill it where there is no whole one.

    Of several processes on a node one builds while the others wait. ``build`` gets an empty
    directory with a temporary name and returns details (plain values) to keep. The index is
    written last and one rename publishes all, so what a crash leaves behind is never taken for an
    entry; the next builder removes it. This process holds the entry until it ends. Raises UserError
    where the disk does not let it.
    """
    if entry := take(parent, name):
        return entry
    try:
        parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(lock_of(parent, name))
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            log.info("waiting for another process that prepares %s", parent / name)
            lock.acquire()
        try:
            entry = take(parent, name) or _build(parent, name, build)
            uses.hold(parent, name)
            return entry
        finally:
            lock.release()
    except OSError as error:
        if error.errno not in NO_ROOM and parent.is_dir():
            raise
        raise UserError(
            f"data.cache_dir: cannot write {parent / name} ({error.strerror}); "
            "set data.cache_dir to a directory with room that you may write to"
        ) from None


def remove_leftovers(root: Path, pid: int) -> None:
    """Remove what a builder of this host, which is dead, has left below a cache's root.

    The shards that are whole stay, for whoever builds it next.
    """
    for pattern in ("*/*", f"*/*{SHARDS_SUFFIX}/*"):
        for path in root.glob(f"{pattern}.tmp-{builder(pid)}"):
            shutil.rmtree(path, ignore_errors=True)


def builder(pid: int) -> str:
    """Return what the temporary names of a process of this host end in."""
    return f"{socket.gethostname()}-{pid}"


def _build(parent: Path, name: str, build: Callable[[Path], dict[str, Any]]) -> Entry:
    # Only the lock's holder writes these, so whatever is there was left by a crash.
    for stale in parent.glob(f"{name}.tmp-*"):
        shutil.rmtree(stale)
    if (parent / name).exists():
        shutil.rmtree(parent / name)
    temporary = parent / f"{name}.tmp-{builder(os.getpid())}"
    temporary.mkdir()
    try:
        details = build(temporary)
        files = sorted(p for p in temporary.iterdir())
        for path in files:
            flush(path)
        index = {
            "files": {p.name: p.stat().st_size for p in files},
            "hashes": {p.name: hash_of(p) for p in files},
            "details": details,
        }
        (temporary / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
        flush(temporary / INDEX)
        publish(temporary, parent / name)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Entry(parent / name, details, built=True)
