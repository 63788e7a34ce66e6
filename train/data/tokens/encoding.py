"""Text into what the token stores get: token ids, where words begin, where texts end."""

from __future__ import annotations

import json
import secrets
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardwright.train.data.sources.corpus import Piece
from shardwright.train.data.tokens.tokenizer import whole_texts

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer


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

    @property
    def ends(self) -> bool:
        """Whether it is kept where texts end."""
        return self.by_line or self.documents


@dataclass
class _Lists:
    ids: list[int] = field(default_factory=list)
    word_starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)


class Tokens(NamedTuple):
    """What a batch adds to one store."""

    ids: NDArray[np.uint32]
    word_starts: NDArray[np.uint8]
    """1 where a token begins a word, else 0; of as many as there are ids, where they are kept."""
    ends: NDArray[np.int64]
    """Of lines or documents, where they are kept; counted from the first of these tokens."""


Added = dict[tuple[bool, int], Tokens]
"""What a batch adds, by store: whether it is held out, and its source."""


@dataclass(frozen=True)
class Encoder:
    """Makes tokens of pieces of a corpus; it can be sent to another process."""

    tokenizer: Tokenizer
    packing: Packing

    @classmethod
    def of_corpus(cls, tokenizer: Tokenizer, packing: Packing) -> Encoder:
        return cls(_corpus_tokenizer(tokenizer, packing.control), packing)

    def encode(self, batch: Sequence[Piece]) -> Added:
        """Return what a batch adds to the stores."""
        backend, packing = self.tokenizer, self.packing
        backend.encode_special_tokens = True  # which does not travel to another process
        # The fast way keeps neither offsets nor words.
        encode = backend.encode_batch if packing.words else backend.encode_batch_fast
        encodings = encode([piece.text for piece in batch], add_special_tokens=False)
        stores: defaultdict[tuple[bool, int], _Lists] = defaultdict(_Lists)
        for piece, encoding in zip(batch, encodings, strict=True):
            store = stores[piece.held_out, piece.source]
            before, after = packing.prefix * piece.begins, packing.suffix * piece.ends
            store.ids += [*before, *encoding.ids, *after]
            if packing.words:
                inside = word_starts(piece.text, encoding)
                store.word_starts += [*(1 for _ in before), *inside, *(1 for _ in after)]
            if packing.ends and piece.ends:
                store.ends.append(len(store.ids))
        return {
            key: Tokens(
                np.array(lists.ids, dtype=np.uint32),
                np.array(lists.word_starts, dtype=np.uint8),
                np.array(lists.ends, dtype=np.int64),
            )
            for key, lists in stores.items()
        }


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
