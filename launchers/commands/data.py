"""`shardwright data`: what a run trains on, and what the cache holds of it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence

from shardwright.launchers.ranks import child
from shardwright.train.data.upkeep import show
from shardwright.train.data.upkeep.target import target_of
from shardwright.train.errors import FAILED
from shardwright.train.program import package_environment


def main(arguments: Sequence[str]) -> int:
    """Run one of the commands below `data`; return its exit code."""
    match arguments:
        case [command, *rest] if command in _COMMANDS:
            return _COMMANDS[command](rest)
        case _:
            parser().parse_args(arguments)  # shows the help, or says what is wrong
            return FAILED  # not reached


def parsers() -> Mapping[str, argparse.ArgumentParser]:
    """Return the command lines of the commands below `data`."""
    return {"show": show.parser()}


def parser() -> argparse.ArgumentParser:
    """Return the command line of `shardwright data`."""
    found = argparse.ArgumentParser(
        prog="shardwright data",
        description="Show what a run trains on, and look after the cache of tokens.",
        epilog="Each command shows its flags with --help.",
    )
    below = found.add_subparsers(required=True, metavar="COMMAND")
    for name, of in parsers().items():
        below.add_parser(name, help=of.description)
    return found


def _show(arguments: Sequence[str]) -> int:
    options = parsers()["show"].parse_args(arguments)
    target_of(options.path)  # says at once where there is nothing to show
    argv = [sys.executable, "-m", "shardwright.train.data.upkeep.show", *arguments]
    child.replace(argv, package_environment(os.environ))
    return FAILED  # not reached: this process is shardwright.train.data.upkeep.show now


_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"show": _show}
