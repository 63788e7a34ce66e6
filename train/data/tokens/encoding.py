"""Text into what the token stores get: token ids, where words begin, where texts end."""

from __future__ import annotations

import json
import logging
import secrets
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardwright.train.data.sources.corpus import Piece
from shardwright.train.data.tokens.fast import COMPARED_ON, Fast, Unfit
from shardwright.train.data.tokens.tokenizer import whole_texts
from shardwright.train.data.tokens.words import Encoded, word_starts

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)
PLAIN_CHARACTERS = 2**18
"""That many at once are encoded by tokenizers, whose encodings take hundreds of bytes a token."""


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
    documents: bool = False
    """Keep where documents end, which ids alone do not tell of every tokenizer."""
    unique: bool = False
    """Leave out documents of which there was the same before; needs ``ends``."""

    @property
    def ends(self) -> bool:
        """Whether it is kept where texts end."""
        return self.by_line or self.documents


@dataclass
class _Parts:
    """What pieces add to a store, in arrays, end to end."""

    ids: list[NDArray[np.uint32]] = field(default_factory=list)
    word_starts: list[NDArray[np.uint8]] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    count: int = 0

    def add(self, ids: NDArray[np.uint32], word_starts: NDArray[np.uint8] | None) -> None:
        self.ids.append(ids)
        if word_starts is not None:
            self.word_starts.append(word_starts)
        self.count += len(ids)

    def tokens(self) -> Tokens:
        return Tokens(
            np.concatenate([np.empty(0, np.uint32), *self.ids]),
            np.concatenate([np.empty(0, np.uint8), *self.word_starts]),
            np.array(self.ends, dtype=np.int64),
        )


class Tokens(NamedTuple):
    """What a batch adds to one store."""

    ids: NDArray[np.uint32]
    word_starts: NDArray[np.uint8]
    """1 where a token begins a word, else 0; of as many as there are ids, where they are kept."""
    ends: NDArray[np.int64]
    """Of lines or documents, where they are kept; counted from the first of these tokens."""


Added = dict[tuple[bool, int], Tokens]
"""What a batch adds, by store: whether it is held out, and its source."""


class Encoder:
    """Makes tokens of pieces of a corpus; it can be sent to another process.

    In each process its first batch decides whether a faster encoder, which is proven to give the
    same, does the rest.
    """

    def __init__(self, tokenizer: Tokenizer, packing: Packing) -> None:
        self.tokenizer = tokenizer
        self.packing = packing
        tokenizer.encode_special_tokens = True  # which does not travel to another process
        self._fast: Fast | None = None
        self._note: dict[str, Any] | None = None

    @classmethod
    def of_corpus(cls, tokenizer: Tokenizer, packing: Packing) -> Encoder:
        return cls(_corpus_tokenizer(tokenizer, packing.control), packing)

    def __reduce__(self) -> tuple[type[Encoder], tuple[Tokenizer, Packing]]:
        return Encoder, (self.tokenizer, self.packing)

    @property
    def note(self) -> dict[str, Any]:
        """Say what encodes, the same in each process; nothing before a first batch."""
        return self._note or {}

    def encode(self, batch: Sequence[Piece]) -> Added:
        """Return what a batch adds to the stores."""
        packing = self.packing
        texts = [piece.text for piece in batch]
        if self._note is None:
            self._choose(texts)
        encode = self._fast.encode if self._fast else self._plain
        before, after = (np.array(part, np.uint32) for part in (packing.prefix, packing.suffix))
        stores: defaultdict[tuple[bool, int], _Parts] = defaultdict(_Parts)
        for piece, encoded in zip(batch, encode(texts), strict=True):
            store = stores[piece.held_out, piece.source]
            if piece.begins and len(before):
                store.add(before, np.ones(len(before), np.uint8) if packing.words else None)
            store.add(*encoded)
            if piece.ends and len(after):
                store.add(after, np.ones(len(after), np.uint8) if packing.words else None)
            if packing.ends and piece.ends:
                store.ends.append(store.count)
        return {key: parts.tokens() for key, parts in stores.items()}

    def _choose(self, texts: Sequence[str]) -> None:
        plain = f"tokenizers {version('tokenizers')}"
        try:
            self._fast, proof = Fast.proven(self.tokenizer, self._plain, self.packing.words, texts)
            self._note = {"name": proof.encoder, "same_as": plain, "compared_on": COMPARED_ON}
            log.info("encoding with %s, %d texts compared with %s", *proof, plain)
        except Unfit as reason:
            self._note = {"name": plain, "because": str(reason)}

    def _plain(self, texts: Sequence[str]) -> Iterator[Encoded]:
        """Yield what tokenizers makes of each text."""
        words = self.packing.words
        # The fast way keeps neither offsets nor words.
        encode = self.tokenizer.encode_batch if words else self.tokenizer.encode_batch_fast
        for some in _groups(texts):
            encodings = encode(some, add_special_tokens=False)
            for text, encoding in zip(some, encodings, strict=True):
                ids = np.array(encoding.ids, dtype=np.uint32)
                yield Encoded(ids, word_starts(text, encoding) if words else None)


def _groups(texts: Sequence[str]) -> Iterator[list[str]]:
    """Yield texts by the some that are encoded at once. Pure."""
    some: list[str] = []
    characters = 0
    for text in texts:
        some.append(text)
        characters += len(text)
        if characters >= PLAIN_CHARACTERS:
            yield some
            some, characters = [], 0
    if some:
        yield some


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
