"""The section "tokenizer": one trained on the data, or a ready one."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from shardwright.train.config.section import PositiveInt, Section, Strings


class ByteBpeTokenizer(Section):
    """A byte-level BPE trained on the run's own training documents."""

    kind: Literal["byte_bpe"]
    vocab_size: Annotated[int, Field(ge=261)] | None = None
    """Tokens, 256 bytes and the special ones included; null is the model's vocabulary."""
    min_frequency: PositiveInt = 2
    """Pairs seen less often are not merged."""
    special_tokens: Annotated[Strings, Field(min_length=5, max_length=5)] = (
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        "<mask>",
    )
    """Beginning, padding, end, unknown, mask; they get the first ids in this order."""
    max_training_bytes: PositiveInt = 2**30
    """Train on this many bytes of text, the first ones. Each distinct word in them takes memory:
    about 0.6 MiB for each MB of source code, 10 MiB where no word comes twice."""

    @model_validator(mode="after")
    def _special_tokens_differ(self) -> ByteBpeTokenizer:
        if len(set(self.special_tokens)) < len(self.special_tokens):
            raise ValueError(
                f"special_tokens={list(self.special_tokens)} has one token twice; "
                "give each its own name"
            )
        return self


class PretrainedTokenizer(Section):
    """A fast tokenizer from the hub or a local directory."""

    kind: Literal["pretrained"]
    name: Annotated[str, Field(min_length=1)]
    """Hub name, directory, or run directory for its tokenizer/."""
    revision: str | None = None
    """Branch, tag or commit on the hub; null is the main branch."""
    trust_remote_code: bool = False
    """Run Python code that comes with the tokenizer."""


TokenizerConfig = Annotated[ByteBpeTokenizer | PretrainedTokenizer, Field(discriminator="kind")]
