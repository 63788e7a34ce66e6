"""How long the documents of token stores are, in memory that does not grow with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from shardwright.train.data.tokens.store import TokenStore

AT_ONCE = 2**20
"""Ends, or tokens, that are read together."""
BAR_WIDTH = 40
Key = TypeVar("Key")


@dataclass
class Lengths:
    """Counts of documents by their tokens, frames included."""

    documents: int = 0
    tokens: int = 0
    shortest: int = 0
    longest: int = 0
    by_power: Counter[int] = field(default_factory=Counter)
    """Documents of 2^k to 2^(k + 1) - 1 tokens, by k."""

    def add(self, lengths: NDArray[np.int64]) -> None:
        lengths = lengths[lengths > 0]
        if not len(lengths):
            return
        least = int(lengths.min())
        self.shortest = least if not self.documents else min(self.shortest, least)
        self.longest = max(self.longest, int(lengths.max()))
        self.documents += len(lengths)
        self.tokens += int(lengths.sum())
        powers, counts = np.unique(np.frexp(lengths)[1] - 1, return_counts=True)
        self.by_power.update(dict(zip(powers.tolist(), counts.tolist(), strict=True)))


class Between(NamedTuple):
    """What stands between two documents, and what no text spells."""

    suffix: tuple[int, ...]
    """Ids that end the first one."""
    prefix: tuple[int, ...]
    """Ids that begin the next one."""


def lengths_of(stores: Iterable[TokenStore], between: Between | None) -> Lengths | None:
    """Return the lengths of the documents in stores; None where it is not known where they end.

    ``between`` tells it where it is not kept.
    """
    found = Lengths()
    for store in stores:
        if not is_told(store, between):
            return None
        last = 0
        for ends in ends_of(store, between):
            found.add(np.diff(ends, prepend=last))
            last = int(ends[-1])
    return found


class Longest(NamedTuple):
    """A document, or line, of a store."""

    tokens: int
    """Its frame included."""
    number: int
    """Which one of its store's, from 0."""
    start: int
    """Of its tokens in the store."""


def longest_of(
    stores: Mapping[Key, TokenStore], between: Between | None, count: int
) -> list[tuple[Key, Longest]]:
    """Return the longest documents of stores, the longest first, of equal ones the first first.

    Those of stores of which it is not known where they end are left out.
    """
    found: list[tuple[Key, Longest]] = []
    for key, store in stores.items():
        number = last = 0
        for ends in ends_of(store, between) if is_told(store, between) else ():
            lengths = np.diff(ends, prepend=last)
            for place in np.argsort(-lengths, kind="stable")[:count].tolist():
                start = int(ends[place] - lengths[place])
                found.append((key, Longest(int(lengths[place]), number + place, start)))
            found = sorted(found, key=lambda one: -one[1].tokens)[:count]
            number, last = number + len(ends), int(ends[-1])
    return found


def is_told(store: TokenStore, between: Between | None) -> bool:
    """Return whether it is known where the documents of a store end."""
    return between is not None or store.line_ends is not None or store.document_ends is not None


def ends_of(store: TokenStore, between: Between | None) -> Iterator[NDArray[np.int64]]:
    """Yield where lines or documents of a store end, in order and in parts that are not empty."""
    kept = store.document_ends if store.line_ends is None else store.line_ends
    if kept is not None:
        for first in range(0, len(kept), AT_ONCE):
            yield np.asarray(kept[first : first + AT_ONCE])
        return
    assert between is not None, "it is told"
    count, overlap = len(store.tokens), len(between.suffix) + len(between.prefix) - 1
    for first in range(0, count, AT_ONCE):
        part = np.asarray(store.tokens[first : first + AT_ONCE + overlap])
        if len(ends := ends_in(part, between)):
            yield first + ends
    if count:
        yield np.array([count])


def ends_in(tokens: NDArray[Any], between: Between) -> NDArray[np.int64]:
    """Return where a document ends in some tokens and another begins. Pure."""
    ids = (*between.suffix, *between.prefix)
    places = len(tokens) - len(ids) + 1
    if places <= 0:
        return np.empty(0, dtype=np.int64)
    found = np.ones(places, dtype=bool)
    for offset, token in enumerate(ids):
        found &= tokens[offset : offset + places] == token
    return np.flatnonzero(found) + len(between.suffix)


def histogram(lengths: Lengths) -> Iterator[str]:
    """Yield a line for each power of two, with a bar. Pure."""
    if not lengths.documents:
        return
    most = max(lengths.by_power.values())
    for power in range(min(lengths.by_power), max(lengths.by_power) + 1):
        count = lengths.by_power[power]
        bar = "#" * (max(1, round(BAR_WIDTH * count / most)) if count else 0)
        low, high = 2**power, 2 ** (power + 1) - 1
        span = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        yield f"  {span:>22}  {count:>12,}  {bar}".rstrip()
