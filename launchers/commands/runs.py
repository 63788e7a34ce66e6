"""`shardwright runs`: a table of runs, chosen by filters and sorted by any of their values."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shardwright.launchers import columns, messages
from shardwright.launchers.columns import NOTHING, Column
from shardwright.launchers.watching import filters
from shardwright.launchers.watching.rows import COLUMNS, Row, found, rows
from shardwright.train.paths import absolute
from shardwright.train.units import counted, duration


def main(arguments: Sequence[str]) -> int:
    """Print the runs that fit."""
    options = parser().parse_args(arguments)
    here = Path.cwd()
    paths, conditions = [], []
    for word in options.words:
        # A directory may be called a=1, as those of Hydra's sweeps are.
        if filters.is_filter(word) and not Path(absolute(word)).exists():
            conditions.append(filters.parsed(word))
        else:
            paths.append(Path(absolute(word)))
    there = rows(found(paths, here), here)
    shown = filters.chosen(there, conditions)
    keys = [condition.key for condition in conditions]
    if options.sort is not None:
        shown = filters.ordered(shown, _sorted_by(options.sort, there), descending=options.reverse)
        keys.append(options.sort)
    elif options.reverse:
        shown = shown[::-1]
    extra = [key for key in dict.fromkeys(keys) if key not in COLUMNS]
    if options.json:
        print(json.dumps([as_tree(row, extra) for row in shown], indent=2))
    elif options.csv:
        _write_csv(shown, extra)
    elif shown:
        print("\n".join(columns.table(as_columns(shown, extra), messages.terminal_width())))
    elif there:
        words = " ".join(word for word in options.words if filters.is_filter(word))
        print(f"none of {counted(len(there), 'run')} fits {words}", file=sys.stderr)
    else:
        print(f"no runs in runs/ and sweeps/ of {here}; give their paths", file=sys.stderr)
    return 0


def _sorted_by(key: str, there: Sequence[Row]) -> str:
    """Return the key to sort by, once it is known to all rows, not to those left alone."""
    filters.check_keys([key], there)
    return key


def parser() -> argparse.ArgumentParser:
    """Return the command line of `shardwright runs`."""
    parser_ = argparse.ArgumentParser(
        prog="shardwright runs",
        description="Show runs in a table: state, model, strategy, step, best and last held-out "
        "loss, last loss, tokens per second, time since the start. The runs are those in runs/ "
        "and sweeps/, or at and below the given paths.",
        epilog="Filters compare a column, a metric or a key of the config: state=done "
        'model=gpt2_* "eval_loss<3" "trainer.learning_rate>=1e-4" "age<2d". Text is compared as '
        "a pattern with * and ?, null stands for no value, and all filters have to fit. The "
        f"columns are {', '.join(COLUMNS)}.",
    )
    parser_.add_argument(
        "words", nargs="*", metavar="PATH|FILTER", help=f"where to look; {filters.FORM}"
    )
    parser_.add_argument(
        "--sort", metavar="KEY", help="sort by a column, a metric or a key of the config"
    )
    parser_.add_argument("--reverse", action="store_true", help="the last first")
    as_ = parser_.add_mutually_exclusive_group()
    as_.add_argument("--json", action="store_true", help="print a list of objects")
    as_.add_argument("--csv", action="store_true", help="print comma-separated values")
    return parser_


# --- as text --------------------------------------------------------------------------------------


def as_tree(row: Row, extra: Sequence[str]) -> dict[str, Any]:
    """Return all that is known of a row but its config, of which those keys that are named."""
    return {
        "run_dir": str(row.run_dir),
        **row.columns,
        "state_text": row.state.text,
        "settings": dict(row.settings),
        "metrics": dict(row.metrics),
        **{key: row.value(key) for key in extra},
    }


def _write_csv(shown: Sequence[Row], extra: Sequence[str]) -> None:
    settings = list(dict.fromkeys(key for row in shown for key in row.settings))
    more = [key for key in dict.fromkeys([*extra, *settings]) if key not in COLUMNS]
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["run_dir", *COLUMNS, "state_text", *more])
    for row in shown:
        found_ = [row.columns[key] for key in COLUMNS]
        others = [row.settings.get(key, row.value(key)) for key in more]
        writer.writerow([row.run_dir, *found_, row.state.text, *others])


def as_columns(shown: Sequence[Row], extra: Sequence[str] = ()) -> list[Column]:
    """Return the columns of a table of at least one row, with keys that were asked for. Pure."""

    def of(key: str) -> list[Any]:
        return [row.columns.get(key) for row in shown]

    def losses(key: str) -> tuple[str, ...]:
        return tuple(NOTHING if value is None else f"{value:.4f}" for value in of(key))

    def texts(key: str) -> tuple[str, ...]:
        return tuple(str(value or NOTHING) for value in of(key))

    steps = zip(of("step"), of("total_steps"), strict=True)
    speeds = (NOTHING if value is None else f"{value:,.0f}" for value in of("tokens_per_second"))
    ages = (NOTHING if value is None else duration(value) for value in of("age"))
    settings = (_settings(row) for row in shown)
    return [
        Column("run", texts("run"), is_text=True, least=16, keeps_end=True),
        Column("settings", tuple(settings), is_text=True, least=12, rank=6),
        Column("model", texts("model"), is_text=True, rank=3),
        Column("strategy", texts("strategy"), is_text=True, rank=1),
        Column("step", tuple(_steps(*pair) for pair in steps), rank=7),
        Column("best", losses("best_eval_loss"), rank=9),
        Column("held out", losses("eval_loss"), rank=5),
        Column("loss", losses("loss"), rank=8),
        Column("tokens/s", tuple(speeds), rank=2),
        Column("age", tuple(ages), rank=4),
        *(Column(key, tuple(_shown(row.value(key)) for row in shown)) for key in extra),
        Column("state", tuple(row.state.text for row in shown), is_text=True, least=18),
    ]


def _settings(row: Row) -> str:
    """Return what a sweep varies of a run, by the last part of each key. Pure."""
    named = (f"{key.rpartition('.')[2]}={_shown(value)}" for key, value in row.settings.items())
    return " ".join(named) or NOTHING


def _steps(step: int | None, total: int | None) -> str:
    if step is None:
        return NOTHING
    return f"{step}/{total}" if total else str(step)


def _shown(value: Any) -> str:
    if value is None:
        return NOTHING
    return f"{value:.6g}" if isinstance(value, float) else str(value)
