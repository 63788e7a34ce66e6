"""Which documents a run reads: config -> stream of text, with the held-out ones marked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from shardwright.train.config import DataConfig
from shardwright.train.config.data import DataSection, HubData, TextData
from shardwright.train.data.sources import filtering
from shardwright.train.data.sources.files.pieces import Text
from shardwright.train.data.sources.registry import source_of
from shardwright.train.data.sources.shards import Shard
from shardwright.train.data.sources.source import Reading
from shardwright.train.errors import UserError

ALL = 1.0
"""Share of documents that are held out of a set that is held out."""


class Piece(NamedTuple):
    """A document of a source, or one piece of a long one; its pieces follow one another."""

    text: str
    begins: bool
    ends: bool
    source: int
    held_out: bool


def check_corpus(data: DataConfig) -> None:
    """Raise UserError for what can be seen to be wrong with a corpus without reading it whole.

    Reads the beginning of each local file; downloads nothing.
    """
    source_of(data).check()
    filtering.check(data.filter)
    for name, of_set in named_sets(data).items():
        with named_as(name):
            source_of(of_set).check()


def located(data: DataConfig) -> DataConfig:
    """Return the section with every path in it absolute, as a new run keeps it."""
    found = with_sets_located(source_of(data).located())
    return found.model_copy(update={"filter": filtering.located(data.filter)})


def with_sets_located(data: DataConfig) -> DataConfig:
    """Return the section with the paths of the user's own held-out documents absolute."""
    paths = {
        name: source_of(of).located().paths[0]
        for name, of in named_sets(data).items()
        if isinstance(of, TextData)
    }
    return data.model_copy(update={"eval_paths": paths})


def named_sets(data: DataConfig) -> dict[str, TextData | HubData]:
    """Return for each of the user's own held-out sets a section that reads it, whole. Pure."""
    whole: dict[str, Any] = {
        "eval_paths": {},
        "max_documents": None,
        "eval_fraction": ALL,
        "filter": None,
    }
    found: dict[str, TextData | HubData] = {}
    if isinstance(data, HubData) and data.eval_split is not None:
        of_split = {**whole, "split": data.eval_split, "eval_split": None, "stages": ()}
        found[data.eval_split] = data.model_copy(update=of_split)
    shared = {name: getattr(data, name) for name in DataSection.model_fields} | whole
    if isinstance(data, TextData):
        own = ("text_field", "on_bad_document", "max_document_bytes")
        shared |= {name: getattr(data, name) for name in own}
    else:
        shared["text_field"] = getattr(data, "text_field", "text")
    return found | {
        # Not validated: no corpus of a run's own may be held out as a whole.
        name: TextData.model_construct(kind="text", paths=(path,), **shared)
        for name, path in data.eval_paths.items()
    }


def place_of(of_set: TextData | HubData) -> str:
    """Return where a held-out set is read, as data.json notes it. Pure."""
    return of_set.split if isinstance(of_set, HubData) else of_set.paths[0]


@contextmanager
def named_as(name: str) -> Iterator[None]:
    """Have a UserError name the set of held-out documents in the reading of which it is raised."""
    key = f"data.eval_paths.{name}"
    try:
        yield
    except UserError as error:
        text = str(error)
        if "data.split" in text:  # of a set of the hub
            text = text.replace("data.split", "data.eval_split")
        else:
            text = text.replace("data.paths", key) if "data.paths" in text else f"{key}: {text}"
        raise UserError(text) from None


def read_corpus(
    data: DataConfig, cache_dir: Path, reading: Reading | None = None
) -> Iterator[Piece]:
    """Yield the corpus in its fixed order, one piece in memory at a time.

    A document is a file, a row, or for ``kant`` a paragraph; under ``line_by_line`` the documents
    of a .txt and of a book are its lines. Those without any text are left out. ``cache_dir`` keeps
    downloads, ``reading`` is filled in on the way. Raises UserError at what cannot be read.
    """
    documents = 0
    reading = reading or Reading()
    texts = source_of(data).texts(cache_dir, reading)
    for piece in _pieces(enumerate(texts), data, reading):
        if piece.begins:
            if documents == data.max_documents:
                return
            documents += 1
        yield piece


def shards_of(data: DataConfig, cache_dir: Path) -> Sequence[Shard]:
    """Return units of the corpus whose pieces end to end are those of `read_corpus`.

    None where that cannot be: whoever counts all documents has to have read those before.
    """
    return () if data.max_documents is not None else source_of(data).shards(cache_dir)


def read_shard(
    data: DataConfig, shard: Shard, cache_dir: Path, reading: Reading
) -> Iterator[Piece]:
    """Yield what one of `shards_of` has of the corpus, as `read_corpus` would."""
    return _pieces(source_of(data).read(shard, cache_dir, reading), data, reading)


def _pieces(
    parts: Iterable[tuple[int, Iterable[Text]]], data: DataConfig, reading: Reading
) -> Iterator[Piece]:
    """Yield the documents of parts of a source that have any text, and say where each goes."""
    held_out = False
    for part, texts in parts:
        if data.filter is not None:
            texts = filtering.filtered(texts, data.filter, reading)
        for text, begins, ends, _ in texts:
            if begins:
                if ends and not text.strip():
                    continue
                held_out = is_held_out(text, data.eval_fraction)
            yield Piece(text, begins, ends, part, held_out)


def is_held_out(text: str, fraction: float) -> bool:
    """Decide by a hash of its text (of a long document: of its beginning) where a document goes.

    So the same text goes the same way wherever it turns up, and a grown corpus keeps its split.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"held out")
    return int.from_bytes(digest.digest(), "big") < fraction * 2**64


def source_weights(data: DataConfig) -> tuple[float, ...]:
    """Return for each part of a corpus how often its samples are seen in one epoch."""
    return source_of(data).weights


def corpus_identity(data: DataConfig, cache_dir: Path) -> dict[str, Any]:
    """Return what changes when any document of the corpus, or their order, does."""
    return {
        "kind": data.kind,
        "line_by_line": data.line_by_line,
        "max_documents": data.max_documents,
        "eval_fraction": data.eval_fraction,
        **filtering.identity(data.filter),
        **source_of(data).identity(cache_dir),
    }
