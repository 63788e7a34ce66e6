"""Tokenise a corpus into token stores, in batches, with the Rust tokenizer's threads."""

from __future__ import annotations

import json
import secrets
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shardwright.train.console import progress
from shardwright.train.data.sources.corpus import Piece
from shardwright.train.data.tokens.store import StoreWriter
from shardwright.train.data.tokens.tokenizer import whole_texts

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

# An encoding takes a few hundred bytes a token, so this bounds memory, at about 100 MB.
BATCH_CHARACTERS = 2**20
BATCH_TEXTS = 4096


@dataclass(frozen=True)
class Packing:
    """How documents become tokens."""

    vocabulary_size: int
    """Highest id plus one."""
    prefix: tuple[int, ...]
    """Ids that begin each document (each line, under ``by_line``)."""
    suffix: tuple[int, ...]
    """Ids that end it."""
    control: tuple[int, ...]
    """Ids that no text may spell, sorted."""
    words: bool
    """Keep where words begin."""
    by_line: bool
    """Keep where lines end, and leave out empty ones."""


@dataclass
class _Tokens:
    """What a batch adds to one store."""

    ids: list[int] = field(default_factory=list)
    word_starts: list[int] = field(default_factory=list)
    line_ends: list[int] = field(default_factory=list)


def store_name(held_out: bool, source: int) -> str:
    return f"{'heldout' if held_out else 'train'}-{source}"


def pack(
    pieces: Iterable[Piece],
    sources: int,
    tokenizer: Tokenizer,
    packing: Packing,
    directory: Path,
) -> dict[str, int]:
    """Write a store for each source and split; return counts of documents and tokens.

    Memory is bounded by a batch of pieces.
    """
    backend = _corpus_tokenizer(tokenizer, packing.control)
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
                    packing.by_line,
                )
            )
            for held_out in (False, True)
            for source in range(sources)
        }
        for batch in _batches(_counted(pieces, counts), packing.by_line):
            for key, added in _encode(batch, backend, packing).items():
                writers[key].append(added.ids, added.word_starts, added.line_ends)
            shown.advance(sum(len(piece.text) for piece in batch))
        for (held_out, _), writer in writers.items():
            counts["heldout_tokens" if held_out else "tokens"] += writer.token_count
    return dict(counts)


def word_starts(text: str, encoding: Encoding) -> list[int]:
    """Return 1 for each token that begins a word, else 0.

    A word is what the pre-tokenizer made one, or what white space sets apart: sentencepiece models
    often come without a pre-tokenizer that splits, and would be one word throughout.
    """
    words = np.array([-1 if word is None else word for word in encoding.word_ids])
    if not len(words):
        return []
    starts_at, ends_at = np.array(encoding.offsets).T
    ends_before = np.concatenate(([0], ends_at[:-1]))
    space = np.fromiter(map(str.isspace, text + "."), dtype=bool)
    # The space before a word either belongs to the word's first token or is in no token; and a
    # character of several bytes may be several tokens, all with its offsets.
    opens_with_space = space[starts_at] & ~space[starts_at - 1] & (starts_at >= ends_before)
    skips_space = space[ends_before] & ~space[ends_before - 1] & (starts_at > ends_before)
    new_word = np.diff(words, prepend=-2) != 0
    return (new_word | opens_with_space | skips_space).astype(int).tolist()


def _corpus_tokenizer(tokenizer: Tokenizer, control: tuple[int, ...]) -> Tokenizer:
    """Return a copy to which "</s>" in a corpus is plain text, so none can fake a document end."""
    copy = whole_texts(tokenizer)
    added = copy.get_added_tokens_decoder()
    # One that only the file beside tokenizer.json calls special is looked for in texts, otherwise.
    copy.add_special_tokens([added[i].content for i in control if i in added])
    copy.encode_special_tokens = True
    # The model of a Unigram or WordLevel tokenizer knows them as words of their own, too.
    state = json.loads(copy.model.__getstate__())
    if _hide(state, {i: secrets.token_hex(16) for i in control}):
        model = type(copy.model)()
        model.__setstate__(json.dumps(state).encode())
        copy.model = model
    return copy


def _hide(model: dict[str, Any], names: Mapping[int, str]) -> bool:
    """Give tokens of a model's vocabulary other names; return whether there were any. Pure."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram: [token, score] by id
        known = [i for i in names if i < len(vocabulary)]
        for i in known:
            vocabulary[i][0] = names[i]
        return bool(known)
    hidden = {
        token: names[i]
        for token, i in vocabulary.items()
        if i in names and token != model.get("unk_token")
    }
    model["vocab"] = {hidden.get(token, token): i for token, i in vocabulary.items()}
    if "merges" in model:
        prefix = len(model.get("continuing_subword_prefix") or "")
        model["merges"] = [
            (first, second)
            for first, second in model["merges"]
            if not {first, second, first + second[prefix:]} & hidden.keys()
        ]
    return bool(hidden)


def _counted(pieces: Iterable[Piece], counts: Counter[str]) -> Iterator[Piece]:
    for piece in pieces:
        counts["heldout_documents" if piece.held_out else "documents"] += piece.begins
        yield piece


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


def _encode(
    batch: list[Piece], backend: Tokenizer, packing: Packing
) -> dict[tuple[bool, int], _Tokens]:
    # The fast way keeps neither offsets nor words.
    encode = backend.encode_batch if packing.words else backend.encode_batch_fast
    encodings = encode([piece.text for piece in batch], add_special_tokens=False)
    stores: defaultdict[tuple[bool, int], _Tokens] = defaultdict(_Tokens)
    for piece, encoding in zip(batch, encodings, strict=True):
        store = stores[piece.held_out, piece.source]
        before, after = packing.prefix * piece.begins, packing.suffix * piece.ends
        store.ids += [*before, *encoding.ids, *after]
        if packing.words:
            inside = word_starts(piece.text, encoding)
            store.word_starts += [*(1 for _ in before), *inside, *(1 for _ in after)]
        if packing.by_line and piece.ends:
            store.line_ends.append(len(store.ids))
    return stores
