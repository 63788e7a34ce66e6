"""Pack ids that are tokens already into token stores, framed as documents of text are."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shardwright.train.config import DataConfig
from shardwright.train.console import progress
from shardwright.train.data.sources.registry import source_of
from shardwright.train.data.sources.stores.ids import Ids
from shardwright.train.data.tokens.encoding import Packing
from shardwright.train.data.tokens.packing import store_name
from shardwright.train.data.tokens.store import StoreWriter
from shardwright.train.errors import UserError


def pack_given(data: DataConfig, packing: Packing, directory: Path) -> dict[str, int] | None:
    """Write the stores of a corpus of ids, and return counts; None where it is one of text."""
    source = source_of(data)
    parts = source.ids(packing.suffix[-1] if packing.suffix else None)
    if parts is None:
        return None
    return pack_ids(
        parts,
        len(source.weights),
        packing,
        directory,
        eval_fraction=data.eval_fraction,
        max_documents=data.max_documents,
    )


def pack_ids(
    parts: Iterable[Iterable[tuple[str, Ids]]],
    sources: int,
    packing: Packing,
    directory: Path,
    *,
    eval_fraction: float,
    max_documents: int | None,
) -> dict[str, int]:
    """Write a store for each part and split, as `pack` does; return counts.

    Each document gets what begins and ends one of the tokenizer's, where it does not have it.
    Raises UserError at an id that the tokenizer does not have.
    """
    counts: Counter[str] = Counter(documents=0, tokens=0, heldout_documents=0, heldout_tokens=0)
    with ExitStack() as opened:
        shown = opened.enter_context(progress.phase("copying tokens", unit="token"))
        writers = {
            (held_out, source): opened.enter_context(
                StoreWriter(
                    directory,
                    store_name(held_out, source),
                    packing.vocabulary_size,
                    words=False,
                    lines=False,
                    documents=packing.documents,
                )
            )
            for held_out in (False, True)
            for source in range(sources)
        }
        for source, held_out, piece in _framed(parts, packing, eval_fraction, max_documents):
            counts["heldout_documents" if held_out else "documents"] += piece.begins
            ends = [len(piece.ids)] if piece.ends else []
            writers[held_out, source].append(piece.ids, [], ends)
            shown.advance(len(piece.ids))
        for (held_out, _), writer in writers.items():
            counts["heldout_tokens" if held_out else "tokens"] += writer.token_count
    return dict(counts)


def _framed(
    parts: Iterable[Iterable[tuple[str, Ids]]],
    packing: Packing,
    eval_fraction: float,
    max_documents: int | None,
) -> Iterator[tuple[int, bool, Ids]]:
    """Yield the documents that have more than a frame, with where each goes. Pure."""
    prefix = np.asarray(packing.prefix, np.int64)
    suffix = np.asarray(packing.suffix, np.int64)
    count = 0
    held_out = False
    for source, documents in enumerate(parts):
        number = 0
        for where, piece in documents:
            number += piece.begins
            _check(piece, f"{where}, in document {number} of its path", packing.vocabulary_size)
            ids = piece.ids.astype(np.int64)
            if piece.begins:
                # What frames it is put around it anew, so that it is there once.
                if len(prefix) and np.array_equal(ids[: len(prefix)], prefix):
                    ids = ids[len(prefix) :]
                if piece.ends and np.array_equal(ids, suffix):
                    ids = ids[:0]
                if piece.ends and not len(ids):
                    continue
                if count == max_documents:
                    return
                count += 1
                held_out = _is_held_out(ids, eval_fraction)
                ids = np.concatenate([prefix, ids])
            if piece.ends and len(suffix) and not np.array_equal(ids[-len(suffix) :], suffix):
                ids = np.concatenate([ids, suffix])
            yield source, held_out, Ids(ids, piece.begins, piece.ends)


def _is_held_out(ids: NDArray[np.int64], fraction: float) -> bool:
    """Decide by a hash of its ids (of a long document: of its beginning) where a document goes."""
    digest = hashlib.blake2b(ids.astype("<u4").tobytes(), digest_size=8, person=b"held out")
    return int.from_bytes(digest.digest(), "big") < fraction * 2**64


def _check(piece: Ids, where: str, vocabulary_size: int) -> None:
    if not len(piece.ids):
        return
    low, high = int(piece.ids.min()), int(piece.ids.max())
    if low < 0 or high >= vocabulary_size:
        raise UserError(
            f"data.paths: {where}, is the id {low if low < 0 else high}, and those of the "
            f"tokenizer are 0 to {vocabulary_size - 1}; give the tokenizer that the ids are of, "
            "and the type of numbers that they are stored as (data.dtype)"
        )
