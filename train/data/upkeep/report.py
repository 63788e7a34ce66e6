"""What there is of a run's data, as lines that fit a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from shardwright.train.console import cells
from shardwright.train.data.upkeep.facts import PARTS
from shardwright.train.units import counted, duration, size

LEAST_NAME = 16
"""Columns that a source's name has at least, as long as another column can be left out."""


def report(found: Mapping[str, Any], *, now: float, columns: int = 80) -> Iterator[str]:
    """Yield the lines above the samples of a run, or of an entry of the cache. Pure."""
    yield found["run"] or found["entry"]
    if found["run"]:
        yield f"  tokens in {found['entry']}"
    used = found["used_at"]
    yield f"  {size(found['bytes'])}" + (
        "" if used is None else f", last opened {duration(now - used)} ago"
    )
    yield from body(found, columns)
    if found["run"] is None:
        yield ""
        yield "No run is known that uses it: give a run directory to see samples."


def body(found: Mapping[str, Any], columns: int) -> Iterator[str]:
    """Yield counts, sources, lengths, and what of them is cut. Pure."""
    yield ""
    yield from _table(found)
    for name, text in _EXTRA_LINES.items():
        if found.get(name):
            yield f"  {found[name]:,} {text}"
    sources = found["sources"]
    if len(sources) > 1 or "texts" in sources[0]:
        yield ""
        yield from _by_source(sources, columns)
    yield from _stages(found.get("stages", ()))
    for each in found.get("held_out_sets", ()):
        yield (
            f"  held out, {each['name']}: {_number(each['documents'])} documents, "
            f"{each['tokens']:,} tokens, {counted(each['samples'], 'sample')}"
        )
    yield from _shares(found, columns)
    yield ""
    if (lengths := found["lengths"]) is None:
        yield "It is not kept where documents end, and no run is known whose tokenizer tells it."
    else:
        yield (
            f"{lengths['count']:,} {lengths['of']} of {lengths['shortest']:,} to "
            f"{lengths['longest']:,} tokens, {lengths['mean']:,.1f} on average:"
        )
        yield from lengths["histogram"]
        yield from _longest(found.get("longest", ()), columns)


_EXTRA_LINES = {
    "empty_files": "empty files skipped",
    "duplicates": "documents left out as duplicates",
    "duplicate_tokens": "tokens of those",
    "filtered": "documents dropped by data.filter",
}
_ROWS = {
    "documents": "documents",
    "bytes": "bytes",
    "tokens": "tokens",
    "tokens_per_byte": "tokens per byte",
    "samples": "samples",
    "samples_per_epoch": "samples in an epoch",
    "tokens_in_samples": "tokens in samples",
    "tokens_left_out": "tokens in none",
    "lines_cut": "lines cut",
}


def _table(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"  {'':<20}{'training':>20}{'held out':>20}"
    for key, name in _ROWS.items():
        row = [found[part].get(key) for part in PARTS]
        if any(row) or (key != "lines_cut" and None not in row):
            yield f"  {name:<20}{_number(row[0]):>20}{_number(row[1]):>20}"


class _Column(NamedTuple):
    name: str
    width: int
    cells: list[str]
    rank: int = 9
    """Where it is narrow, that of the lowest goes first."""


def _by_source(sources: Sequence[Mapping[str, Any]], columns: int) -> Iterator[str]:
    training = [source["training"] for source in sources]
    shown = [
        _Column("documents", 11, [_number(each["documents"]) for each in training]),
        _Column("tokens", 15, [_number(each["tokens"]) for each in training]),
        _Column("held out", 15, [_number(each["held_out"]["tokens"]) for each in sources], 1),
    ]
    if all("texts" in source for source in sources):
        texts = [source["texts"] for source in sources]
        shown += [
            _Column("tokens/byte", 13, [_ratio(each["tokens_per_byte"]) for each in texts]),
            _Column("tokens/word", 13, [_ratio(each["tokens_per_word"]) for each in texts]),
            _Column("bytes", 11, [size(each["bytes"]) for each in texts], 0),
            _Column("duplicates", 12, [f"{each['duplicates']:,}" for each in texts], 2),
            _Column("epoch", 8, [f"{s.get('share_of_epoch', 0):.1%}" for s in sources], 3),
        ]
    while (room := columns - 2 - sum(each.width for each in shown)) < LEAST_NAME and any(
        each.rank < 9 for each in shown
    ):
        shown.remove(min(shown, key=lambda each: each.rank))
    names = [
        str(source["name"] or ("all" if len(sources) == 1 else i))
        for i, source in enumerate(sources)
    ]
    room = min(room, max(cells.width(name) for name in ["source", *names]) + 1)
    for line in range(-1, len(sources)):
        name = "source" if line < 0 else cells.cut(names[line], room - 1, keeps_end=True)
        row = "".join(f"{c.name if line < 0 else c.cells[line]:>{c.width}}" for c in shown)
        yield f"  {cells.padded(name, room, to_the_left=True)}{row}"


def _stages(stages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if stages:
        yield ""
    for number, stage in enumerate(stages):
        until = "the rest" if stage["tokens"] is None else counted(stage["tokens"], "token")
        yield (
            f"  stage {number}: {until}, in samples of {stage['sequence_length']:,} tokens, "
            f"{stage['samples_per_epoch']:,} in an epoch"
        )


def _shares(found: Mapping[str, Any], columns: int) -> Iterator[str]:
    """Yield what of documents and positions is cut, padded or predicted."""
    lines = []
    training = found["training"]
    if cut := found.get("cut"):
        others = cut["documents"] - cut["longer"]
        lines += [
            f"{_share(cut['longer'], cut['documents'])} documents are longer than a sample, and "
            "cut in any case",
            f"{_share(cut['cut'], others)} others are cut by a sample's edge",
        ]
    elif training.get("lines_cut") is not None and found.get("positions"):
        lines.append(f"{_share(training['lines_cut'], training['samples'])} lines are cut")
    if (left := training.get("tokens_left_out")) is not None:
        lines.append(
            f"{_share(left, left + training['tokens_in_samples'])} tokens are in no sample"
        )
    if positions := found.get("positions"):
        used = positions["positions"] - positions["padding"]
        lines.append(
            f"{_share(positions['padding'], positions['positions'])} positions of the first "
            f"{positions['micro_batches']:,} micro-batches are padding"
        )
        if positions["predicted"] != used:
            lines.append(f"{_share(positions['predicted'], used)} others are to be predicted")
    if lines:
        yield ""
        for line in lines:
            yield from textwrap.wrap(f"  {line}", columns, subsequent_indent="    ")


def _share(count: int, of_all: int) -> str:
    return f"{count:,} of {of_all:,} ({count / max(1, of_all):.1%})"


def _longest(longest: Sequence[Mapping[str, Any]], columns: int) -> Iterator[str]:
    from shardwright.train.data.upkeep.shown_samples import visible

    if not longest:
        return
    yield ""
    yield "The longest:"
    for one in longest:
        where = f"number {one['number']:,}" + (", held out" if one["part"] == "held_out" else "")
        where += f", of {one['source_name']}" if one["source_name"] else ""
        head = f"  {one['tokens']:>12,} tokens, {where}: "
        text = " ".join(visible(one["begins_with"]).split())
        if cells.width(head) > columns - LEAST_NAME:
            yield cells.cut(head.rstrip(": "), columns)
            head = f"  {'':>12} "
        yield head + cells.cut(text, columns - cells.width(head))


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
