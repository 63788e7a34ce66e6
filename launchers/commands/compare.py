"""`shardwright compare`: what differs between runs, and their curves beside each other."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shardwright.launchers import columns, messages
from shardwright.launchers.columns import NOTHING, Column
from shardwright.launchers.runs import UNREADABLE
from shardwright.launchers.watching import curves, differences
from shardwright.launchers.watching.rows import Row, found, rows
from shardwright.train.charts import series
from shardwright.train.console import cells
from shardwright.train.errors import UserError
from shardwright.train.paths import absolute
from shardwright.train.run_directory.names import METRICS
from shardwright.train.units import counted

MOST_RUNS = len(curves.LETTERS)
WIDE = 120
"""Columns from which on two pictures stand beside each other."""
CURVES = {"loss": "loss", "eval_loss": "held-out loss"}


def main(arguments: Sequence[str]) -> int:
    """Print what differs between runs."""
    options = parser().parse_args(arguments)
    here = Path.cwd()
    compared = [
        row
        for row in rows(found([Path(absolute(word)) for word in options.runs], here), here)
        if row.state.word != UNREADABLE or _refuse(row)
    ]
    if not 2 <= len(compared) <= MOST_RUNS:
        raise UserError(
            f"compare needs 2 to {MOST_RUNS} runs, and {', '.join(options.runs)} "
            f"{'is' if len(compared) == 1 else 'are'} {len(compared)}; name others, or choose some "
            "by `shardwright runs`"
        )
    lettered = dict(zip(curves.LETTERS, compared, strict=False))
    if options.json:
        print(json.dumps(as_tree(lettered), indent=2))
        return 0
    width = messages.terminal_width()
    print("\n".join(as_text(lettered, width)))
    if not options.no_curves:
        for line in _curves(lettered, width):
            print(line)
    return 0


def _refuse(row: Row) -> bool:
    raise UserError(f"{row.run_dir} {row.state.text}")


def parser() -> argparse.ArgumentParser:
    """Return the command line of `shardwright compare`."""
    parser_ = argparse.ArgumentParser(
        prog="shardwright compare",
        description="Show what differs between runs: results, settings, versions and hardware of "
        "their last start, data and tokenizer; and their curves of loss and held-out loss.",
    )
    parser_.add_argument(
        "runs", nargs="+", metavar="RUN_DIR|SWEEP_DIR", help="a sweep stands for its runs"
    )
    parser_.add_argument("--json", action="store_true", help="print an object, curves included")
    parser_.add_argument("--no-curves", action="store_true", help="print the tables alone")
    return parser_


def as_tree(lettered: Mapping[str, Row]) -> dict[str, Any]:
    """Return what differs, and what is drawn of each run."""
    compared = list(lettered.values())
    names = [str(row.run_dir) for row in compared]
    tables = {
        "results": differences.results(compared),
        **{title: table for title, (table, _) in _tables(compared).items()},
    }
    return {
        "runs": [
            {"run_dir": str(r.run_dir), "state": r.state.word, "state_text": r.state.text}
            for r in compared
        ],
        **{
            title: {key: dict(zip(names, values, strict=True)) for key, values in table.items()}
            for title, table in tables.items()
        },
        "curves": {
            metric: {
                str(row.run_dir): [list(point) for point in _series(row, metric).finite]
                for row in compared
            }
            for metric in CURVES
        },
    }


def _tables(compared: Sequence[Row]) -> dict[str, tuple[differences.Table, int]]:
    return {
        "config": differences.of_configs(compared),
        "versions": differences.differing([differences.versions(r.run_dir) for r in compared]),
        "data": differences.differing([differences.data(r.run_dir) for r in compared]),
    }


def _series(row: Row, metric: str) -> series.Series:
    return series.read(row.run_dir / METRICS).get(metric, series.Series((), (), (), ()))


# --- as text --------------------------------------------------------------------------------------


def as_text(lettered: Mapping[str, Row], width: int | None) -> Iterator[str]:
    """Yield the runs by their letters, and a table of each kind of difference."""
    compared = list(lettered.values())
    names = [str(row.columns["run"]) for row in compared]
    heads = [
        Column("", tuple(lettered), is_text=True),
        Column("run", tuple(names), is_text=True, least=16, keeps_end=True),
        Column("state", tuple(row.state.text for row in compared), is_text=True, least=20),
    ]
    yield from columns.table(heads, width)
    yield from _section("results", differences.results(compared), lettered, width)
    for title, (table, same) in _tables(compared).items():
        if table:
            yield from _section(f"{title}, {_same(same)}", table, lettered, width)
        else:
            known = "the same" if same else "not known of any"
            yield f"\n{title}: {known}"


def _same(count: int) -> str:
    return f"{counted(count, 'other')} the same"


def _section(
    title: str, table: differences.Table, lettered: Mapping[str, Row], width: int | None
) -> Iterator[str]:
    """Yield a table with a column for each run, or where that is too wide a line for each."""
    yield f"\n{title}"
    shown = {key: [_shown(value) for value in values] for key, values in table.items()}
    of_keys = Column("", tuple(f"  {key}" for key in shown), is_text=True)
    of_runs = [
        Column(letter, tuple(values[number] for values in shown.values()))
        for number, letter in enumerate(lettered)
    ]
    lines = columns.table([of_keys, *of_runs])
    if width is None or max(map(cells.width, lines)) <= width:
        yield from lines
        return
    for key, values in shown.items():
        pairs = zip(lettered, values, strict=True)
        line = f"  {key}  " + "  ".join(f"{letter} {value}" for letter, value in pairs)
        if cells.width(line) <= width:
            yield line
            continue
        yield f"  {key}"
        yield from (f"    {a} {v}" for a, v in zip(lettered, values, strict=True))


def _shown(value: Any) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, bool):
        return str(value).lower()
    return cells.plain(json.dumps(value) if isinstance(value, list | dict) else str(value))


def _curves(lettered: Mapping[str, Row], width: int | None) -> list[str]:
    in_colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    in_colours = in_colours and os.environ.get("TERM") != "dumb"
    whole = (width or 80) - 1
    is_wide = whole >= WIDE
    each = (whole - 2) // 2 if is_wide else whole
    pictures = [
        curves.drawn(
            f"{title} by step",
            {letter: _series(row, metric) for letter, row in lettered.items()},
            each,
            16 if is_wide else 10,
            in_colours=in_colours,
        )
        for metric, title in CURVES.items()
    ]
    first, second = pictures
    if is_wide and first and second:
        return ["", *curves.beside(first, second, each + 2)]
    return [line for picture in pictures if picture for line in ("", *picture)]
