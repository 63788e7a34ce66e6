"""What differs between runs: settings, versions, machines, data and results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from shardwright.launchers.watching.rows import Row, flattened
from shardwright.train.run_directory import history
from shardwright.train.run_directory.names import DATA_JSON, TOKENIZER_FOLDER

Table = Mapping[str, Sequence[Any]]
"""For each key its value in each run; None where a run has none."""

PLACES = frozenset({"run_dir", "sweep_dir"})
"""What is another in each run, and makes no difference."""
_OF_A_START = frozenset({"started", "argv"})
RESULTS = (
    *("step", "total_steps", "best_eval_loss", "best_step", "eval_loss", "loss"),
    "tokens_per_second",
)


def of_configs(rows: Sequence[Row]) -> tuple[Table, int]:
    """Return the keys whose values differ, and how many are the same in all runs. Pure."""
    return differing([{k: v for k, v in row.config.items() if k not in PLACES} for row in rows])


def differing(trees: Sequence[Mapping[str, Any]]) -> tuple[Table, int]:
    """Return the keys of flat trees whose values differ, and how many do not. Pure."""
    keys = list(dict.fromkeys(key for tree in trees for key in tree))
    values = {key: [tree.get(key) for tree in trees] for key in keys}
    table = {key: row for key, row in values.items() if any(_differ(row[0], v) for v in row[1:])}
    return table, len(keys) - len(table)


def _differ(one: Any, other: Any) -> bool:
    return type(one) is not type(other) if one == other else True


def versions(run_dir: Path) -> dict[str, Any]:
    """Return what the last start of a run has noted of versions and hardware, by dotted key."""
    noted = history.provenances(run_dir)
    tree = _json(noted[-1]) if noted else {}
    kept = {name: value for name, value in tree.items() if name not in _OF_A_START}
    return {name.removeprefix("versions."): value for name, value in flattened(kept)}


def data(run_dir: Path) -> dict[str, Any]:
    """Return what a run trains on, by dotted key: hashes of its tokens and its tokenizer, counts.

    The hash of the tokens depends on corpus, tokenizer, packing and seed together.
    """
    found = dict(flattened(_json(run_dir / DATA_JSON)))
    with suppress(OSError):
        text = (run_dir / TOKENIZER_FOLDER / "tokenizer.json").read_bytes()
        found["tokenizer.xxh3_128"] = xxhash.xxh3_128_hexdigest(text)
    return found


def results(rows: Sequence[Row]) -> Table:
    """Return how far the runs are and how well they do. Pure."""
    return {key: [row.columns.get(key) for row in rows] for key in RESULTS}


def _json(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        tree = json.loads(path.read_bytes())
        if isinstance(tree, dict):
            return tree
    return {}
