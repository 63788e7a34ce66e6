"""Which files a path, a directory or a glob stands for."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from shardwright.train.data.sources.files import remote
from shardwright.train.data.sources.files.file import Remote, is_url
from shardwright.train.data.sources.files.formats import KNOWN, NOTES, is_known, is_note
from shardwright.train.errors import UserError


def is_glob(pattern: str) -> bool:
    """Whether a path is to be matched, and does not name one file outright."""
    if is_url(pattern):
        return remote.is_many(pattern)
    pattern = os.path.expanduser(pattern)
    # A name may hold a glob's characters and still be a file's; a directory stands for its files.
    return os.path.isdir(pattern) or (glob.has_magic(pattern) and not os.path.lexists(pattern))


def expand(pattern: str) -> Sequence[Path | Remote]:
    """Return the files that a path or glob names, sorted; raise UserError where there is none.

    A directory names those below it that are of a known format.

    A file that several links lead to is named once.
    """
    if is_url(pattern):
        return remote.expand(pattern)
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
    found = [path for path in matched if os.path.isfile(path) and _is_read(path)]
    if not found:
        raise UserError(
            f"data.paths: {directory} is a directory with no file that ends in one of "
            f"{KNOWN}; give another, or convert its files"
        )
    return list({os.path.realpath(path): path for path in reversed(found)}.values())[::-1]


def _is_read(path: str) -> bool:
    """Return whether a file that lies in a directory is one of its texts."""
    folder, name = os.path.split(path)
    if not is_known(name):
        return False
    return not (is_note(name) and os.path.exists(os.path.join(folder, NOTES[0])))


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


def check_overlap(
    patterns: Sequence[str], files_of: Callable[[str], Sequence[Path | Remote]] = expand
) -> None:
    """Raise UserError where a file is named by two patterns, and would be read twice."""
    named: dict[str, str] = {}
    for pattern in patterns:
        for path in files_of(pattern):
            real = os.path.realpath(path) if isinstance(path, Path) else str(path)
            other = named.setdefault(real, pattern)
            if other != pattern:
                raise UserError(
                    f"data.paths: {path} is named by {other} and by {pattern}, and would be read "
                    "twice; name it once, and use data.weights to see it more often"
                )


def file_at(name: str) -> Path | Remote:
    """Return the file of a name that `expand` gave."""
    return remote.file_of(name) if is_url(name) else Path(name)
