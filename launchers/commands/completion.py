"""Shell completion below a subcommand, which Hydra's own does not know of."""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Callable, Mapping, Sequence

from shardwright.launchers.composition import engine_file
from shardwright.launchers.composition.compose import CONF, compose, group_options
from shardwright.launchers.composition.errors import qualify
from shardwright.launchers.plan import hardware
from shardwright.launchers.plan.kept import HERE
from shardwright.launchers.sweep import definition

PROGRAM_FLAGS = ("--help", "--version")


def main(arguments: Sequence[str], commands: Sequence[str], module_of: Callable[[str], str]) -> int:
    """Answer Hydra's shell functions, or install them.

    ``commands`` are ours; each is the module of the name that ``module_of`` gives.
    """
    if any(argument.startswith("query=") for argument in arguments):
        candidates = complete(os.environ.get("COMP_LINE", ""), commands, module_of)
        if isinstance(candidates, list):
            print("\n".join(candidates))
            return 0
        os.environ["COMP_LINE"] = candidates
    compose(arguments)
    return 0


def complete(
    line: str, commands: Sequence[str], module_of: Callable[[str], str]
) -> list[str] | str:
    """Return the candidates for a command line, or the line to put to Hydra.

    Hydra's shell functions call ``shardwright -sc query=<shell>`` with the line in COMP_LINE, take
    all behind the program's name for overrides, and cannot parse a subcommand or a flag of ours
    among them.
    """
    program, *words = line.split()
    if not line.endswith(" ") and not words:
        return []
    last = "" if line.endswith(" ") else words.pop()
    if not words:
        return [word for word in (*commands, *PROGRAM_FLAGS) if word.startswith(last)]
    command = words[0]
    if command not in commands:
        return []
    below = _below(module_of(command))
    if below and len(words) == 1 and not last.startswith("-"):
        return [name for name in below if name.startswith(last)]
    if last.startswith("-"):
        parser = below.get(words[1]) if len(words) > 1 else None
        flags = flags_of(parser or parser_of(module_of(command)))
        return [flag for flag in flags if flag.startswith(last)]
    if command == "sweep" and last.startswith(definition.PREFIX):
        return [word for word in _of_a_sweep() if word.startswith(last)]
    if command == "sweep":
        own = (definition.PREFIX, f"{definition.PREFIX}_dir")
        words = [word for word in words if word.partition("=")[0].partition(".")[0] not in own]
    if command == "plan" and (offered := _of_hardware(last)):
        return offered
    if command not in ("train", "sweep", "prepare", "plan", "inspect"):
        return []
    if offered := _of_files(words[1:], last):
        return offered
    settings = [word for word in words[1:] if not word.startswith("--") and not _is_of_file(word)]
    overrides = [qualify(word) for word in hardware.split(settings)[1]]
    return " ".join([program, *overrides, last])


def _of_files(words: Sequence[str], last: str) -> list[str]:
    """Return what a word begins that names a file of another program's as the strategy.

    Hydra knows of none: they are translated before it composes.
    """
    if any(map(_is_of_file, words)):
        return [path for path in (f"{engine_file.PATH}=",) if last and path.startswith(last)]
    options = [*group_options()["strategy"], *engine_file.OPTIONS]
    found = [f"strategy={option}" for option in sorted(options)]
    return [word for word in found if last.startswith("strategy=") and word.startswith(last)]


def _is_of_file(word: str) -> bool:
    key, _, value = word.partition("=")
    return key == engine_file.PATH or (key == "strategy" and value in engine_file.OPTIONS)


def _of_hardware(word: str) -> list[str]:
    """Return the options and keys of hardware that a word begins, where it begins any. Pure."""
    if word.startswith(group := f"{hardware.GROUP}="):
        return [
            found
            for name in [*hardware.options(), HERE]
            if (found := group + name).startswith(word)
        ]
    if word.startswith(group := f"{hardware.GROUP}."):
        keys = (f"{group}{key}=" for key in hardware.known_keys())
        return [key for key in keys if key.startswith(word)]
    return [group] if word and (group := f"{hardware.GROUP}=").startswith(word) else []


def _of_a_sweep() -> list[str]:
    """Return the words for a sweep itself: its name among those shipped, its settings."""
    names = sorted(path.stem for path in (CONF / definition.PREFIX).glob("*.yaml"))
    return [
        *(f"{definition.PREFIX}={name}" for name in names),
        *(f"{definition.PREFIX}.{key}=" for key in definition.known_keys()),
        f"{definition.PREFIX}_dir=",
    ]


def parser_of(module: str) -> argparse.ArgumentParser:
    """Return the command line of a command's module."""
    found: argparse.ArgumentParser = importlib.import_module(module).parser()
    return found


def _below(module: str) -> Mapping[str, argparse.ArgumentParser]:
    """Return the commands below one that has some, by their names."""
    parsers = getattr(importlib.import_module(module), "parsers", dict)
    found: Mapping[str, argparse.ArgumentParser] = parsers()
    return found


def flags_of(parser: argparse.ArgumentParser) -> list[str]:
    """Return the long flags that a parser shows, sorted."""
    return sorted(
        flag
        for action in parser._actions  # argparse has no public list of them
        if action.help != argparse.SUPPRESS
        for flag in action.option_strings
        if flag.startswith("--")
    )
