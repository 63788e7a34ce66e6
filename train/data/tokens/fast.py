"""A faster encoder, gigatoken, where it is proven to give the very ids that tokenizers gives."""

from __future__ import annotations

import json
import re
import unicodedata
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardwright.train.data.tokens.words import CODE_POINTS, ByteWords, Encoded, code_points

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from tokenizers import Tokenizer

    Encode = Callable[[Sequence[str]], Iterator[Encoded]]

SAMPLE_TEXTS = 128
SAMPLE_CHARACTERS = 2**17
"""Of a corpus's first batch that both encode; with where words begin it is a second's work."""
RENEWED_AFTER_BYTES = 2**25
"""Of text, after which an encoder is replaced: gigatoken 0.10 remembers each word that it met
forever, in up to nine bytes of memory for each of text."""
HOSTILE = (
    "",
    " ",
    "\0",
    "a\0b  \0\0",
    "  \r",
    "   a  \n",
    "\r\n\r\n \t\x0b\x0c\x1c\x1d a\x85b\u2028c\u00a0 d\u3000e",
    "it's we'll 'S 'S's DON'T don't ''s '  're'd've'llama 'mind !'s \n's  's",
    "x" * 3000 + " " * 3000 + "\n" * 1000 + "7" * 1000 + "'" * 1000,
    "1234567890 3.14159 1,000,000 \u0661\u0662\u0663 \u00bd\u00b2\u2460",
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd \u0645\u0631\u062d\u0628\u0627 "
    "\u202bright\u202c \u200f\u0644\u0627",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001fae8a\U0001f1e9\U0001f1ea\u2764\ufe0f",
    "e\u0301 \u00e9 \u1e9b\u0323 \ufb01 I\u0307 \u0130i \u00df \u212b a\u0300\u0316b \u0344",
    "\u6f22\u5b57\u304b\u306a \u30ab\u30ca\uff21\uff11 \ud55c\uad6d\uc5b4 "
    "\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22 \u0939\u093f\u0928\u094d\u0926\u0940",
    "\ufeffa\ufeffb \ufffd\uffff \U0010ffff \ue000 \U000e0001 \u00ad\u200b",
    "if (a[i] != b[j]) { return f(x)->y::z; }  // \t#!/bin/sh\n\n\n    else:\n",
    "http://a.b/c?d=e&f=%20 user@example.org __init__ CamelCase snake_case \u2581a \u0120b",
)
"""Where encoders differ if they do."""
COMPARED_ON = (
    f"{len(HOSTILE)} texts of its own, those around special tokens, {SAMPLE_TEXTS} and more of the "
    "first batch of each process where it has so many, and each character"
)
PROBES = ("a{0}b{0}{0}1{0}2", " {0} {0}a", "{0}!{0}.", "\n{0}\n", "'{0}s{0}", "{0}")
"""What a character is compared in."""
_COMBINED = {"Mn", "Mc", "Me", "Cn"}
"""Marks, and what may be one in another version of Unicode."""


class Unfit(Exception):
    """Why the fast encoder is not used."""


class Proof(NamedTuple):
    """What a fast encoder was compared on."""

    encoder: str
    texts: int


