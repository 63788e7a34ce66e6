"""Where words begin among tokens, by offsets or, of a byte-level BPE, by ids alone."""

from __future__ import annotations

import json
import unicodedata
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tokenizers import Encoding, Tokenizer

CODE_POINTS = 0x110000
_LETTER, _DIGIT, _SPACE, _OTHER, _UNKNOWN = range(5)


class Encoded(NamedTuple):
    """The tokens of a text."""

    ids: NDArray[np.uint32]
    word_starts: NDArray[np.uint8] | None
    """1 where a token begins a word, else 0; None where they are not wanted."""


def word_starts(text: str, encoding: Encoding) -> NDArray[np.uint8]:
    """Return 1 for each token that begins a word, else 0.

    A word is what the pre-tokenizer made one, or what white space sets apart: sentencepiece models
    often come without a pre-tokenizer that splits, and would be one word throughout.
    """
    words = np.array([-1 if word is None else word for word in encoding.word_ids])
    if not len(words):
        return np.empty(0, np.uint8)
    starts_at, ends_at = np.array(encoding.offsets).T
    return _starts(np.diff(words, prepend=-2) != 0, starts_at, ends_at, code_points(text))


def code_points(text: str) -> NDArray[np.uint32]:
    """Return the characters of a text as numbers."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def _starts(
    new_word: NDArray[np.bool_],
    starts_at: NDArray[np.int64],
    ends_at: NDArray[np.int64],
    codes: NDArray[np.uint32],
) -> NDArray[np.uint8]:
    ends_before = np.concatenate(([0], ends_at[:-1]))
    space = np.append(_spaces()[codes], False)
    # The space before a word either belongs to the word's first token or is in no token; and a
    # character of several bytes may be several tokens, all with its offsets.
    opens_with_space = space[starts_at] & ~space[starts_at - 1] & (starts_at >= ends_before)
    skips_space = space[ends_before] & ~space[ends_before - 1] & (starts_at > ends_before)
    return (new_word | opens_with_space | skips_space).astype(np.uint8)


@cache
def _spaces() -> NDArray[np.bool_]:
    return np.fromiter((chr(i).isspace() for i in range(CODE_POINTS)), dtype=bool)


class ByteWords:
    """Finds where words begin in what a byte-level BPE with GPT-2's words made of a text.

    Its tokens are the text's bytes end to end, so their lengths tell where each lies; and words
    follow from kinds of characters, of which the pre-tokenizer itself tells, of each once.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        lengths: NDArray[np.int64],
        spaces: tuple[NDArray[np.int64], NDArray[np.int64]] | None,
        keeps_first: bool,
    ) -> None:
        self._pre_tokenizer = tokenizer.pre_tokenizer
        self._lengths = lengths
        self._spaces = spaces
        """How many spaces each token begins and ends with, where offsets leave them out."""
        self._normalizes = tokenizer.normalizer is not None
        self._keeps_first = keeps_first
        """Offsets do not leave out the one space at the beginning of a text."""
        self._kinds = np.full(CODE_POINTS, _UNKNOWN, np.uint8)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ByteWords | None:
        """Return one for a tokenizer whose words it knows, else None."""
        tree = json.loads(tokenizer.to_str())
        model, splits = tree["model"], tree["pre_tokenizer"] or {}
        after = tree["post_processor"] or {"type": None}
        plain = model["type"] == "BPE" and not model.get("continuing_subword_prefix")
        if not (
            plain
            and not model.get("end_of_word_suffix")
            and not model.get("byte_fallback")
            and (tree["normalizer"] or {"type": "NFC"})["type"] == "NFC"
            and splits.get("type") == "ByteLevel"
            and splits["use_regex"]
            and not splits["add_prefix_space"]
            and after["type"] in (None, "ByteLevel", "RobertaProcessing", "TemplateProcessing")
        ):
            return None
        trims = after.get("trim_offsets", False)
        lengths, before, behind = _shapes(model["vocab"])
        return cls(
            tokenizer,
            lengths,
            (before, behind) if trims else None,
            keeps_first=after.get("add_prefix_space", False),
        )

    def starts(self, text: str, ids: NDArray[np.uint32]) -> NDArray[np.uint8] | None:
        """Return what `word_starts` does of an encoding; None where the ids are of another text,
        as that of a text is which a normalizer changes."""
        if self._normalizes and not unicodedata.is_normalized("NFC", text):
            return None
        if not len(ids):
            return None if text else np.empty(0, np.uint8)
        codes = code_points(text)
        widths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
        first_bytes = np.cumsum(widths) - widths
        ends = np.cumsum(self._lengths[ids])
        if ends[-1] != widths.sum():
            return None
        begins = ends - self._lengths[ids]
        character = np.repeat(np.arange(len(codes)), widths)
        starts_at, ends_at = character[begins], character[ends - 1] + 1
        is_first = self._words_begin(codes)
        new_word = is_first[starts_at] & (first_bytes[starts_at] == begins)
        if new_word.sum() != is_first.sum():  # a token in two words
            return None
        starts_at, ends_at = self._trimmed(ids, starts_at, ends_at)
        return _starts(new_word, starts_at, ends_at, codes)

    def _trimmed(
        self, ids: NDArray[np.uint32], starts_at: NDArray[np.int64], ends_at: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return offsets as the post-processor leaves them."""
        if self._spaces is None:
            return starts_at, ends_at
        before, behind = (counts[ids] for counts in self._spaces)
        if self._keeps_first:
            # More than one cannot have been put before the text.
            before = np.where((starts_at == 0) & (before == 1), 0, before)
        starts_at = np.minimum(starts_at + before, ends_at)
        ends_at = np.where(ends_at >= behind, np.maximum(ends_at - behind, starts_at), ends_at)
        return starts_at, ends_at

    def _words_begin(self, codes: NDArray[np.uint32]) -> NDArray[np.bool_]:
        """Return for each character whether the pre-tokenizer begins a word there.

        Its words are runs of letters, of digits and of other signs, each with the one space before
        it, runs of white space, and 's 't 're 've 'm 'll 'd.
        """
        kinds = self._kinds_of(codes)
        begins = np.ones(len(codes), bool)
        begins[1:] = kinds[1:] != kinds[:-1]
        # Of white space the last character before a word is apart, or the word's if it is a space.
        after = 1 + np.flatnonzero((kinds[:-1] == _SPACE) & (kinds[1:] != _SPACE))
        begins[after - 1] = True
        begins[after] = codes[after - 1] != ord(" ")
        quotes = np.flatnonzero((codes == ord("'")) & begins)
        padded = np.append(codes, [0, 0])
        one, two = padded[quotes + 1], padded[quotes + 2]
        letters = np.isin(one, [ord(c) for c in "stmd"]).astype(np.int64)
        for first, second in ("re", "ve", "ll"):
            letters[(one == ord(first)) & (two == ord(second))] = 2
        quotes, letters = quotes[letters > 0], letters[letters > 0]
        begins[quotes + 1] = False
        behind = quotes + 1 + letters
        begins[behind[behind < len(codes)]] = True
        return begins

    def _kinds_of(self, codes: NDArray[np.uint32]) -> NDArray[np.uint8]:
        kinds = self._kinds[codes]
        if (kinds == _UNKNOWN).any():
            for code in np.unique(codes[kinds == _UNKNOWN]).tolist():
                self._kinds[code] = self._kind(chr(code))
            kinds = self._kinds[codes]
        return kinds

    def _kind(self, character: str) -> int:
        def is_whole(text: str) -> bool:
            assert self._pre_tokenizer is not None
            return len(self._pre_tokenizer.pre_tokenize_str(text)) == 1

        if is_whole("a" + character):
            return _LETTER
        if is_whole("1" + character):
            return _DIGIT
        return _OTHER if is_whole("!" + character) else _SPACE


def _shapes(
    vocabulary: Mapping[str, Any],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return of each token how many bytes it has, and spaces at its beginning and its end."""
    space = "Ġ"  # as the byte-level alphabet writes it, in which a byte is a character
    size = max(vocabulary.values(), default=-1) + 1
    lengths, before, behind = (np.zeros(size, np.int64) for _ in range(3))
    for token, i in vocabulary.items():
        lengths[i] = len(token)
        before[i] = len(token) - len(token.lstrip(space))
        behind[i] = len(token) - len(token.rstrip(space))
    return lengths, before, behind
