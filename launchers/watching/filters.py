"""Which rows are wanted, and in which order: words such as state=done and "eval_loss<3"."""

from __future__ import annotations

import difflib
import fnmatch
import math
import operator
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from shardwright.launchers.runs import WORDS
from shardwright.launchers.watching.rows import COLUMNS, Row
from shardwright.train.config.messages import known_keys, meant
from shardwright.train.errors import UserError
from shardwright.train.units import seconds_of

_WORD = re.compile(r"\s*(?P<key>[^\s<>=!]+)\s*(?P<operator><=|>=|!=|==|=|<|>)\s*(?P<value>.*?)\s*")
_ORDERS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
FORM = 'KEY=VALUE, KEY!=VALUE, "KEY<VALUE" and the like'


@dataclass(frozen=True)
class Filter:
    """One condition on a row."""

    key: str
    operator: str
    value: str
    number: float | None
    """What its value is as a number; of an age in seconds."""

    def fits(self, row: Row) -> bool:
        """Return whether a row has what is asked for. Pure.

        One that lacks the value fits null, and no comparison.
        """
        found = row.value(self.key)
        if self.operator in _ORDERS:
            assert self.number is not None
            return _is_number(found) and _ORDERS[self.operator](found, self.number)
        return self._equals(found, row) != (self.operator == "!=")

    def _equals(self, found: Any, row: Row) -> bool:
        if self.key == "state":
            return _matches(row.state.word, self.value) or _matches(row.state.text, self.value)
        if _is_number(found) and self.number is not None:
            return bool(found == self.number)
        return _matches(_text(found), self.value)


def is_filter(word: str) -> bool:
    """Return whether a word compares something."""
    return any(sign in word for sign in "<>=")


def parsed(word: str) -> Filter:
    """Return the filter that a word is. Pure. Raises UserError where it is none."""
    match = _WORD.fullmatch(word)
    if match is None:
        raise UserError(f"{word} is not a filter: write {FORM}, in quotes where it has < or >")
    key, sign, value = match["key"], match["operator"], match["value"]
    number = _number(key, value)
    if sign in _ORDERS and number is None:
        example = "age<2d or age>12h" if key == "age" else f"{key}{sign}3"
        what = "a time such as 2d, 12h or 30min" if key == "age" else "a number"
        raise UserError(f"{word}: {sign} needs {what} behind it, such as {example}")
    if not value:
        raise UserError(f"{word} names no value; {key}=null finds the runs that have none")
    if key == "state" and sign not in _ORDERS:
        _check_state(word, value)
    return Filter(key, sign, value, number)


def chosen(rows: Sequence[Row], filters: Sequence[Filter]) -> list[Row]:
    """Return the rows that fit all filters. Pure. Raises UserError for a key that no run has."""
    check_keys([one.key for one in filters], rows)
    return [row for row in rows if all(one.fits(row) for one in filters)]


def ordered(rows: Sequence[Row], key: str, *, descending: bool = False) -> list[Row]:
    """Return rows by a key, those without it last. Pure. Raises UserError where no run has it."""
    check_keys([key], rows)
    have = [row for row in rows if row.value(key) is not None]
    lack = [row for row in rows if row.value(key) is None]
    return [*sorted(have, key=lambda row: _rank(row.value(key)), reverse=descending), *lack]


def check_keys(keys: Collection[str], rows: Sequence[Row]) -> None:
    """Raise UserError for a key that is neither a column nor a metric nor one of a config."""
    readable = [row for row in rows if row.config]
    of_configs = known_keys()
    for key in keys:
        if key in COLUMNS or key in of_configs or any(row.has(key) for row in readable):
            continue
        metrics = sorted({name for row in readable for name in row.metrics})
        raise UserError(_unknown(key, metrics, of_configs))


def _unknown(key: str, metrics: Sequence[str], of_configs: Sequence[str]) -> str:
    known = list(dict.fromkeys([*COLUMNS, *metrics, *of_configs]))
    leaves: dict[str, str] = {}
    for each in known:
        leaves.setdefault(each.rpartition(".")[2], each)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    near = near or [
        leaves[leaf]
        for leaf in difflib.get_close_matches(key.rpartition(".")[2], leaves, n=1, cutoff=0.6)
    ]
    if (found := meant(key)) and " " not in found:
        near = [found.partition("=")[0]]
    hint = f": did you mean {near[0]}?" if near else "."
    of_metrics = f"the metrics {', '.join(metrics)}" if metrics else "the metrics that runs log"
    return (
        f"runs have no {key}{hint}\n"
        f"There are the columns {', '.join(COLUMNS)};\n"
        f"{of_metrics};\n"
        "and each key of a config, such as trainer.learning_rate or data.kind"
    )


def _check_state(word: str, value: str) -> None:
    """Raise UserError for a state that no run can have; a pattern may mean its text."""
    if any(sign in value for sign in "*?[") or " " in value or value in WORDS:
        return
    near = difflib.get_close_matches(value, WORDS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(
        f"{word}: no run has this state; {hint}there are {', '.join(WORDS)}, and a pattern such "
        "as state=*memory* looks at what status says"
    )


def _number(key: str, value: str) -> float | None:
    try:
        return seconds_of(value) if key == "age" else float(value.replace("_", ""))
    except ValueError:
        return None


def _matches(text: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(text.lower(), pattern.lower())


def _text(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _rank(value: Any) -> tuple[bool, float, list[tuple[bool, int, str]]]:
    """Return what sorts numbers before texts, and the numbers within texts as numbers."""
    if _is_number(value):
        return False, value, []
    parts = re.split(r"(\d+)", _text(value))
    return True, 0.0, [(not p.isdecimal(), int(p) if p.isdecimal() else 0, p) for p in parts]
