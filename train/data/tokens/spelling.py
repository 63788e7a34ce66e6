"""What a trained tokenizer does before and after its model: normal forms, words, decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, assert_never

from shardwright.train.config import (
    ByteBpeTokenizer,
    UnigramTokenizer,
    WordPieceTokenizer,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Trained = ByteBpeTokenizer | WordPieceTokenizer | UnigramTokenizer
CONTINUES = "##"
"""Begins the tokens of a WordPiece that do not begin a word."""
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SHORT}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SHORT}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The words of tiktoken's encodings, without possessive quantifiers, which change no match."""


class Spelling(NamedTuple):
    """What surrounds a model, as objects of tokenizers'."""

    normalizer: Any
    """None where text is taken as it is."""
    pre_tokenizer: Any
    decoder: Any

    def around(self, model: Any) -> Tokenizer:
        """Return a tokenizer of a model."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer(model)
        if self.normalizer is not None:
            tokenizer.normalizer = self.normalizer
        tokenizer.pre_tokenizer = self.pre_tokenizer
        tokenizer.decoder = self.decoder
        return tokenizer


def spelling_of(settings: Trained) -> Spelling:
    """Return what surrounds the model that settings ask for."""
    from tokenizers import pre_tokenizers

    words, decoder = _words(settings)
    if settings.split_digits:
        digits = pre_tokenizers.Digits(individual_digits=True)
        # What the byte level writes for a byte is no digit any more.
        both = [digits, words] if settings.kind == "byte_bpe" else [words, digits]
        words = pre_tokenizers.Sequence(both)
    return Spelling(_normalizer(settings), words, decoder)


def byte_level_words(kind: str) -> Any:
    """Return a pre-tokenizer into words of bytes."""
    from tokenizers import Regex, pre_tokenizers

    if kind == "gpt2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    pattern = Regex({"cl100k": CL100K, "o200k": O200K}[kind])
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _words(settings: Trained) -> tuple[Any, Any]:
    """Return the pre-tokenizer and the decoder that belongs to it."""
    from tokenizers import decoders, pre_tokenizers

    match settings:
        case ByteBpeTokenizer():
            return byte_level_words(settings.pre_tokenizer), decoders.ByteLevel()
        case WordPieceTokenizer():
            splits: Any = pre_tokenizers.WhitespaceSplit()
            if settings.pre_tokenizer == "bert":
                splits = pre_tokenizers.BertPreTokenizer()
            return splits, decoders.WordPiece(prefix=CONTINUES)
        case UnigramTokenizer():
            # "first": what follows a mask, or another special token, is not always a word.
            spaces: Any = pre_tokenizers.Metaspace(prepend_scheme="first")
            if settings.pre_tokenizer == "metaspace_punctuation":
                both = [spaces, pre_tokenizers.Punctuation("isolated")]
                spaces = pre_tokenizers.Sequence(both)
            back = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
            return spaces, decoders.Sequence(back)
    assert_never(settings)


def _normalizer(settings: Trained) -> Any:
    from tokenizers import normalizers

    form = settings.normalizer
    steps: list[Any] = []
    if settings.kind == "wordpiece" and settings.pre_tokenizer == "bert":
        cleans = {"clean_text": True, "handle_chinese_chars": True}
        steps.append(normalizers.BertNormalizer(**cleans, strip_accents=False, lowercase=False))
    forms = {"nfc": normalizers.NFC, "nfd": normalizers.NFD}
    forms |= {"nfkc": normalizers.NFKC, "nfkd": normalizers.NFKD}
    if form != "none":
        steps.append(forms[form]())
    if settings.strip_accents:
        steps += [normalizers.NFD(), normalizers.StripAccents()]
        if form in ("nfc", "nfkc"):
            steps.append(normalizers.NFC())
    if settings.lowercase:
        steps.append(normalizers.Lowercase())
    return normalizers.Sequence(steps) if len(steps) > 1 else next(iter(steps), None)
