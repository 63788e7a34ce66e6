"""Tokenise a corpus into token stores, in batches: a small one here, a large one on all cores."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardwright.train.console import progress
from shardwright.train.data.sources.corpus import Piece
from shardwright.train.data.tokens.duplicates import (
    FILE,
    Recorder,
    copy_records,
    extend,
    first_ones,
)
from shardwright.train.data.tokens.encoding import Added, Encoder, Packing
from shardwright.train.data.tokens.processes import cores_for
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


class Stores:
    """The stores of some sources, training and held out, that are written side by side.

    A context manager.
    """

    def __init__(self, directory: Path, sources: Iterable[int], packing: Packing) -> None:
        with ExitStack() as opened:
            self.writers = {
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
                for source in sorted(sources)
            }
            self._closing = opened.pop_all()

    def append(self, batch: Iterable[Piece], added: Added) -> None:
        """Append what a batch of pieces has added."""
        for key, tokens in added.items():
            self.writers[key].append(*tokens)
        for piece in batch:
            if piece.held_out:
                self.writers[True, piece.source].add_text(piece.text, ends=piece.ends)

    def tokens(self, held_out: bool) -> int:
        return sum(w.token_count for (held, _), w in self.writers.items() if held == held_out)

    def counts(self, documents: Mapping[bool, int]) -> dict[str, int]:
        """Return what is kept beside the stores; ``documents`` are those held out, or not."""
        return {
            "documents": documents[False],
            "tokens": self.tokens(held_out=False),
            "heldout_documents": documents[True],
            "heldout_tokens": self.tokens(held_out=True),
        }

    def __enter__(self) -> Stores:
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.close()


def pack(
    pieces: Iterable[Piece],
    sources: int,
    tokenizer: Tokenizer,
    packing: Packing,
    directory: Path,
    cores: Set[int] = frozenset(),
    before: Sequence[Path] = (),
) -> dict[str, Any]:
    """Write a store for each source and split; return counts of documents and tokens, and what has
    encoded them.

    Of a large corpus batches are made into tokens on ``cores`` side by side, by a process on each;
    the stores do not depend on how many. Memory is bounded by a batch of pieces, in each process.
    """
    encoder = Encoder.of_corpus(tokenizer, packing)
    if not packing.unique:
        return _pack(pieces, sources, encoder, directory, cores)
    everything = directory / "everything"
    everything.mkdir()
    with Recorder(everything, by_line=packing.by_line) as recorder:
        all_of_it = _pack(recorder.passing(pieces), sources, encoder, everything, cores)
    counts = join_unique([everything], sources, packing, directory, before)
    shutil.rmtree(everything)
    return {**counts, "encoder": all_of_it["encoder"]}  # as where shards are joined


def join_unique(
    directories: Sequence[Path],
    sources: int,
    packing: Packing,
    target: Path,
    before: Sequence[Path] = (),
) -> dict[str, int]:
    """Write the stores that those in some directories are, end to end, without any duplicates.

    Nor with what is in entries of the cache that come ``before``, without any duplicates too.
    """
    documents: Counter[bool] = Counter()
    dropped: Counter[str] = Counter(documents=0, tokens=0)
    with ExitStack() as opened:
        stores = opened.enter_context(Stores(target, range(sources), packing))
        opened.enter_context(progress.phase("leaving out duplicates"))
        every_one = first_ones([*before, *directories])[len(before) :]
        recorded = opened.enter_context((target / FILE).open("wb"))
        for directory, kept in zip(directories, every_one, strict=True):
            copy_records(directory, kept, recorded)
            present = {path.stem for path in directory.iterdir()}
            for key, writer in stores.writers.items():
                if (name := store_name(*key)) in present:
                    count, left_out = extend(writer, directory, name, key, kept)
                    documents[key[0]] += count
                    dropped.update(left_out._asdict())
        return {
            **stores.counts(documents),
            "duplicates": dropped["documents"],
            "duplicate_tokens": dropped["tokens"],
        }


def _pack(
    pieces: Iterable[Piece], sources: int, encoder: Encoder, directory: Path, cores: Set[int]
) -> dict[str, Any]:
    packing = encoder.packing
    documents: Counter[bool] = Counter()
    with (
        Stores(directory, range(sources), packing) as stores,
        progress.phase("tokenising", unit="character") as shown,
    ):
        batches = batched(counted(pieces, documents), packing.by_line)
        for batch, added in _encoded(batches, encoder, cores):
            stores.append(batch, added)
            shown.advance(sum(len(piece.text) for piece in batch))
            tokens = stores.tokens(held_out=False) + stores.tokens(held_out=True)
            shown.counts = far(documents.total(), tokens)
        return {**stores.counts(documents), "encoder": encoder.note}


def far(documents: int, tokens: int) -> dict[str, int]:
    """Return what is counted besides, to say how far the work is. Pure."""
    return {"documents": documents, "tokens": tokens}


def counted(pieces: Iterable[Piece], documents: Counter[bool]) -> Iterator[Piece]:
    """Yield pieces; ``documents`` counts those that begin, held out and not."""
    for piece in pieces:
        documents[piece.held_out] += piece.begins
        yield piece


def _encoded(
    batches: Iterator[list[Piece]], encoder: Encoder, cores: Set[int]
) -> Iterator[tuple[list[Piece], Added]]:
    characters = 0
    for batch in batches:
        yield batch, encoder.encode(batch)
        characters += sum(len(piece.text) for piece in batch)
        if characters >= SIDE_BY_SIDE_FROM_CHARACTERS and len(cores) > 1:
            chosen = cores_for(sorted(cores), MOST_PROCESSES, has_filter=False)
            yield from encoded(batches, encoder, chosen)


def batched(pieces: Iterable[Piece], by_line: bool) -> Iterator[list[Piece]]:
    """Yield pieces, or their lines, by what is encoded at once."""
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
