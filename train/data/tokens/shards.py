"""Shards of a corpus as tokens: each written whole or not at all, and joined to its stores."""

from __future__ import annotations

import json
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from shardwright.train.config import DataConfig
from shardwright.train.data.sources.corpus import read_shard
from shardwright.train.data.sources.shards import Shard, size_wanted
from shardwright.train.data.sources.source import Reading
from shardwright.train.data.tokens import packing
from shardwright.train.data.tokens.cache import INDEX, SHARDS_SUFFIX, fingerprint, hash_of
from shardwright.train.data.tokens.duplicates import Recorder
from shardwright.train.data.tokens.encoding import Encoder, Packing
from shardwright.train.data.tokens.packing import (
    Stores,
    batched,
    counted,
    join_unique,
    store_name,
)
from shardwright.train.durable import flush, publish
from shardwright.train.process.alive import is_alive

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Work:
    """What is the same for all shards of a corpus; it can be sent to another process."""

    data: DataConfig
    cache_dir: Path
    tokenizer: Tokenizer
    packing: Packing
    directory: Path
    """Where shards lie until they are joined."""
    builder: str
    """Whose unfinished ones are whose: in their temporary names."""
    before: tuple[Path, ...] = ()
    """Entries of the cache whose documents are left out, where duplicates are."""


class Made(NamedTuple):
    """A shard that is whole."""

    counts: dict[str, int]
    reading: dict[str, Any]
    hashes: dict[str, str]
    """Of its stores' files, by name."""
    encoder: dict[str, Any]
    """What its encoder says of itself."""


Tell = Callable[[int, int, int], object]
"""Hears how many characters, documents and tokens of a shard there are so far."""


def directory_of(parent: Path, name: str) -> Path:
    """Return where the shards of an entry of the cache lie until that is whole."""
    return parent / f"{name}{SHARDS_SUFFIX}"


def path_of(directory: Path, number: int) -> Path:
    return directory / f"{number:06}"


def are_worth_processes(shards: Sequence[Shard], cores: Set[int], directory: Path) -> bool:
    """Whether processes are to share the shards of a corpus, whose result is the same.

    Where some lie in ``directory`` already. Else not of a small corpus; nor where most of them
    would wait for one that reads a huge file which is not divided: it can hand on what it reads.
    """
    sizes = [shard.size_bytes for shard in shards]
    total = sum(sizes)
    if len(sizes) > 1 and directory.is_dir():
        return True
    if len(sizes) < 2 or total < packing.SIDE_BY_SIDE_FROM_CHARACTERS:
        return False
    return len(sizes) >= len(cores) or max(sizes) <= 2 * size_wanted(total)


def make(work: Work, encoder: Encoder, number: int, shard: Shard, tell: Tell) -> Made:
    """Return a shard, having read and written it where it is not there whole."""
    final = path_of(work.directory, number)
    if found := find(final, shard, with_hashes=True):
        return found
    shutil.rmtree(final, ignore_errors=True)
    temporary = final.with_name(f"{final.name}.tmp-{work.builder}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        made = _write(work, encoder, shard, temporary, tell)
        index = {"shard": fingerprint(shard.described()), **made._asdict()}
        sizes = {name: (temporary / name).stat().st_size for name in made.hashes}
        (temporary / INDEX).write_text(json.dumps({**index, "files": sizes}), encoding="utf-8")
        for path in temporary.iterdir():
            flush(path)
        try:
            publish(temporary, final)
        except OSError:
            # Somebody else, as another node, may have made it meanwhile.
            if (found := find(final, shard)) is None:
                raise
            return found
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return made


def find(path: Path, shard: Shard, *, with_hashes: bool = False) -> Made | None:
    """Return a shard where it is whole and is of these very texts.

    By the sizes of its files, or by their hashes too.
    """
    try:
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))
        made = Made(*(index[field] for field in Made._fields))
        is_whole = index["shard"] == fingerprint(shard.described()) and all(
            (path / name).stat().st_size == size for name, size in index["files"].items()
        )
        if with_hashes and is_whole:
            is_whole = all(hash_of(path / name) == made.hashes[name] for name in made.hashes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return made if is_whole else None


def _write(work: Work, encoder: Encoder, shard: Shard, directory: Path, tell: Tell) -> Made:
    reading = Reading()
    documents: Counter[bool] = Counter()
    characters = 0
    settings = work.packing
    with ExitStack() as opened:
        parts = {span.part for span in shard.spans}
        stores = opened.enter_context(Stores(directory, parts, settings))
        pieces = read_shard(work.data, shard, work.cache_dir, reading)
        if settings.unique:
            recorder = Recorder(directory, by_line=settings.by_line)
            pieces = opened.enter_context(recorder).passing(pieces)
        for batch in batched(counted(pieces, documents), settings.by_line):
            stores.append(batch, encoder.encode(batch))
            characters += sum(len(piece.text) for piece in batch)
            tokens = stores.tokens(held_out=False) + stores.tokens(held_out=True)
            tell(characters, documents.total(), tokens)
        counts = stores.counts(documents)
    hashes = {path.name: hash_of(path) for path in sorted(directory.iterdir())}
    return Made(counts, vars(reading), hashes, encoder.note)


class Damaged(Exception):
    """A shard is not what was written."""

    def __init__(self, number: int) -> None:
        super().__init__(f"shard {number} is damaged")
        self.number = number


def join(
    directory: Path,
    made: Sequence[Made],
    sources: int,
    settings: Packing,
    target: Path,
    before: Sequence[Path] = (),
) -> dict[str, Any]:
    """Write the stores that all shards are, end to end; return what is kept beside them.

    A block of a file is in memory at a time. Raises `Damaged` where one has changed on the disk.
    """
    total = Reading()
    for shard in made:
        total.add(Reading(**shard.reading))
    encoder = made[0].encoder if made else {}
    if settings.unique:
        paths = [path_of(directory, number) for number in range(len(made))]
        for number, (path, shard) in enumerate(zip(paths, made, strict=True)):
            if any(hash_of(path / name) != kept for name, kept in shard.hashes.items()):
                raise Damaged(number)
        counts = join_unique(paths, sources, settings, target, before)
        return {**counts, "encoder": encoder, **vars(total)}
    documents: Counter[bool] = Counter()
    with Stores(target, range(sources), settings) as stores:
        for number, shard in enumerate(made):
            path = path_of(directory, number)
            hashes: dict[str, str] = {}
            for (held_out, source), writer in stores.writers.items():
                name = store_name(held_out, source)
                if any(file.startswith(f"{name}.") for file in shard.hashes):
                    hashes |= writer.extend(path, name)
            if hashes != shard.hashes:
                raise Damaged(number)
            documents[False] += shard.counts["documents"]
            documents[True] += shard.counts["heldout_documents"]
        return {**stores.counts(documents), "encoder": encoder, **vars(total)}


def remove_leftovers(directory: Path) -> None:
    """Remove what processes of this host, which are dead, have left of shards."""
    for path in directory.glob(f"*.tmp-{socket.gethostname()}-*"):
        with suppress(ValueError):
            if not is_alive(int(path.name.rpartition("-")[2])):
                shutil.rmtree(path, ignore_errors=True)


def counts_of(made: Mapping[int, Made]) -> tuple[int, int]:
    """Return the documents and tokens of shards. Pure."""
    counts = [shard.counts for shard in made.values()]
    return (
        sum(c["documents"] + c["heldout_documents"] for c in counts),
        sum(c["tokens"] + c["heldout_tokens"] for c in counts),
    )
