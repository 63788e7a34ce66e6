"""Tokenise a corpus into token stores, in batches: a small one here, a large one on all cores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Set
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from shardwright.train.console import progress
from shardwright.train.data.sources.corpus import Piece
from shardwright.train.data.tokens.encoding import Added, Encoder, Packing
from shardwright.train.data.tokens.store import StoreWriter
from shardwright.train.data.tokens.workers import encoded

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# An encoding takes a few hundred bytes a token, so this bounds memory, at about 100 MB.
BATCH_CHARACTERS = 2**20
BATCH_TEXTS = 4096
SIDE_BY_SIDE_FROM_CHARACTERS = 2**24
"""It takes seconds to get so far: as long as it takes to start other processes."""
MOST_PROCESSES = 32
"""That many keep one busy that reads the corpus and writes the stores."""


def store_name(held_out: bool, source: int) -> str:
    return f"{'heldout' if held_out else 'train'}-{source}"


def pack(
    pieces: Iterable[Piece],
    sources: int,
    tokenizer: Tokenizer,
    packing: Packing,
    directory: Path,
    cores: Set[int] = frozenset(),
) -> dict[str, int]:
    """Write a store for each source and split; return counts of documents and tokens.

    Of a large corpus batches are made into tokens on ``cores`` side by side, by a process on each;
    the stores do not depend on how many. Memory is bounded by a batch of pieces, in each process.
    """
    encoder = Encoder.of_corpus(tokenizer, packing)
    counts: Counter[str] = Counter(documents=0, tokens=0, heldout_documents=0, heldout_tokens=0)
    with ExitStack() as opened:
        shown = opened.enter_context(progress.phase("tokenising", unit="character"))
        writers = {
            (held_out, source): opened.enter_context(
                StoreWriter(
                    directory,
                    store_name(held_out, source),
                    packing.vocabulary_size,
                    packing.words,
                    lines=packing.by_line,
                    documents=packing.documents,
                    texts=held_out,
                )
            )
            for held_out in (False, True)
            for source in range(sources)
        }
        batches = _batches(_counted(pieces, counts), packing.by_line)
        for batch, added in _encoded(batches, encoder, cores):
            for key, tokens in added.items():
                writers[key].append(*tokens)
            for piece in batch:
                if piece.held_out:
                    writers[True, piece.source].add_text(piece.text, ends=piece.ends)
            shown.advance(sum(len(piece.text) for piece in batch))
        for (held_out, _), writer in writers.items():
            counts["heldout_tokens" if held_out else "tokens"] += writer.token_count
    return dict(counts)


def _counted(pieces: Iterable[Piece], counts: Counter[str]) -> Iterator[Piece]:
    for piece in pieces:
        counts["heldout_documents" if piece.held_out else "documents"] += piece.begins
        yield piece


def _encoded(
    batches: Iterator[list[Piece]], encoder: Encoder, cores: Set[int]
) -> Iterator[tuple[list[Piece], Added]]:
    characters = 0
    for batch in batches:
        yield batch, encoder.encode(batch)
        characters += sum(len(piece.text) for piece in batch)
        if characters >= SIDE_BY_SIDE_FROM_CHARACTERS and len(cores) > 1:
            yield from encoded(batches, encoder, sorted(cores)[:MOST_PROCESSES])


def _batches(pieces: Iterable[Piece], by_line: bool) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    characters = 0
    for piece in _by_line(pieces) if by_line else pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_TEXTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _by_line(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Cut documents into lines; a long line stays in pieces, and an empty one is left out."""
    blank, is_open = "", False  # what the last piece left of a line: space alone, or something
    for piece in pieces:
        if piece.begins:
            blank, is_open = "", False
        *lines, rest = piece.text.split("\n")
        for text, ends in [*((line, True) for line in lines), (rest, piece.ends)]:
            if is_open or text.strip():
                yield piece._replace(text=blank + text, begins=not is_open, ends=ends)
                blank, is_open = "", not ends
            else:
                blank = "" if ends else blank + text
