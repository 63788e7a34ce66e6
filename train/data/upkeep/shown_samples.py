"""A sample as the model sees it, in text: documents set apart, masks and padding marked."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from shardwright.train.data.batches.collator import IGNORED

Ids = NDArray[np.int64]


class Row(NamedTuple):
    """A sample's row of a batch, and where it comes from."""

    position: int
    """In the run's order, from 0."""
    source: int
    number: int
    """Which one of its source's samples."""
    ids: Ids
    """What the model sees, padding included, shape (n,)."""
    labels: Ids
    """Shape (n,), or that of what is written."""
    width: int
    """Tokens that are no padding."""
    document_ends: list[int]
    """Above 0 and below ``width``."""
    masked: bool
    """Labels are of masked positions."""
    writes: bool = False
    """Labels are another text, which a decoder writes."""

    @property
    def chosen(self) -> Ids:
        """Positions that are masked, replaced or kept to be predicted."""
        return np.flatnonzero(self.labels != IGNORED) if self.masked else np.empty(0, np.int64)


class Decoder:
    """Decodes parts of a text so that together they are the text: with the spaces between them."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer

    def part(self, ids: Sequence[int], before: int | None) -> str:
        """Return the text of some tokens that follow the token ``before``."""
        if before is None:
            return self._decode(ids)
        first, both = self._decode([before]), self._decode([before, *ids])
        return both[len(first) :] if both.startswith(first) else self._decode(ids)

    def _decode(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(
            [int(token) for token in ids],
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        return str(text)


def marked(row: Row, decoder: Decoder, mask: int | None) -> Iterator[str]:
    """Yield the text of each document of a row, with what was where it is masked."""
    bounds = [0, *row.document_ends, row.width]
    chosen = set(row.chosen.tolist())
    for start, stop in pairwise(bounds):
        parts = []
        for is_chosen, group in groupby(range(start, stop), chosen.__contains__):
            places = list(group)
            if not is_chosen:
                before = int(row.ids[places[0] - 1]) if places[0] > start else None
                parts.append(decoder.part(row.ids[places].tolist(), before))
                continue
            parts += [_mark(row, place, decoder, mask, start) for place in places]
        yield "".join(parts)


def _mark(row: Row, place: int, decoder: Decoder, mask: int | None, start: int) -> str:
    seen, was = int(row.ids[place]), int(row.labels[place])
    # What was before it, not what is seen there: of that its spaces depend.
    before = None
    if place > start:
        label = int(row.labels[place - 1])
        before = int(row.ids[place - 1]) if label == IGNORED else label
    text = decoder.part([was], before)
    inner = text.lstrip()
    space = text[: len(text) - len(inner)]
    if seen == mask:
        return f"{space}«mask: {inner}»"
    if seen == was:
        return f"{space}«kept: {inner}»"
    return f"{space}«{decoder.part([seen], None).strip()}: {inner}»"


def described(
    row: Row, decoder: Decoder, mask: int | None, source: str | None, columns: int
) -> Iterator[str]:
    """Yield the lines of a sample, none of which is longer than ``columns``."""
    documents = len(row.document_ends) + 1
    head = f"sample {row.position:,}: {row.width:,} tokens of {documents:,} document"
    head += "s" if documents > 1 else ""
    if row.writes:
        head = f"sample {row.position:,}: {row.width:,} tokens read, {len(row.labels):,} written"
    if row.masked:
        head += f", {len(row.chosen):,} to be predicted"
    if padding := len(row.ids) - row.width:
        head += f", {padding:,} of padding"
    head += f"; number {row.number:,}"
    head += f" of {source}" if source is not None else ""
    yield from textwrap.wrap(head, columns, subsequent_indent="  ")
    for number, text in enumerate(marked(row, decoder, mask)):
        if number:
            yield "  ---- another document ----"
        for line in visible(text).split("\n"):
            yield from _broken(line, columns - 4)
    if row.writes:
        yield "  ---- to be written ----"
        for line in visible(decoder.part(row.labels.tolist(), None)).split("\n"):
            yield from _broken(line, columns - 4)
    if padding:
        yield f"  ---- {padding:,} of padding ----"


def visible(text: str) -> str:
    """Return a text whose characters do nothing to a terminal; lines stay lines. Pure."""
    return "".join(
        c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )


def _broken(line: str, width: int) -> Iterator[str]:
    parts = textwrap.wrap(
        line, width, drop_whitespace=False, replace_whitespace=False, break_on_hyphens=False
    )
    for part in parts or [""]:
        yield f"  | {part}"


def tree(row: Row, decoder: Decoder, mask: int | None, source: str | None) -> dict[str, Any]:
    """Return a sample in plain values."""
    return {
        "position": row.position,
        "source": row.source,
        "source_name": source,
        "number": row.number,
        "tokens": row.width,
        "padding": len(row.ids) - row.width,
        "document_ends": row.document_ends,
        "masked_positions": row.chosen.tolist(),
        "input_ids": row.ids.tolist(),
        "labels": row.labels.tolist(),
        "documents": list(marked(row, decoder, mask)),
    }
