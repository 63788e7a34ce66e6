"""What texts of a corpus are made of: documents, bytes, words, and those that come twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from shardwright.train.data.sources.corpus import Piece
from shardwright.train.data.tokens.duplicates import new_hash


@dataclass
class Texts:
    """Counts of the documents of a source that are trained on or held out."""

    documents: int = 0
    text_bytes: int = 0
    words: int = 0
    """What white space separates."""
    duplicates: int = 0
    """Documents that are the same, byte for byte, as one before them in any source."""
    duplicate_bytes: int = 0


def counted(
    pieces: Iterable[Piece], found: Sequence[Texts], known: set[bytes], *, unique: bool
) -> Iterator[Piece]:
    """Yield the pieces of documents, and count these in their sources' ``found``.

    ``known`` are hashes of documents before, and get those of these. With ``unique`` a document
    that is known is counted as a duplicate alone, and left out. A document is held whole.
    """
    document: list[Piece] = []
    for piece in pieces:
        document.append(piece)
        if not piece.ends:
            continue
        text = "".join(each.text for each in document)
        encoded = text.encode("utf-8", "surrogatepass")
        hasher = new_hash()
        hasher.update(encoded)
        counts, digest = found[piece.source], hasher.digest()
        if digest in known:
            counts.duplicates += 1
            counts.duplicate_bytes += len(encoded)
        if not (unique and digest in known):
            counts.documents += 1
            counts.text_bytes += len(encoded)
            counts.words += len(text.split())
            yield from document
        known.add(digest)
        document = []
