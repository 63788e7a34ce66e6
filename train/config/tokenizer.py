"""The section "tokenizer": one trained on the data, or a ready one."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from shardwright.train.config.section import PositiveInt, Section, Strings

BYTES = 256
SpecialTokens = Annotated[Strings, Field(min_length=5, max_length=5)]


class TrainedTokenizer(Section):
    """A tokenizer that is trained on the run's own training documents."""

    vocab_size: Annotated[int, Field(ge=261)] | None = None
    """Tokens, the special ones included; null is the model's vocabulary."""
    special_tokens: SpecialTokens
    """Beginning, padding, end, unknown, mask; they get the first ids in this order."""
    max_training_bytes: PositiveInt = 2**30
    """Train on this many bytes of text, the first ones. Each distinct word in them takes memory:
    about 0.6 MiB for each MB of source code, 10 MiB where no word comes twice."""
    normalizer: Literal["none", "nfc", "nfd", "nfkc", "nfkd"] = "none"
    """Unicode's normal form into which text is brought first."""
    lowercase: bool = False
    """Write letters small; what the model says is small as well."""
    strip_accents: bool = False
    """Leave out accents and other marks on letters."""
    split_digits: bool = False
    """Make each digit a word of its own, so that numbers are read digit by digit."""

    needs_bytes: ClassVar[bool] = True
    """Whether each byte is a token, of which the vocabulary has to hold 256."""
    described: ClassVar[str]
    """The algorithm in words, for the model card."""
    trained_by: ClassVar[tuple[str, ...]] = ("tokenizers",)
    """Packages of whose versions depends what is made."""

    @property
    def smallest_vocabulary(self) -> int:
        """Tokens that there are before any is learned from text."""
        return len(self.special_tokens) + (BYTES if self.needs_bytes else 0)

    @model_validator(mode="after")
    def _special_tokens_differ(self) -> TrainedTokenizer:
        if len(set(self.special_tokens)) < len(self.special_tokens):
            raise ValueError(
                f"special_tokens={list(self.special_tokens)} has one token twice; "
                "give each its own name"
            )
        return self


class ByteBpeTokenizer(TrainedTokenizer):
    """A byte-level BPE trained on the run's own training documents: any text, nothing unknown."""

    kind: Literal["byte_bpe"]
    min_frequency: PositiveInt = 2
    """Pairs seen less often are not merged."""
    special_tokens: SpecialTokens = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    """Beginning, padding, end, unknown, mask; they get the first ids in this order."""
    pre_tokenizer: Literal["gpt2", "cl100k", "o200k"] = "gpt2"
    """What sets words apart, across which nothing is merged: the rules of GPT-2, GPT-4 or GPT-4o.
    Where words begin is read off the tokens with gpt2 alone, as is what `fast` needs."""

    described: ClassVar[str] = "byte-level BPE"


class WordPieceTokenizer(TrainedTokenizer):
    """A WordPiece as BERT has, trained on the run's own training documents; white space is lost."""

    kind: Literal["wordpiece"]
    min_frequency: PositiveInt = 2
    """Pairs seen less often are not merged."""
    special_tokens: SpecialTokens = ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]")
    """Beginning, padding, end, unknown, mask; they get the first ids in this order."""
    lowercase: bool = True
    """Write letters small, as uncased BERT does; what the model says is small as well."""
    strip_accents: bool = True
    """Leave out accents and other marks on letters."""
    pre_tokenizer: Literal["bert", "whitespace"] = "bert"
    """What sets words apart: bert is white space, and each punctuation sign and Chinese character
    for itself; whitespace is white space alone."""
    alphabet_size: PositiveInt = 1000
    """Characters that have tokens, the most frequent ones; a word with another is unknown."""

    needs_bytes: ClassVar[bool] = False
    described: ClassVar[str] = "WordPiece"


class UnigramTokenizer(TrainedTokenizer):
    """A unigram model as T5 has, trained by SentencePiece on the run's own training documents."""

    kind: Literal["unigram"]
    special_tokens: SpecialTokens = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    """Beginning, padding, end, unknown, mask; they get the first ids in this order."""
    pre_tokenizer: Literal["metaspace", "metaspace_punctuation"] = "metaspace"
    """What sets words apart: spaces, each of which belongs to the word after it; with punctuation,
    each sign is a word for itself as well."""
    character_coverage: Annotated[float, Field(gt=0, le=1)] = 0.9995
    """Share of the text's characters that have tokens; the rarest others are spelt as bytes."""

    described: ClassVar[str] = "unigram (SentencePiece)"
    trained_by: ClassVar[tuple[str, ...]] = ("tokenizers", "sentencepiece")


class PretrainedTokenizer(Section):
    """A fast tokenizer from the hub or a local directory, or a rank file of tiktoken's."""

    kind: Literal["pretrained"]
    name: Annotated[str, Field(min_length=1)]
    """Hub name, directory, run directory for its tokenizer/, or FILE.tiktoken."""
    revision: str | None = None
    """Branch, tag or commit on the hub; null is the main branch."""
    trust_remote_code: bool = False
    """Run Python code that comes with the tokenizer."""
    encoding: Literal["r50k_base", "p50k_base", "cl100k_base", "o200k_base"] | None = None
    """How a rank file of tiktoken's splits text and which special tokens it has, which it does not
    say itself; null is the one of the file's name."""

    @model_validator(mode="after")
    def _encoding_is_of_a_rank_file(self) -> PretrainedTokenizer:
        if self.encoding is not None and not self.name.endswith(TIKTOKEN):
            raise ValueError(
                f"encoding={self.encoding} is of a rank file of tiktoken's, and name={self.name} "
                f"does not end with {TIKTOKEN}; set encoding=null"
            )
        return self


TIKTOKEN = ".tiktoken"
TokenizerConfig = Annotated[
    ByteBpeTokenizer | WordPieceTokenizer | UnigramTokenizer | PretrainedTokenizer,
    Field(discriminator="kind"),
]
"""The run's tokenizer: trained on its corpus, or a fast one from the hub; saved with the run."""
