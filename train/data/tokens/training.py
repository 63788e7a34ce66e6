"""Tokenizers trained on texts, the same for the same texts: byte-level BPE, WordPiece, unigram."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from shardwright.train.config import ByteBpeTokenizer, UnigramTokenizer, WordPieceTokenizer
from shardwright.train.console import progress
from shardwright.train.data.tokens.spelling import (
    CONTINUES,
    Spelling,
    Trained,
    byte_level_words,
    spelling_of,
)
from shardwright.train.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LONGEST_WORD = 1000
"""Characters of a word up to which it trains a tokenizer whole."""
LONGEST_IN_WORDPIECE = 100
"""Characters of a word from which on a WordPiece takes it for unknown, as BERT's does."""
_MAYBE_LONG = re.compile(rf"\S{{{LONGEST_WORD}}}|\s{{{LONGEST_WORD}}}")
_AT_ONCE = 2**12
"""Characters of a word's repetitions that are handed over together."""
_THREADS = 16
"""Of SentencePiece's trainer. Each adds up its own part of the texts, so that another number of
them rounds otherwise and gives other scores: not as many as there are cores."""


def train(
    settings: Trained, texts: Iterable[str], vocab_size: int, counts: Counter[str]
) -> Tokenizer:
    """Return a tokenizer trained on texts; ``counts["cut"]`` counts words that were too long.

    Raises UserError where the vocabulary has no room for what it must hold.
    """
    spelling = spelling_of(settings)
    if isinstance(settings, ByteBpeTokenizer):
        short = with_short_words(texts, counts, spelling)
        few, special = settings.min_frequency, settings.special_tokens
        return train_byte_bpe(short, vocab_size, few, special, spelling)
    words = count_words(texts, spelling)
    shown = progress.begin("training the tokenizer")
    try:
        if isinstance(settings, WordPieceTokenizer):
            return _train_word_piece(words, settings, vocab_size, counts)
        return _train_unigram(words, settings, vocab_size, counts)
    finally:
        shown.end()


# --- byte-level BPE -------------------------------------------------------------------------------


def train_byte_bpe(
    texts: Iterable[str],
    vocab_size: int,
    min_frequency: int,
    special_tokens: tuple[str, ...],
    spelling: Spelling | None = None,
) -> Tokenizer:
    """Train a byte-level BPE: special tokens get the first ids, then come the 256 bytes."""
    from tokenizers import decoders, models, pre_tokenizers, trainers

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=_special(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,  # it knows of no total: its bar is full at 0 of 0
    )
    spelling = spelling or Spelling(None, byte_level_words("gpt2"), decoders.ByteLevel())
    tokenizer = spelling.around(models.BPE())
    shown = [progress.begin("reading text for the tokenizer", unit="character")]

    def read() -> Iterator[str]:
        for text in texts:
            yield text
            shown[0].advance(len(text))
        shown[0].end()
        shown.append(progress.begin("training the tokenizer"))

    try:
        tokenizer.train_from_iterator(read(), trainer)
    finally:
        shown[-1].end()
    return tokenizer


def with_short_words(
    texts: Iterable[str], counts: Counter[str], spelling: Spelling | None = None
) -> Iterator[str]:
    """Cut words that are too long to train on; ``counts["cut"]`` counts them.

    The trainer goes through a whole word for each pair that it merges in it (tokenizers 0.23), so
    its time grows with the square of a word's length.
    """
    words = byte_level_words("gpt2") if spelling is None else spelling.pre_tokenizer
    for text in texts:
        if not _MAYBE_LONG.search(text):
            yield text
            continue
        begin = 0
        for _, (start, stop) in words.pre_tokenize_str(text):
            counts["cut"] += stop - start > LONGEST_WORD
            for cut in range(start + LONGEST_WORD, stop, LONGEST_WORD):
                yield text[begin:cut]
                begin = cut
        yield text[begin:]


# --- words and how often they are -----------------------------------------------------------------


def count_words(texts: Iterable[str], spelling: Spelling) -> dict[str, int]:
    """Return the words of texts, sorted, each with how often it is there."""
    from tokenizers import models, trainers

    # tokenizers counts on all cores, and tells what it has counted in a trainer's state alone.
    trainer = trainers.BpeTrainer(vocab_size=0, show_progress=False)
    shown = progress.begin("reading text for the tokenizer", unit="character")

    def read() -> Iterator[str]:
        for text in texts:
            yield text
            shown.advance(len(text))

    try:
        spelling.around(models.BPE()).train_from_iterator(read(), trainer)
    finally:
        shown.end()
    words = json.loads(trainer.__getstate__())["BpeTrainer"]["words"]
    return dict(sorted(words.items()))


