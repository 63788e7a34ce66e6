"""The tokens of a vocabulary that stand for spans of a text: <extra_id_0> and so on."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING

from shardwright.train.config import RunConfig, SpanCorruptionObjective
from shardwright.train.config.spans import SENTINELS
from shardwright.train.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def name(number: int) -> str:
    return f"<extra_id_{number}>"


def added_to(config: RunConfig) -> tuple[str, ...]:
    """Return the sentinels that a tokenizer which is trained gets, in the order of their ids. Pure.

    As T5 has them: the first one is the last of the vocabulary.
    """
    if not config.objective.is_encoder_decoder:
        return ()
    return tuple(name(number) for number in reversed(range(SENTINELS)))


def ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of all sentinels that a tokenizer has, <extra_id_0> first."""
    vocabulary, found = tokenizer.get_vocab(), list[int]()
    for number in count():
        # mT5's are words of its SentencePiece model, with the mark of a word's beginning.
        known = (vocabulary.get(text) for text in (name(number), f"\u2581{name(number)}"))
        if (token := next((i for i in known if i is not None), None)) is None:
            return found
        found.append(token)
    raise AssertionError("a vocabulary ends")


def check(tokenizer: PreTrainedTokenizerBase, config: RunConfig, called: str) -> None:
    """Raise UserError where a tokenizer lacks what span corruption needs; ``called`` names it."""
    objective = config.objective
    if not isinstance(objective, SpanCorruptionObjective):
        return
    length = config.data.tokens_per_sample
    found, wanted = len(ids(tokenizer)), objective.counts(length).spans
    if found < wanted:
        has = f"{found} sentinels ({name(0)} to {name(found - 1)})" if found else "no sentinels"
        remedy = "shorten the samples, raise objective.mean_span_length" if found else None
        remedy = remedy or f"add {name(0)} and so on to it, one for each span of a sample"
        raise UserError(
            f"tokenizer={called} has {has}, and objective={objective.kind} needs {wanted} for the "
            f"spans of a sample of data.sequence_length={length}; {remedy}, or choose a T5's "
            "tokenizer or one that is trained, such as tokenizer=unigram"
        )
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"tokenizer={called} has no padding token, with which the decoder begins under "
            f"objective={objective.kind}; name one as pad_token, or choose a T5's tokenizer or "
            "one that is trained, such as tokenizer=unigram"
        )
