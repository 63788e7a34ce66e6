"""What can go of a cache: what a killed builder left, and what was not used for long."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import filelock

from shardwright.train.data.tokens import cache, uses
from shardwright.train.data.upkeep.target import KINDS, TOKENS, entries_of
from shardwright.train.process.alive import is_alive

SILENT_SECONDS = 86400.0
"""What another host has left is taken for left over once nothing in it was written for this long:
whether its builder lives does not show here."""
REMOVED = ".tmp-removed-"
"""In the name of what is being removed, so that it is taken for left over where that is stopped."""


class Found(NamedTuple):
    """Something in a cache that has a name of its own."""

    path: Path
    bytes: int
    used_at: float
    """Last use, in seconds since 1970; of what is left over the last writing."""
    is_left_over: bool = False
    """It is no entry, and will be none."""
    kept_for: str | None = None
    """Who uses it; None where nobody does."""


MayGo = Callable[[Path], bool]
BUILDING = "a process is building it"
OPEN = "a process has it open"


def look(root: Path, runs: Sequence[Path], may_go: MayGo = lambda _: False) -> list[Found]:
    """Return what there is in a cache, the one that was not used for longest first.

    ``runs`` are directories of runs that may have been begun before entries knew who uses them;
    one of which ``may_go`` is true does not keep its tokens.
    """
    found = []
    for kind in KINDS:
        for path in sorted((root / kind).glob("*")):
            if path.is_dir():
                with suppress(FileNotFoundError):  # gone in between
                    found.append(_look(path, runs, may_go))
    return sorted(found, key=lambda f: f.used_at)


def _look(path: Path, runs: Sequence[Path], may_go: MayGo) -> Found:
    name, _, rest = path.name.partition(".")
    size, written_at = measured(path)
    used_at = written_at
    try:
        if rest:
            kept_for = _builder_of(path, name, written_at)
        else:
            used_at = uses.last_use(path.parent, name) or written_at
            kept_for = user_of(path, runs, may_go)
    except PermissionError:
        kept_for = "it belongs to another user"
    return Found(path, size, used_at, rest.startswith("tmp-"), kept_for)


def measured(path: Path) -> tuple[int, float]:
    """Return the bytes of a directory's files, and when the last of them was written."""
    size, written_at = 0, path.stat().st_mtime
    for file in path.rglob("*"):
        with suppress(FileNotFoundError):
            status = file.lstat()
            size += 0 if file.is_dir() else status.st_size
            written_at = max(written_at, status.st_mtime)
    return size, written_at


def _builder_of(path: Path, name: str, written_at: float) -> str | None:
    """Return who may still be writing what is no entry (yet); None where nobody is.

    That is a temporary directory, or one of shards, which several hosts may fill.
    """
    with _building(path.parent, name) as is_mine:
        if not is_mine:
            return BUILDING
    of = path.name.partition(".tmp-")[2].removeprefix(REMOVED.removeprefix(".tmp-"))
    host, _, pid = of.rpartition("-")
    if host == socket.gethostname() and not (pid.isdigit() and is_alive(int(pid))):
        return None
    if time.time() - written_at < SILENT_SECONDS:
        return "it was written less than a day ago" + (f" by {host}" if host else "")
    return None


def user_of(entry: Path, runs: Sequence[Path], may_go: MayGo) -> str | None:
    """Return who uses an entry of the cache: a process now, or a run that is to open it again."""
    with uses.alone(entry.parent, entry.name) as is_alone:
        return _run_of(entry, runs, may_go) if is_alone else OPEN


def _run_of(entry: Path, runs: Sequence[Path], may_go: MayGo) -> str | None:
    if entry.parent.name != TOKENS:
        return None  # a run has its tokenizer by itself, and needs no download again
    here = socket.gethostname()
    noted = {user.run_dir: user.host for user in uses.users(entry.parent, entry.name)}
    for run_dir in (*noted, *runs):
        if entry.name in entries_of(run_dir):
            if not may_go(run_dir):
                return f"{run_dir} uses it"
        elif noted.get(run_dir, here) != here and not run_dir.parent.is_dir():
            return f"{run_dir} on {noted[run_dir]} may use it, and cannot be seen from here"
    return None


def chosen(
    found: Sequence[Found],
    *,
    now: float,
    older_than_seconds: float | None = None,
    max_bytes: int | None = None,
) -> list[Found]:
    """Return what is to be removed: what nobody uses, of that the longest unused first. Pure.

    All that is left over; what was not used for ``older_than_seconds``; and as much more as it
    takes for the cache to have ``max_bytes``.
    """
    free = [f for f in found if f.kept_for is None]
    removed = [
        f
        for f in free
        if f.is_left_over
        or (older_than_seconds is not None and now - f.used_at > older_than_seconds)
    ]
    left = sum(f.bytes for f in found) - sum(f.bytes for f in removed)
    for candidate in sorted(free, key=lambda f: f.used_at):
        if max_bytes is None or left <= max_bytes:
            break
        if candidate not in removed:
            removed.append(candidate)
            left -= candidate.bytes
    return sorted(removed, key=lambda f: f.used_at)


def remove(found: Found, runs: Sequence[Path], may_go: MayGo) -> str | None:
    """Remove something of a cache; return why not where somebody has begun to use it meanwhile.

    One rename takes its name, so that no other process sees half of it.
    """
    path, parent, name = found.path, found.path.parent, found.path.name.partition(".")[0]
    with _building(parent, name) as is_mine:
        if not is_mine:
            return BUILDING
        if path.name != name:
            away = _moved(path, name)
        else:
            with uses.alone(parent, name, create=True) as is_alone:
                user = _run_of(path, runs, may_go) if is_alone else OPEN
                if user is not None:
                    return user
                away = _moved(path, name)
                # Whoever waits for the lock on it sees that it is gone, and makes another one.
                uses.file_of(parent, name).unlink(missing_ok=True)
    shutil.rmtree(away)
    return None


def _moved(path: Path, name: str) -> Path:
    away = path.with_name(f"{name}{REMOVED}{socket.gethostname()}-{os.getpid()}")
    if away.exists():
        shutil.rmtree(away)
    os.rename(path, away)
    return away


@contextmanager
def _building(parent: Path, name: str) -> Iterator[bool]:
    """Give whether nobody builds an entry, and let nobody build it inside of the block."""
    lock = filelock.FileLock(cache.lock_of(parent, name))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
