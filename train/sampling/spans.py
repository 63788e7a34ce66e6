"""Fill the spans of a text by an encoder-decoder: <extra_id_0> and so on, by what it writes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from shardwright.train.data.tokens import sentinels
from shardwright.train.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = re.compile(r"<extra_id_(\d+)>")


def check(prompt: str, shown: str, known: int) -> None:
    """Raise UserError where a prompt's spans are not those that a model was trained to fill. Pure.

    ``known`` is how many sentinels the model has.
    """
    numbers = [int(number) for number in MARK.findall(prompt)]
    if not numbers:
        raise UserError(
            f"prompt {shown} has no span to fill; write {sentinels.name(0)} where the first one is "
            f"missing, {sentinels.name(1)} for the second, and so on"
        )
    if numbers != list(range(len(numbers))):
        raise UserError(
            f"prompt {shown} has the spans {', '.join(map(sentinels.name, numbers))}; number them "
            f"from {sentinels.name(0)} on, in their order, each once"
        )
    if len(numbers) > known:
        raise UserError(
            f"prompt {shown} has {len(numbers)} spans, and the model has {known} sentinels for "
            "them; leave some out"
        )


def completed(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    generate: Callable[[dict[str, Any]], Sequence[int]],
) -> str:
    """Return a prompt with what the model writes in place of its spans; nothing where it is mute.

    ``generate`` returns the tokens that are written for a prompt's.
    """
    written = generate(dict(tokenizer(prompt, return_tensors="pt")))
    found = spans_of(written, sentinels.ids(tokenizer))
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id}

    def text(number: int) -> str:
        ids = [token for token in found.get(number, ()) if token not in ends]
        return str(tokenizer.decode(ids, skip_special_tokens=True)).strip("\n")

    return MARK.sub(lambda mark: text(int(mark[1])), prompt)


def spans_of(written: Sequence[int], marks: Sequence[int]) -> dict[int, list[int]]:
    """Return what is written of each span, the first time: the tokens behind its sentinel. Pure."""
    numbers = {mark: number for number, mark in enumerate(marks)}
    found: dict[int, list[int]] = {}
    current: list[int] | None = None
    for token in written:
        if token in numbers:
            current = None if numbers[token] in found else found.setdefault(numbers[token], [])
        elif current is not None:
            current.append(token)
    return found
