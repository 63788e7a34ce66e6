"""An excerpt of a large corpus: the beginnings of files, or of ranges of them, all over it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from shardwright.train.config import DataConfig
from shardwright.train.data.sources.corpus import Piece, read_corpus, read_shard, shards_of
from shardwright.train.data.sources.shards import Shard, Span
from shardwright.train.data.sources.source import Reading

LEAST_PLACES = 16
"""In each source, where it has as many: neighbours in a corpus are alike."""


@dataclass
class Seen:
    """How much of a corpus was read."""

    text_bytes: int = 0
    places: int = 0
    """Files, or ranges of them, that were read or begun."""
    of_places: int | None = None
    """None of a corpus that is only read from its beginning on."""
    file_bytes: int | None = None
    """Of all files, as far as it is known."""
    is_whole: bool = True
    documents_cut: int = 0
    """That are longer than what was read of them."""


def excerpt(
    data: DataConfig, cache_dir: Path, most_bytes: int, reading: Reading, seen: Seen
) -> Iterator[Piece]:
    """Yield about ``most_bytes`` of a corpus's texts at most, in its order; fill in ``seen``.

    All of a smaller corpus, as `read_corpus` does. Of a larger one as many bytes of each source,
    from the beginnings of places that lie evenly in it; where it is only read from its beginning
    on, that. Raises UserError at what cannot be read.
    """
    spans = [span for shard in shards_of(data, cache_dir) for span in shard.spans]
    if not spans:
        yield from _beginning(read_corpus(data, cache_dir, reading), most_bytes, seen)
        return
    seen.of_places = len(spans)
    seen.file_bytes = sum(span.size_bytes for span in spans)
    for span, room in rooms(spans, most_bytes):
        seen.places += 1
        pieces = read_shard(data, Shard((span,)), cache_dir, reading)
        yield from _beginning(pieces, room, seen)
    seen.is_whole &= seen.places == seen.of_places


def rooms(spans: Sequence[Span], most_bytes: int) -> Iterator[tuple[Span, int]]:
    """Yield which spans are looked into, in their order, and how many bytes of each. Pure."""
    total = sum(span.size_bytes for span in spans)
    if total <= most_bytes:
        yield from _shared(spans, most_bytes)
        return
    sources = [list(found) for _, found in groupby(spans, key=lambda span: span.part)]
    share = most_bytes // len(sources)
    for of_source in sources:
        size = sum(span.size_bytes for span in of_source)
        wanted = max(LEAST_PLACES, -(-share * len(of_source) // max(1, size)))
        count = min(wanted, len(of_source))
        evenly = [of_source[i * len(of_source) // count] for i in range(count)]
        yield from _shared(evenly, share)


def _shared(spans: Sequence[Span], most_bytes: int) -> Iterator[tuple[Span, int]]:
    """Yield each span with its share by its size; of equal ones where no size is known."""
    total = sum(span.size_bytes for span in spans)
    for span in spans:
        part = span.size_bytes * most_bytes // total if total else most_bytes // len(spans)
        yield span, max(1, part)


def _beginning(pieces: Iterator[Piece], most_bytes: int, seen: Seen) -> Iterator[Piece]:
    """Yield pieces until they have more than so many bytes; the last one ends its document."""
    left = most_bytes
    for piece in pieces:
        size = len(piece.text.encode("utf-8", "surrogatepass"))
        left -= size
        seen.text_bytes += size
        if left >= 0:
            yield piece
            continue
        seen.documents_cut += not piece.ends
        seen.is_whole &= piece.ends and next(pieces, None) is None
        yield piece._replace(ends=True)
        return
