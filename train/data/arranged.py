"""The samples of an entry of token stores, as a run's config has their documents packed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardwright.train.config import RunConfig, SpanCorruptionObjective

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardwright.train.data.batches.samples import Samples
    from shardwright.train.data.tokens.cache import Entry
    from shardwright.train.data.tokens.fitting import Share
    from shardwright.train.data.tokens.store import TokenStore

ROWS = "rows"
"""Folder of a cache that holds what best-fit packing has made of entries of token stores."""
LOOKED_AT = 2**28
"""Tokens whose documents are looked at for how many a sample's edge cuts: the first ones."""


def arranged(
    config: RunConfig, entry: Entry, length: int | None = None
) -> Callable[[str], Samples]:
    """Return what gives the samples of each store of an entry, by the store's name.

    They have data.sequence_length tokens, or, packed back to back, ``length``.

    Best-fit packing is done here, where it was not done before: it takes a second for half a
    million documents, and makes the same each time.
    """
    from shardwright.train.data.batches.fitted import FittedSamples
    from shardwright.train.data.batches.samples import Samples
    from shardwright.train.data.tokens.fitting import Rows
    from shardwright.train.data.tokens.store import TokenStore

    length, causal = length or config.data.tokens_per_sample, _is_causal(config)
    if config.data.packing == "concatenate":
        window = _window(config, length)
        return lambda name: Samples(TokenStore(entry.path, name), length, causal, window=window)
    rows = _rows(config, entry).path
    return lambda name: FittedSamples(
        TokenStore(entry.path, name), length, causal, Rows(rows, name)
    )


def _is_causal(config: RunConfig) -> bool:
    """Whether each token of a sample is predicted from those before it. Pure."""
    return not (config.objective.is_masked or config.objective.is_encoder_decoder)


def _window(config: RunConfig, length: int) -> int | None:
    """Return the tokens that samples of a length are cut from, where each is some of them. Pure."""
    objective = config.objective
    if isinstance(objective, SpanCorruptionObjective):
        return objective.counts(length).window
    return None


def share_of_cuts(
    config: RunConfig, entry: Entry, names: Sequence[str], suffix: tuple[int, ...]
) -> Share | None:
    """Return how many documents of some stores are cut, and how much of the samples is padding.

    ``suffix`` ends each document where their ends are not kept; no text spells it. None where a
    sample is a line.
    """
    from shardwright.train.data.batches.fitted import room_of
    from shardwright.train.data.tokens.fitting import Room, Share, share_of
    from shardwright.train.data.tokens.store import TokenStore

    length, causal = config.data.tokens_per_sample, _is_causal(config)
    if config.data.line_by_line:
        return None
    if config.data.packing == "best_fit":
        details = _rows(config, entry).details
        return share_of((details[name] for name in names), length, causal=causal)
    window = _window(config, length)
    room = room_of(length, causal=causal) if window is None else Room(window, 0)
    counted = [_cut(TokenStore(entry.path, name), suffix, room) for name in names]
    documents, longer, cut = (sum(numbers) for numbers in zip(*counted, strict=True))
    return Share(documents, longer, cut, padding=0.0)


def _rows(config: RunConfig, entry: Entry) -> Entry:
    """Return the entry of the cache with the rows of each store, fitting them if need be."""
    from shardwright.train.data.batches.fitted import room_of
    from shardwright.train.data.tokens import fitting
    from shardwright.train.data.tokens.cache import build_once, cache_root, fingerprint
    from shardwright.train.data.tokens.store import TokenStore

    length, causal = config.data.tokens_per_sample, _is_causal(config)
    room = room_of(length, causal=causal)
    what = {
        "format": fitting.FORMAT,
        "tokens": entry.path.name,
        "room": list(room),
        "limits": list(fitting.LIMITS),
    }

    def build(target: Path) -> dict[str, Any]:
        names = {path.stem for path in entry.path.glob("*.documents")}
        stores = {name: TokenStore(entry.path, name) for name in sorted(names)}
        return {
            name: list(fitting.write_rows(store, room, target, name))
            for name, store in stores.items()
        }

    return build_once(cache_root(config.data) / ROWS, fingerprint(what), build)


def _cut(store: TokenStore, suffix: tuple[int, ...], room: Any) -> tuple[int, int, int]:
    """Return how many documents the beginning of a store has, longer ones, and others that are cut.

    One is where no sample has all of its tokens. A causal sample has one more than it is long.
    """
    import numpy as np

    documents = longer = cut = begin = 0
    stride = room.tokens - room.overlap
    for ends in _ends(store, suffix):
        starts = np.concatenate(([begin], ends[:-1]))
        last = np.maximum(ends - 1 - room.overlap, starts)
        documents += len(ends)
        does_not_fit = ends - starts > room.tokens
        longer += int(does_not_fit.sum())
        cut += int(((starts // stride < last // stride) & ~does_not_fit).sum())
        begin = int(ends[-1])
        if begin >= LOOKED_AT:
            break
    return documents, longer, cut


def _ends(store: TokenStore, suffix: tuple[int, ...]) -> Iterator[Any]:
    """Yield where documents end, in parts that are not empty."""
    import numpy as np

    at_once, kept = 2**20, store.document_ends
    if kept is not None:
        for first in range(0, len(kept), at_once):
            yield _read(kept, first, at_once)
        return
    for first in range(0, len(store.tokens), at_once):
        part = _read(store.tokens, first, at_once + len(suffix) - 1)
        found = np.ones(len(part) - len(suffix) + 1, dtype=bool)
        for offset, token in enumerate(suffix):
            found &= part[offset : offset + len(found)] == token
        if len(ends := np.flatnonzero(found) + len(suffix)):
            yield first + ends


def _read(mapped: Any, first: int, count: int) -> Any:
    """Return values of a mapped file, without its pages becoming this process's memory."""
    import numpy as np

    if not isinstance(mapped, np.memmap):  # an empty file cannot be mapped
        return mapped[first : first + count]
    offset = first * mapped.itemsize
    return np.fromfile(str(mapped.filename), mapped.dtype, count, offset=offset)
