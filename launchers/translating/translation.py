"""What became of each key of another program's: overrides, and a line for each key. Pure."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TextIO

from shardwright.train.config import known_keys
from shardwright.train.config.elsewhere.row import Row
from shardwright.train.config.section import shown

Outcome = Literal["set", "extra", "ignored", "refused"]


@dataclass(frozen=True)
class Entry:
    """A key of the other program's, and what became of it."""

    key: str
    value: Any
    outcome: Outcome
    text: str
    """The overrides that it became, or the reason why it became none."""


@dataclass
class Translation:
    """Overrides in the order in which they were found, and an entry for each key."""

    overrides: dict[str, Any] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)

    def sets(self, key: str, value: Any, *others: str, **given: Any) -> None:
        """Note what a key became. ``others`` are overrides as words; of ``given``, __ is a dot."""
        pairs = [(name.replace("__", "."), each) for name, each in given.items()]
        pairs += [(word.partition("=")[0], word.partition("=")[2]) for word in others]
        for name, each in pairs:
            if name in self.overrides and self.overrides[name] != each:
                before = word_of(name, self.overrides[name])
                self.refuses(key, value, f"{word_of(name, each)} contradicts {before}")
                return
        self.overrides |= dict(pairs)
        words = " ".join(word_of(name, each) for name, each in pairs)
        self.entries.append(Entry(key, value, "set", words))

    def extra(self, key: str, value: Any) -> None:
        self.overrides[f"strategy.extra.{key}"] = value
        self.entries.append(Entry(key, value, "extra", word_of(f"strategy.extra.{key}", value)))

    def ignores(self, key: str, value: Any, why: str) -> None:
        self.entries.append(Entry(key, value, "ignored", why))

    def refuses(self, key: str, value: Any, why: str) -> None:
        self.entries.append(Entry(key, value, "refused", why))

    def by_row(self, key: str, value: Any, row: Row | None, unknown: str) -> None:
        """Note what the map of other programs' names says of a key."""
        if row is None:
            self.refuses(key, value, unknown)
        elif row.becomes == "field" and row.text in known_keys():
            self.sets(key, value, **{row.text.replace(".", "__"): value})
        elif row.becomes == "derived" or row.becomes == "command":
            self.ignores(key, value, row.text)
        elif not is_on(value):
            self.ignores(key, value, "off")
        elif row.becomes == "field":
            self.refuses(key, value, f"this value has no translation; {row.advice}")
        else:
            self.ignores(key, value, f"not included: {row.text}")

    def absorbs(
        self, other: Translation, prefix: str, names: Mapping[str, str] | None = None
    ) -> None:
        """Take over what was found elsewhere; ``names`` are what its keys are called here."""
        for name, value in other.overrides.items():
            if name in self.overrides and self.overrides[name] != value:
                before = word_of(name, self.overrides[name])
                self.refuses(f"{prefix}*", value, f"{word_of(name, value)} contradicts {before}")
            else:
                self.overrides[name] = value
        for entry in other.entries:
            key = (names or {}).get(entry.key, f"{prefix}{entry.key}")
            self.entries.append(replace(entry, key=key))

    @property
    def refused(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.outcome == "refused"]

    def words(self) -> list[str]:
        """Return the overrides as they are typed, options of groups before keys."""
        names = sorted(self.overrides, key=lambda name: "." in name)
        return [word_of(name, self.overrides[name]) for name in names]


def is_on(value: Any) -> bool:
    """Whether a value asks for anything: a section may say itself that it is off."""
    if isinstance(value, Mapping):
        return bool(value.get("enabled", True)) and bool(value)
    return value not in (False, None, 0, "", "false", "False", "none", [], "auto")


def word_of(key: str, value: Any) -> str:
    """Return an override as Hydra reads it."""
    return f"{key}={_written(value)}"


_PLAIN = re.compile(r"[A-Za-z_/.][A-Za-z0-9_/\-.+]*")


def _written(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_written, value))}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_written(each)}" for key, each in value.items()) + "}"
    text = str(value)
    is_word = text.lower() in ("true", "false", "null", "nan", "inf", "yes", "no", "on", "off")
    if _PLAIN.fullmatch(text) and not is_word:
        return text
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def table(entries: Sequence[Entry], width: int | None = None) -> Iterator[str]:
    """Yield the lines of a table: key, value, what became of it.

    Where that is wider than a terminal of ``width``, the last is below the others.
    """
    rows = [(each.key, shown(each.value), f"{_SAYS[each.outcome]}{each.text}") for each in entries]
    keys, values = (max((len(row[i]) for row in rows), default=0) for i in (0, 1))
    lines = [f"{key:<{keys}}  {value:<{values}}  {text}".rstrip() for key, value, text in rows]
    if width is None or all(len(line) <= width for line in lines):
        yield from lines
        return
    for key, value, text in rows:
        yield from textwrap.wrap(f"{key}: {value}", width, subsequent_indent="  ")
        for line in textwrap.wrap(text, width - 4, break_on_hyphens=False):
            yield f"    {line}"


def width_of(stream: TextIO) -> int | None:
    """Return how wide a terminal is; None where nobody reads it on one."""
    return shutil.get_terminal_size().columns if stream.isatty() else None


_SAYS = {"set": "", "extra": "as it is: ", "ignored": "ignored: ", "refused": "refused: "}
