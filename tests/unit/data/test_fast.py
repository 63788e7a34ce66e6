"""The fast encoder: the very tokens of tokenizers, word starts included, or not used at all."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from shardwright.train.data.sources.corpus import Piece
from shardwright.train.data.tokens import fast
from shardwright.train.data.tokens.encoding import Encoder, Packing, Tokens
from shardwright.train.data.tokens.fast import HOSTILE
from shardwright.train.data.tokens.training import train_byte_bpe

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
TEXT = [
    "The light dove, cleaving the air in her free flight, and feeling its resistance, might",
    "imagine that its flight would be still easier in empty space. It's what we'll say: don't",
    "def f(x):\n    return {x: 1}  # 123\n",
    "עולם مرحبا 漢字 émigré e\u0301 👩\u200d👧 naïve ½",
] * 40
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BY_BYTES = ("byte_bpe", "roberta", "trimming", "modernbert", "byte_fallback", "llama3")
NOT_FAST = ("unigram", "wordpiece", "wordlevel", "no_fallback", "no_regex")
FINDS_WORDS = ("byte_bpe", "roberta", "trimming", "modernbert")


@cache
def tokenizer(kind: str) -> Tokenizer:
    """Return a small trained tokenizer, whose ids 0 to 4 are special."""
    if kind in FINDS_WORDS:
        made = train_byte_bpe(TEXT, 500, 2, SPECIAL)
        if kind == "roberta":
            made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
        if kind == "trimming":
            made.post_processor = processors.ByteLevel(trim_offsets=True, add_prefix_space=False)
        if kind == "modernbert":
            made.normalizer = normalizers.NFC()
            made.add_tokens([AddedToken("   "), AddedToken("|||IP|||", normalized=False)])
        return made
    model, trainer, splits, normalizer = PARTS[kind]()
    made = Tokenizer(model)
    if splits is not None:
        made.pre_tokenizer = splits
    if normalizer is not None:
        made.normalizer = normalizer
    made.train_from_iterator(TEXT, trainer)
    return made


def bpe_trainer(alphabet: bool = True, **settings: Any) -> trainers.BpeTrainer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet()) if alphabet else []
    return trainers.BpeTrainer(
        **{"vocab_size": 500, "special_tokens": list(SPECIAL), **settings},
        initial_alphabet=letters,
        show_progress=False,
    )


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
PARTS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "byte_fallback": lambda: (
        models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True),
        bpe_trainer(
            alphabet=False,
            vocab_size=700,
            special_tokens=[*SPECIAL, *(f"<0x{i:02X}>" for i in range(256))],
            max_token_length=8,
        ),
        None,
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    ),
    "llama3": lambda: (
        models.BPE(),
        bpe_trainer(),
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES]),
        normalizers.NFC(),
    ),
    "no_regex": lambda: (models.BPE(), bpe_trainer(), BYTES, None),
    "no_fallback": lambda: (
        models.BPE(unk_token="<unk>"),
        bpe_trainer(alphabet=False),
        pre_tokenizers.Whitespace(),
        None,
    ),
    "unigram": lambda: (
        models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=200, special_tokens=list(SPECIAL), unk_token="<unk>", show_progress=False
        ),
        pre_tokenizers.Metaspace(),
        None,
    ),
    "wordpiece": lambda: (
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer(
            vocab_size=200, special_tokens=list(SPECIAL), show_progress=False
        ),
        pre_tokenizers.BertPreTokenizer(),
        normalizers.BertNormalizer(),
    ),
    "wordlevel": lambda: (
        models.WordLevel(unk_token="<unk>"),
        trainers.WordLevelTrainer(special_tokens=list(SPECIAL), show_progress=False),
        pre_tokenizers.Whitespace(),
        None,
    ),
}


def encoder(kind: str, words: bool) -> Encoder:
    packing = Packing(1000, (), (2,), (0, 1, 2, 3, 4), words, by_line=False, documents=True)
    return Encoder.of_corpus(tokenizer(kind), packing)


@cache
def chosen(kind: str, words: bool) -> Encoder:
    """Return an encoder that has seen its first batch."""
    made = encoder(kind, words)
    made.encode(documents(TEXT[:4]))
    return made


@cache
def plain(kind: str, words: bool) -> Encoder:
    """Return one that encodes with tokenizers, as where nothing faster is installed."""
    made = encoder(kind, words)
    with mock.patch.dict(sys.modules, gigatoken=None):
        made.encode(documents(TEXT[:4]))
    assert "is not installed" in made.note["because"]
    return made


def documents(texts: list[str]) -> list[Piece]:
    return [Piece(text, True, True, 0, False) for text in texts]


def assert_same(kind: str, texts: list[str], words: bool = False) -> None:
    found, expected = (of(kind, words).encode(documents(texts))[False, 0] for of in (chosen, plain))
    for name in Tokens._fields:
        a, b = getattr(found, name), getattr(expected, name)
        assert a.dtype == b.dtype
        assert a.tolist() == b.tolist()


# Characters that tokenizers disagree on are rare among all: mixed in are those that matter.
TEXTS = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
        st.text(" \n\t\r\0'", max_size=6),
        st.sampled_from(
            [*SPECIAL, "'s", "'ll", "'re", " 'd", "S'", "we", "12", "عل", "é", "e\u0301"]
        ),
        st.sampled_from(
            ["👩\u200d👧", "🫨", "\u3000", "\x1c", "\u00a0", "\x85", "\u017f", "½", "\ufeff"]
        ),
    ),
    max_size=12,
).map("".join)


@pytest.mark.parametrize("kind", [*BY_BYTES, *NOT_FAST])
@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
def test_tokens_of_any_text_are_those_of_tokenizers(kind: str, texts: list[str]) -> None:
    assert_same(kind, texts)


@pytest.mark.parametrize("kind", FINDS_WORDS)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
def test_words_of_any_text_begin_where_offsets_say(kind: str, texts: list[str]) -> None:
    assert_same(kind, texts, words=True)


@pytest.mark.parametrize("kind", [*BY_BYTES, *NOT_FAST])
@pytest.mark.parametrize("words", [False, True])
def test_an_encoder_says_what_it_is_and_on_how_much_it_was_compared(kind: str, words: bool) -> None:
    pytest.importorskip("gigatoken")
    note = chosen(kind, words).note
    if kind in (FINDS_WORDS if words else BY_BYTES):
        assert note["name"].startswith("gigatoken ")
        assert note["same_as"].startswith("tokenizers ")
        assert note["compared_on"].startswith(f"{len(HOSTILE)} texts")
    else:
        assert note["name"].startswith("tokenizers ")
        assert note["because"]
    if kind == "no_regex" and not words:
        # It splits all the same, and says nothing.
        assert "it gives other tokens than tokenizers for" in note["because"]
    assert_same(kind, [*HOSTILE, *TEXT[:4], "a </s> b<mask>"], words)


def test_an_encoder_that_takes_hostile_characters_for_others_is_used_without_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gigatoken = pytest.importorskip("gigatoken")
    load = gigatoken.Tokenizer.from_json

    def older(data: str) -> mock.Mock:
        backend = load(data).backend
        encode = lambda text: backend.encode(text.replace("\u05e9", "!"))  # noqa: E731
        return mock.Mock(backend=mock.Mock(encode=encode))

    assert any("\u05e9" in text for text in HOSTILE)
    monkeypatch.setattr(gigatoken.Tokenizer, "from_json", older)
    made = encoder("byte_bpe", words=False)
    texts = ["light", "a \u05e9 dove"]
    found = made.encode(documents(texts))[False, 0]
    expected = plain("byte_bpe", False).encode(documents(texts))[False, 0]
    assert made.note["name"].startswith("gigatoken ")
    assert found.ids.tolist() == expected.ids.tolist()


@pytest.mark.parametrize("kind", ["modernbert", "llama3"])
def test_marks_whose_order_versions_of_unicode_differ_on_are_left_to_tokenizers(kind: str) -> None:
    assert_same(kind, ["\U00016ff0\u0300", "\u0316\u089c", "a\u0300\u0316b"])


def test_a_character_that_encoders_differ_on_is_left_to_tokenizers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("gigatoken")
    made = encoder("byte_bpe", words=False)
    made.encode(documents(["light"]))
    assert made._fast is not None
    backend = made._fast._backend

    class Older:
        """Takes a letter that Unicode has had for long for none."""

        def encode(self, text: str) -> np.ndarray:
            return backend.encode(text.replace("ა", "!"))

    monkeypatch.setattr(made._fast, "_backend", Older())
    texts = ["light", "the ა dove", "flight"]
    found = made.encode(documents(texts))[False, 0]
    expected = plain("byte_bpe", False).encode(documents(texts))[False, 0]
    assert found.ids.tolist() == expected.ids.tolist()


def test_the_text_of_an_added_token_is_left_to_tokenizers() -> None:
    pytest.importorskip("gigatoken")
    made = Tokenizer.from_str(tokenizer("byte_bpe").to_str())
    made.add_tokens([AddedToken("<tool>", normalized=False, special=False)])
    packing = Packing(1000, (), (2,), (0, 1, 2, 3, 4), words=False, by_line=False)
    mixed = Encoder.of_corpus(made, packing)
    ids = mixed.encode(documents(["dove <tool> flight"]))[False, 0].ids.tolist()
    assert mixed.note["name"].startswith("gigatoken ")
    assert ids == [*made.encode("dove <tool> flight").ids, 2]
    assert made.token_to_id("<tool>") in ids


def test_an_encoder_is_replaced_before_it_remembers_too_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("gigatoken")
    monkeypatch.setattr(fast, "RENEWED_AFTER_BYTES", 1000)
    made = encoder("byte_bpe", words=False)
    made.encode(documents(["light"]))
    assert made._fast is not None
    loaded = mock.Mock(side_effect=made._fast._load)
    made._fast._load = loaded
    texts = ["the light dove " * 20] * 10
    found = made.encode(documents(texts))[False, 0]
    assert loaded.call_count in (2, 3)
    expected = plain("byte_bpe", False).encode(documents(texts))[False, 0]
    assert found.ids.tolist() == expected.ids.tolist()


def test_an_encoder_that_fails_leaves_the_text_to_tokenizers() -> None:
    pytest.importorskip("gigatoken")
    made = encoder("byte_bpe", words=False)
    made.encode(documents(["light"]))
    assert made._fast is not None

    class PanicException(BaseException):
        """As PyO3's."""

    made._fast._backend = mock.Mock(encode=mock.Mock(side_effect=PanicException("index")))
    texts = ["the light", "dove"]
    found = made.encode(documents(texts))[False, 0]
    expected = plain("byte_bpe", False).encode(documents(texts))[False, 0]
    assert found.ids.tolist() == expected.ids.tolist()


@pytest.mark.parametrize("words", [False, True])
def test_an_encoder_goes_to_another_process_and_chooses_again(words: bool) -> None:
    other = pickle.loads(pickle.dumps(chosen("byte_bpe", words)))
    assert other.note == {}
    texts = ["the light dove </s>", "flight's"]
    found = other.encode(documents(texts))[False, 0]
    assert other.note["name"] == chosen("byte_bpe", words).note["name"]
    expected = plain("byte_bpe", words).encode(documents(texts))[False, 0]
    assert found.ids.tolist() == expected.ids.tolist()
    assert found.word_starts.tolist() == expected.word_starts.tolist()
