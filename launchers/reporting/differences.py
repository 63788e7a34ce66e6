"""In which settings runs differ, in the words of a page. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from shardwright.launchers.watching import differences
from shardwright.launchers.watching.rows import flattened

NOT_THERE = "-"
"""What stands for a setting that a run does not have."""


def flat(tree: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings of a config by their dotted keys, as they are written in YAML."""
    return {k: written(v) for k, v in flattened(tree) if k not in differences.PLACES}


def written(value: Any) -> str:
    """Return a value as a person would write it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def differing(settings: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Return the settings that are not the same in all runs, each with its value in every run."""
    table, _ = differences.differing(settings)
    return {k: [NOT_THERE if v is None else v for v in values] for k, values in table.items()}


def shared(settings: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return the settings that all runs have in common."""
    first, *others = settings or [{}]
    return {k: v for k, v in first.items() if all(each.get(k) == v for each in others)}


def short_names(keys: Sequence[str]) -> list[str]:
    """Return each key by as many of its last parts as tell it from the others."""
    found = []
    for key in keys:
        parts = key.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        others = [f".{other}" for other in keys if other != key]
        found.append(next((e for e in ends if not any(o.endswith(f".{e}") for o in others)), key))
    return found