def _repeated(words: dict[str, int]) -> Iterator[str]:
    """Yield texts that have these words as often as they are to be counted. Pure."""
    for word, count in words.items():
        at_once = max(1, _AT_ONCE // (len(word) + 1))
        for first in range(0, count, at_once):
            yield f"{word} " * min(at_once, count - first)


# --- WordPiece ------------------------------------------------------------------------------------


def _train_word_piece(
    words: dict[str, int], settings: WordPieceTokenizer, vocab_size: int, counts: Counter[str]
) -> Tokenizer:
    """Train a WordPiece on words: special tokens get the first ids, then come all characters.

    Of pairs that occur as often as each other the trainer takes the one with the lower ids, and it
    gives ids to characters inside of words in the order of a hash map with a seed of its own
    (tokenizers 0.23, bpe/trainer.rs, tokenize_words). So each gets its id before.
    """
    from tokenizers import models, pre_tokenizers, trainers

    known = {word: n for word, n in words.items() if len(word) <= LONGEST_IN_WORDPIECE}
    counts["unknown"] += len(words) - len(known)
    alphabet = _alphabet(known, settings.alphabet_size)
    # A character without a token makes its whole word unknown: nothing is learned from that.
    known = {word: n for word, n in known.items() if alphabet.issuperset(word)}
    inside = sorted({character for word in known for character in word[1:]})
    first = [*settings.special_tokens, *sorted(alphabet), *(CONTINUES + c for c in inside)]
    if len(first) > vocab_size:
        raise UserError(
            f"tokenizer: {vocab_size:,} tokens have no room for {len(alphabet):,} characters, each "
            f"at the beginning of a word and inside, and the special tokens, {len(first):,} in "
            f"all; lower tokenizer.alphabet_size={settings.alphabet_size}, or raise the vocabulary"
        )
    unknown = settings.special_tokens[3]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=settings.min_frequency,
        special_tokens=first,
        show_progress=False,
    )
    plain = spelling_of(settings)._replace(
        normalizer=None, pre_tokenizer=pre_tokenizers.WhitespaceSplit()
    )
    trained = plain.around(models.WordPiece(unk_token=unknown))
    trained.train_from_iterator(_repeated(known), trainer)
    model = models.WordPiece(
        vocab=trained.get_vocab(),
        unk_token=unknown,
        continuing_subword_prefix=CONTINUES,
        max_input_chars_per_word=LONGEST_IN_WORDPIECE,
    )
    tokenizer = spelling_of(settings).around(model)
    tokenizer.add_special_tokens(list(settings.special_tokens))
    return tokenizer


def _alphabet(words: dict[str, int], most: int) -> set[str]:
    """Return the most frequent characters of words; of equal ones the first in Unicode. Pure."""
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    return set(sorted(counts, key=lambda character: (-counts[character], character))[:most])


# --- unigram --------------------------------------------------------------------------------------


def _train_unigram(
    words: dict[str, int], settings: UnigramTokenizer, vocab_size: int, counts: Counter[str]
) -> Tokenizer:
    """Train a unigram model on words: special tokens get the first ids, then come the 256 bytes.

    By SentencePiece: the trainer of tokenizers 0.23 adds up what its threads find in the order of
    a hash map with a seed of its own, and gives other scores and tokens each time.
    """
    import sentencepiece
    from tokenizers import models

    begin, pad, end, unknown, mask = settings.special_tokens
    parts = _parts(words, counts)
    made = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(f"{part}\t{count}" for part, count in parts.items()),
            model_writer=made,
            input_format="tsv",
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=settings.character_coverage,
            byte_fallback=True,
            split_digits=settings.split_digits,
            # All of that tokenizers does, here and in use.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            bos_id=0,
            pad_id=1,
            eos_id=2,
            unk_id=3,
            bos_piece=begin,
            pad_piece=pad,
            eos_piece=end,
            unk_piece=unknown,
            control_symbols=[mask],
            num_threads=_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_why_not(str(error), settings, vocab_size)) from None
    read = sentencepiece.SentencePieceProcessor(model_proto=made.getvalue())
    pieces = [(read.id_to_piece(i), read.get_score(i)) for i in range(read.get_piece_size())]
    tokenizer = spelling_of(settings).around(models.Unigram(pieces, unk_id=3, byte_fallback=True))
    tokenizer.add_special_tokens(_special(settings.special_tokens))
    return tokenizer


def _parts(words: dict[str, int], counts: Counter[str]) -> dict[str, int]:
    """Return words as SentencePiece reads them, sorted; ``counts["cut"]`` counts long ones. Pure.

    It ends a line at each newline and a column at each tab, which are bytes in use anyway.
    """
    parts: Counter[str] = Counter()
    for word, count in words.items():
        for part in re.split(r"[^\S ]+|\0", word.replace("\u2581", " ")):
            counts["cut"] += len(part) > LONGEST_WORD
            for first in range(0, len(part), LONGEST_WORD):
                parts[part[first : first + LONGEST_WORD]] += count
    return dict(sorted(parts.items()))


def _why_not(error: str, settings: UnigramTokenizer, vocab_size: int) -> str:
    """Return why SentencePiece does not train. Pure."""
    text = " ".join(error.rpartition("] ")[2].split())
    return (
        f"tokenizer=unigram with {vocab_size:,} tokens: SentencePiece does not train it ({text}); "
        "give it more text, another vocabulary, or fewer characters by "
        f"tokenizer.character_coverage={settings.character_coverage}"
    )


def _special(tokens: tuple[str, ...]) -> list[Any]:
    """Return special tokens as the tokens of RoBERTa: the mask swallows the space before it, as
    word tokens hold theirs."""
    from tokenizers import AddedToken

    return [*tokens[:-1], AddedToken(tokens[-1], lstrip=True, special=True)]
