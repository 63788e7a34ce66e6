"""Whether entries of the cache are what was written: their hashes, and what arrays must be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from shardwright.train.data.tokens import cache
from shardwright.train.data.upkeep.target import KINDS, TOKENS, index_of
from shardwright.train.errors import UserError

AT_ONCE = 2**22
"""Elements of an array that are looked at together."""
TOKEN_TYPES = (".uint16", ".uint32")
END_TYPES = (".lines", ".documents")


class Verified(NamedTuple):
    """What was found of an entry."""

    entry: Path
    files: int
    bytes: int
    hashed: bool
    """False where its index is from before there were hashes: sizes alone were compared."""
    problems: list[str]
    """Each names a file."""


def entries(root: Path) -> Iterator[Path]:
    """Yield all entries of a cache, whole or not, but for those that are being built."""
    for kind in KINDS:
        for path in sorted((root / kind).glob("*")):
            if path.is_dir() and "." not in path.name:  # what is being built has more of a name
                yield path


def verify(
    entry: Path,
    vocabulary: int | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> Verified:
    """Read an entry whole and return what is wrong with it.

    ``vocabulary`` is one more than the highest id there may be, where the entry does not say it;
    ``advance`` is called with the bytes of each file when it has been read.
    """
    try:
        index = index_of(entry)
    except UserError as error:
        return Verified(entry, 0, 0, hashed=False, problems=[str(error)])
    hashes: dict[str, str] | None = index.get("hashes")
    vocabulary = index["details"].get("vocabulary_size", vocabulary)
    problems = []
    for name, size in sorted(index["files"].items()):
        path = entry / name
        try:
            found = path.stat().st_size
            if found != size:
                problems.append(f"{path} has {found:,} bytes instead of {size:,}")
            elif hashes is not None and cache.hash_of(path) != hashes.get(name):
                problems.append(f"{path} differs from what was written: its hash is another one")
        except FileNotFoundError:
            problems.append(f"{path} is missing")
        except OSError as error:
            problems.append(f"{path} cannot be read ({error.strerror})")
        advance(size)
    if not problems and entry.parent.name == TOKENS:
        problems += _arrays(entry, index["files"], vocabulary)
    sizes = index["files"].values()
    return Verified(entry, len(sizes), sum(sizes), hashes is not None, problems)


def _arrays(entry: Path, files: dict[str, Any], vocabulary: int | None) -> Iterator[str]:
    """Yield what is wrong with token stores whose sizes are right."""
    for name in sorted(files):
        path = entry / name
        if path.suffix in TOKEN_TYPES:
            tokens = files[name] * 8 // int(path.suffix[5:])
            yield from _ids(path, vocabulary)
            for suffix in END_TYPES:
                if (ends := path.with_suffix(suffix)).name in files:
                    yield from _ends(ends, tokens)
            words = path.with_suffix(".words")
            if words.name in files and files[words.name] != tokens:
                yield f"{words} is of {files[words.name]:,} tokens, and {path.name} has {tokens:,}"


def _ids(path: Path, vocabulary: int | None) -> Iterator[str]:
    import numpy as np

    if vocabulary is None:
        return
    first = 0
    for part in _parts(path, np.dtype(path.suffix[1:])):
        above = np.flatnonzero(part >= vocabulary)
        if len(above):
            place = int(above[0])
            yield (
                f"{path} has the id {int(part[place])} at token {first + place:,}, and the "
                f"tokenizer's highest is {vocabulary - 1}"
            )
            return
        first += len(part)


def _ends(path: Path, tokens: int) -> Iterator[str]:
    import numpy as np

    last = first = 0
    for part in _parts(path, np.dtype(np.int64)):
        wrong = np.flatnonzero(np.diff(part, prepend=last) < 0)
        if len(wrong):
            yield f"{path} does not ascend at number {first + int(wrong[0]):,}"
            return
        last, first = int(part[-1]), first + len(part)
    if last > tokens:
        yield f"{path} ends at token {last:,}, and there are {tokens:,}"


def _parts(path: Path, dtype: Any) -> Iterator[Any]:
    import numpy as np

    with path.open("rb") as file:
        while len(part := np.fromfile(file, dtype=dtype, count=AT_ONCE)):
            yield part
