"""From words in Hydra's grammar to the points of a sweep. Pure but for what the caller looks up."""

from __future__ import annotations

import fnmatch
import itertools
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    ChoiceSweep,
    Glob,
    IntervalSweep,
    Override,
    QuotedString,
    RangeSweep,
)
from hydra.errors import OverrideParseException

from shardwright.launchers.composition import errors
from shardwright.launchers.composition.compose import quoted
from shardwright.launchers.sweep.definition import SweepConfig
from shardwright.launchers.sweep.directory import Point
from shardwright.train.config.section import shown
from shardwright.train.errors import UserError

Groups = Mapping[str, Collection[str]]
"""The options of each group, by which glob() chooses among them."""
SEED = "seed"


@dataclass(frozen=True)
class Interval:
    """Numbers between two bounds, both included, of which a search proposes some."""

    low: float
    high: float
    is_log: bool
    is_integer: bool


@dataclass(frozen=True)
class Axis:
    """What a sweep varies: a key or a group, with its values or, for a search, its bounds."""

    key: str
    words: tuple[str, ...]
    """Each value as Hydra's grammar has it; none where there are bounds."""
    interval: Interval | None = None
    tags: frozenset[str] = frozenset()
    """What tag() has said of it."""

    @property
    def values(self) -> tuple[Any, ...]:
        """The values as JSON has them."""
        return tuple(value_of(self.key, word) for word in self.words)


def axes(config: SweepConfig, groups: Groups) -> list[Axis]:
    """Return what a sweep varies, seeds last. Raises UserError where it is nothing or no range."""
    found = [axis(key, given, groups) for key, given in config.grid.items()]
    if config.seeds is not None:
        given = [
            what
            for what in (*config.grid, *(o.partition("=")[0] for o in config.overrides))
            if what == SEED
        ]
        if given:
            raise UserError(
                f"sweep.seeds={shown(config.seeds)} repeats each point, but seed is given as well; "
                "leave one of them out"
            )
        seeds = range(config.seeds) if isinstance(config.seeds, int) else config.seeds
        found.append(Axis(SEED, tuple(map(str, seeds))))
    if not found:
        raise UserError(
            "nothing varies in this sweep: give a key several values, such as "
            "trainer.learning_rate=1e-4,3e-4, a sweep of conf/sweep/ with sweep=NAME, or "
            "sweep.seeds=3"
        )
    if config.search.kind == "none" and (open_ended := [a for a in found if a.interval]):
        raise UserError(
            f"{open_ended[0].key} has bounds and no values, so that a search has to choose: add "
            "sweep.search.kind=tpe sweep.search.trials=20, or list values"
        )
    return found


def axis(key: str, given: Any, groups: Groups) -> Axis:
    """Return an axis out of a list of values, or text in Hydra's grammar."""
    if isinstance(given, list | tuple):
        if not given:
            raise UserError(f"{key}=[]: has no value to run; give it some, or leave it out")
        return Axis(key, tuple(map(word, given)))
    text = f"{key}={given if isinstance(given, str) else word(given)}"
    override = parsed(text, groups)
    if not override.is_sweep_override():
        return Axis(key, (text.partition("=")[2],))
    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        return Axis(key, (), _interval(text, sweep), frozenset(sweep.tags))
    words = tuple(_words(text, override, sweep, groups))
    if not words:
        kind = "the range is empty" if isinstance(sweep, RangeSweep) else "nothing is chosen"
        raise UserError(f"{text}: has no value to run, {kind}; give it some, or leave it out")
    return Axis(key, words, tags=frozenset(getattr(sweep, "tags", ())))


def _words(text: str, override: Override, sweep: Any, groups: Groups) -> Iterator[str]:
    """Yield the values of an axis that can be counted."""
    if isinstance(sweep, Glob):
        options = groups.get(override.key_or_group)
        if options is None:
            raise UserError(
                f"{text}: glob() chooses among the options of a group, and "
                f"{override.key_or_group} is not one; list the values"
            )
        for name in sorted(options):
            if any(fnmatch.fnmatch(name, p) for p in sweep.include) and not any(
                fnmatch.fnmatch(name, p) for p in sweep.exclude
            ):
                yield name
        return
    if isinstance(sweep, RangeSweep) and sweep.step == 0:
        raise UserError(f"{text}: is not a range, its step is 0; write range(first,end,step)")
    assert isinstance(sweep, RangeSweep | ChoiceSweep)
    yield from override.sweep_string_iterator()


def _interval(text: str, sweep: IntervalSweep) -> Interval:
    if sweep.start is None or sweep.end is None or not sweep.start < sweep.end:
        raise UserError(
            f"{text}: is not a range, as {sweep.start} is not below {sweep.end}; write "
            "interval(lowest,highest)"
        )
    is_log = "log" in sweep.tags
    if is_log and sweep.start <= 0:
        raise UserError(
            f"{text}: is not a range on a logarithmic scale, which has no {sweep.start}; begin "
            "above 0"
        )
    is_integer = "int" in sweep.tags or (
        isinstance(sweep.start, int) and isinstance(sweep.end, int)
    )
    return Interval(sweep.start, sweep.end, is_log, is_integer)