class Fast:
    """Encodes as tokenizers does: what it is not known to encode alike goes to ``plain``.

    Besides a sample of the corpus each character is compared, where it first occurs, among letters,
    digits, signs and white space: versions of Unicode differ in what they take a character for. A
    text with one that makes a difference goes to ``plain``, as does one with the text of an added
    token, which the fast encoder is not told of, and under Unicode's normal forms one with marks.
    """

    def __init__(self, tokenizer: Tokenizer, plain: Encode, words: bool) -> None:
        """Raise Unfit where it cannot be had, or not for this tokenizer."""
        try:
            import gigatoken
        except ImportError:
            raise Unfit("gigatoken is not installed") from None
        self._load = gigatoken.Tokenizer.from_json
        tree = json.loads(tokenizer.to_str())
        self._added = _Added(tokenizer)
        # Its vocabulary stays; but as added tokens they would be looked for in texts.
        self._json = json.dumps({**tree, "added_tokens": [], "post_processor": None})
        self._words = ByteWords.of(tokenizer) if words else None
        if words and self._words is None:
            raise Unfit("only tokenizers tells where this tokenizer's words begin")
        self._plain = plain
        self._known = np.zeros(CODE_POINTS, bool)
        self._differing = np.zeros(CODE_POINTS, bool)
        self._any_differs = False
        self._composes = _composes(tree["normalizer"])
        self._backend: Any = None
        self._bytes = 0
        self._renew()

    @classmethod
    def proven(
        cls, tokenizer: Tokenizer, plain: Encode, words: bool, batch: Sequence[str]
    ) -> tuple[Fast, Proof]:
        """Return one that gave the same for a sample of a batch; raise Unfit where none does."""
        fast = cls(tokenizer, plain, words)
        texts = [*HOSTILE, *_around_special(tokenizer), *_sample(batch)]
        fast._meet(texts)
        if (codes := np.flatnonzero(fast._differing[:0x80])).size:
            raise Unfit(_differs(chr(codes[0])))
        texts = [text for text in texts if not fast._is_left(text)]
        for text, expected in zip(texts, plain(texts), strict=True):
            if not _same(fast._encoded(text), expected):
                raise Unfit(_differs(text))
        return fast, Proof(f"gigatoken {version('gigatoken')}", len(texts))

    def encode(self, texts: Sequence[str]) -> Iterator[Encoded]:
        """Yield what ``plain`` does of each text."""
        self._meet(texts)
        for text in texts:
            encoded = None if self._is_left(text) else self._encoded(text)
            yield next(self._plain([text])) if encoded is None else encoded

    def _meet(self, texts: Sequence[str]) -> None:
        """Compare characters that are new: whether both encoders take them for the same."""
        codes = code_points("".join(text for text in texts if not text.isascii()))
        codes = np.unique(codes[~self._known[codes]])
        if not self._known[0]:
            codes = np.union1d(codes, np.arange(0x80, dtype=np.uint32))
        if not len(codes):
            return
        probes = [(code, probe.format(chr(code))) for code in codes for probe in PROBES]
        probes = [(code, text) for code, text in probes if not self._added.are_in(text)]
        expected = self._plain([text for _, text in probes])
        for (code, text), tokens in zip(probes, expected, strict=True):
            self._differing[code] |= not _same(self._encoded(text), tokens)
        if self._composes:
            # What becomes of these depends on those beside them, too.
            marks = [code for code in codes if unicodedata.category(chr(code)) in _COMBINED]
            self._differing[marks] = True
        self._known[codes] = True
        self._any_differs = bool(self._differing.any())

    def _is_left(self, text: str) -> bool:
        """Whether a text is left to ``plain``."""
        if self._added.are_in(text):
            return True
        return self._any_differs and bool(self._differing[code_points(text)].any())

    def _encoded(self, text: str) -> Encoded | None:
        """Return what the fast encoder makes of a text; None where it fails."""
        if self._bytes >= RENEWED_AFTER_BYTES:
            self._renew()
        self._bytes += len(text) if text.isascii() else 3 * len(text)
        try:
            ids: NDArray[np.uint32] = self._backend.encode(text)
        except BaseException as error:
            _raise_if_not_its_own(error)
            self._renew()
            return None
        if self._words is None:
            return Encoded(ids, None)
        starts = self._words.starts(text, ids)
        return None if starts is None else Encoded(ids, starts)

    def _renew(self) -> None:
        self._backend = None  # not two in memory
        try:
            self._backend = self._load(self._json).backend
        except BaseException as error:
            _raise_if_not_its_own(error)
            raise Unfit(str(error).splitlines()[0]) from None
        self._bytes = 0


def _same(found: Encoded | None, expected: Encoded) -> bool:
    if found is None or not np.array_equal(found.ids, expected.ids):
        return False
    return found.word_starts is None or np.array_equal(
        found.word_starts, np.asarray(expected.word_starts)
    )


def _differs(text: str) -> str:
    return f"it gives other tokens than tokenizers for {text[:40]!r}"


def _sample(batch: Sequence[str]) -> list[str]:
    """Return texts from all over a batch, long ones from their beginning. Pure."""
    texts = batch[:: max(1, len(batch) // SAMPLE_TEXTS)]
    return [text[: SAMPLE_CHARACTERS // len(texts)] for text in texts]


def _around_special(tokenizer: Tokenizer) -> list[str]:
    """Return texts that hold the text of special tokens, all of which is plain text here."""
    names = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
    return [*(f"a {name}b{name} " for name in names[:SAMPLE_TEXTS]), "".join(names)]


def _composes(normalizer: dict[str, Any] | None) -> bool:
    """Whether a normalizer does more than to write some texts for others. Pure."""
    if normalizer is None:
        return False
    if normalizer["type"] == "Sequence":
        return any(map(_composes, normalizer["normalizers"]))
    return normalizer["type"] not in ("Prepend", "Replace")


class _Added:
    """Finds the text of added tokens that are no special ones, as tokenizers looks for it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = [t for t in tokenizer.get_added_tokens_decoder().values() if not t.special]
        self._normalizer = tokenizer.normalizer
        self._raw = _any_of(t.content for t in added if not t.normalized or not self._normalizer)
        self._normalized = _any_of(
            self._normalizer.normalize_str(t.content)
            for t in added
            if t.normalized and self._normalizer
        )

    def are_in(self, text: str) -> bool:
        if self._raw is not None and self._raw.search(text):
            return True
        if self._normalized is None:
            return False
        return bool(self._normalized.search(self._normalizer.normalize_str(text)))


def _any_of(texts: Iterable[str]) -> re.Pattern[str] | None:
    patterns = [re.escape(text) for text in texts]
    return re.compile("|".join(patterns)) if patterns else None


def _raise_if_not_its_own(error: BaseException) -> None:
    """Raise an error that is none of the library: a panic of its Rust is no Exception."""
    is_panic = type(error).__name__ == "PanicException"
    if isinstance(error, MemoryError) or not (is_panic or isinstance(error, Exception)):
        raise error
