"""`strategy=deepspeed_file` and `accelerate_file`: a file of another program's becomes overrides.

What Hydra composes has plain values alone, and so has config.yaml: no resume reads the file again.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import yaml

from shardwright.launchers.translating.source import Kind, of_file
from shardwright.launchers.translating.translation import (
    Entry,
    Translation,
    table,
    width_of,
    word_of,
)
from shardwright.train.config.section import shown
from shardwright.train.errors import UserError

OPTIONS: dict[str, Kind] = {"deepspeed_file": "deepspeed", "accelerate_file": "accelerate"}
PATH = "strategy.path"
_DECIDES = {"precision": "precision.compute_dtype", "strategy": "strategy.stage"}
"""The key by which a field of a group contradicts the option of it."""
_shown: set[str] = set()
"""Files whose table this process has printed: points of a sweep have it in common."""


def replaced(arguments: Sequence[str]) -> list[str]:
    """Return a command line with a file's overrides in place of its name; say what became of each.

    Raises UserError where a key is refused, or contradicts what the command line itself says.
    """
    given = dict(_given(arguments))
    option = given.get("strategy")
    if option not in OPTIONS:
        if option is not None and not OPTIONS.keys().isdisjoint(option.split(",")):
            raise UserError(
                f"strategy={option}: one run has one strategy; to vary the file of an engine, say "
                f"shardwright sweep strategy={option} {PATH}=FILE"
            )
        return list(arguments)
    if (path := given.get(PATH)) is None:
        raise UserError(f"strategy={option} needs the file: {PATH}=FILE")
    found = of_file(_plain(path), _ranks(given), OPTIONS[option])
    found = _with_batch(found, given)
    _check(found, given, path)
    if path not in _shown:
        _shown.add(path)
        for line in table(found.entries, width_of(sys.stderr)):
            print(line, file=sys.stderr)
    own = [a for a in arguments if _key(a) not in ("strategy", PATH)]
    told = {_key(argument) for argument in own}
    words = [word for word in found.words() if _key(word) not in told]
    if not any(_key(word) == "strategy" for word in words):
        words = [*words, "strategy=ddp"]
    return [*words, *own]


def of_point(common: Sequence[str], own: Sequence[str], strategies: str) -> list[str]:
    """Return what points of a sweep have in common, as one with ``own`` words takes it. Pure.

    A file is of the points alone whose strategy is to read one; ``strategies`` are those of all.
    """
    mine = dict(_given(own)).get("strategy")
    if mine is None or mine in OPTIONS or not any(option in strategies for option in OPTIONS):
        return list(common)
    return [argument for argument in common if _key(argument) != PATH]


def _given(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and not argument.startswith("-"):
            yield key.lstrip("+"), value


def _key(argument: str) -> str:
    return "" if argument.startswith("-") else argument.partition("=")[0].lstrip("+")


def _plain(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _ranks(given: dict[str, str]) -> int | None:
    if given.get("launcher") == "local":
        return 1
    each, nodes = given.get("launcher.nproc_per_node", ""), given.get("launcher.nodes", "1")
    return int(each) * int(nodes) if each.isdecimal() and nodes.isdecimal() else None


_STEPS = re.compile(r"(.*\.)?gradient_accumulation_steps")


def _with_batch(found: Translation, given: dict[str, str]) -> Translation:
    """Return what was found where the command line says the batch, of which the steps follow."""
    if "trainer.global_batch_size" not in given:
        return found

    def settled(entry: Entry) -> Entry:
        if entry.outcome != "refused" or not _STEPS.fullmatch(entry.key):
            return entry
        return replace(entry, outcome="ignored", text="trainer.global_batch_size is given")

    return Translation(found.overrides, [settled(entry) for entry in found.entries])


def _check(found: Translation, given: dict[str, str], path: str) -> None:
    problems = [
        f"{PATH}={path}: {entry.key}={shown(entry.value)}: {entry.text}" for entry in found.refused
    ]
    for name, value in found.overrides.items():
        if name == "strategy":
            continue
        if name in given and _value(given[name]) != _value(word_of(name, value).partition("=")[2]):
            problems.append(
                f"{name}={given[name]} contradicts {word_of(name, value)}, which is of "
                f"{PATH}={path}; leave one of them out"
            )
    for group, key in _DECIDES.items():
        if group in found.overrides and key in given:
            option = str(found.overrides[group])
            said = _value(given[key])
            if str(said) not in option:
                problems.append(
                    f"{key}={given[key]} contradicts {group}={option}, which is of "
                    f"{PATH}={path}; leave one of them out"
                )
    if problems:
        raise UserError("\n".join(problems))


def _value(text: str) -> Any:
    """Return a value as YAML reads it; numbers are equal however they are written."""
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    try:
        return float(found) if isinstance(found, str) else found
    except ValueError:
        return found