def parsed(text: str, groups: Groups) -> Override:
    """Read one word. Raises UserError where Hydra cannot."""
    try:
        (override,) = OverridesParser.create().parse_overrides([text])
    except OverrideParseException as error:
        value = text.partition("=")[2]
        function = value.partition("(")[0]
        lines = str(error).splitlines()
        if function in _FORMS and "while evaluating" in "".join(lines[1:2]):
            why = lines[1].partition(": ")[2].replace(" is incompatible with ", " is not ")
            raise UserError(
                f"{text}: {_FORMS[function][0]} ({why}); write {_FORMS[function][1]}"
            ) from None
        raise UserError(errors.unreadable(text, groups)) from None
    return override


_FORMS = {
    "range": ("is not a range", "range(first,end) or range(first,end,step)"),
    "interval": ("is not a range", "interval(lowest,highest)"),
    "choice": ("is not a choice", "choice(a,b)"),
    "shuffle": ("is not a list to shuffle", "shuffle(a,b) or shuffle(range(1,5))"),
    "sort": ("is not a list to sort", "sort(a,b)"),
    "tag": ("is not what a tag is for", "tag(log,interval(lowest,highest))"),
    "glob": ("is not a choice of options", "glob(pattern)"),
}


def is_axis(text: str, groups: Groups) -> bool:
    """Return whether a word of a command line has several values."""
    return "=" in text and bool(parsed(errors.with_home_quoted(text), groups).is_sweep_override())


def word(value: Any) -> str:
    """Return a value of YAML as Hydra's grammar has it."""
    if isinstance(value, str):
        return value if value and errors.PLAIN.fullmatch(value) else quoted(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{word(k)}:{word(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(word, value)) + "]"
    return json.dumps(value)


def value_of(key: str, text: str) -> Any:
    """Return what a word sets a key to, as JSON has it."""
    return _plain(parsed(f"{key}={text}", {}).value())


def _plain(value: Any) -> Any:
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, dict):
        return {str(_plain(k)): _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value


# --- points ---------------------------------------------------------------------------------------


def points(config: SweepConfig, found: Sequence[Axis]) -> list[Point]:
    """Return the points of a grid without what is excluded, numbered from 0; no limit applied.

    Raises UserError where nothing is left, or an exclusion fits nothing.
    """
    keys = [each.key for each in found]
    rules = [_rule(rule, [key.lstrip("+") for key in keys]) for rule in config.exclude]
    hits = [0] * len(rules)
    kept: list[tuple[tuple[str, ...], dict[str, Any]]] = []
    seen: set[str] = set()
    for words in itertools.product(*(each.words for each in found)):
        settings = {
            key.lstrip("+"): value_of(key, text) for key, text in zip(keys, words, strict=True)
        }
        fitting = [number for number, rule in enumerate(rules) if _fits(rule, settings)]
        for number in fitting:
            hits[number] += 1
        if fitting or identity(settings) in seen:
            continue
        seen.add(identity(settings))
        kept.append((words, settings))
    if unused := [shown(config.exclude[n]) for n, count in enumerate(hits) if not count]:
        varied = "; ".join(f"{each.key}={','.join(each.words)}" for each in found)
        raise UserError(
            f"sweep.exclude={unused[0]}: fits no combination of this sweep, which varies {varied}"
        )
    if not kept:
        raise UserError("sweep.exclude leaves no combination to run; exclude fewer")
    return [
        Point(n, settings, tuple(f"{k}={text}" for k, text in zip(keys, words, strict=True)))
        for n, (words, settings) in enumerate(kept)
    ]


def _rule(rule: Mapping[str, Any], keys: Sequence[str]) -> dict[str, list[Any]]:
    """Return for each key of an exclusion the values that it fits."""
    for key in rule:
        if key not in keys:
            raise UserError(
                f"sweep.exclude={shown(dict(rule))}: {key} does not vary in this sweep; what does "
                f"is {', '.join(keys)}"
            )
    return {
        key: [value_of(key, word(v)) for v in (given if isinstance(given, list) else [given])]
        for key, given in rule.items()
    }


def _fits(rule: Mapping[str, list[Any]], settings: Mapping[str, Any]) -> bool:
    return all(settings[key] in values for key, values in rule.items())


def excluded(config: SweepConfig, keys: Sequence[str]) -> Callable[[Mapping[str, Any]], bool]:
    """Return what tells whether a combination of these keys is excluded."""
    rules = [_rule(rule, keys) for rule in config.exclude]
    return lambda settings: any(_fits(rule, settings) for rule in rules)


def identity(settings: Mapping[str, Any]) -> str:
    """Return what two points have in common exactly where they are the same."""
    return json.dumps(settings, sort_keys=True)


def joined(before: Sequence[Point], wanted: Sequence[Point], limit: int | None) -> list[Point]:
    """Return the points of a sweep that may have grown: those it had, then new ones up to a limit.

    Those it had are kept whatever the limit is now.
    """
    known = {identity(point.settings) for point in before}
    fresh = [point for point in wanted if identity(point.settings) not in known]
    if limit is not None:
        fresh = fresh[: max(limit - len(before), 0)]
    return [
        *before,
        *(Point(len(before) + n, p.settings, p.overrides) for n, p in enumerate(fresh)),
    ]
