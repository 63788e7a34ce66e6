"""`shardwright data`: what a run trains on, and what the cache holds of it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from shardwright.launchers.ranks import child
from shardwright.train.console import progress
from shardwright.train.data.tokens import cache
from shardwright.train.data.upkeep import show
from shardwright.train.data.upkeep.target import Target, target_of, vocabulary_of
from shardwright.train.data.upkeep.verify import Verified, entries, verify
from shardwright.train.errors import FAILED, UserError
from shardwright.train.process.arguments import path as path_of
from shardwright.train.program import package_environment
from shardwright.train.units import counted, size


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
    return {"show": show.parser(), "verify": _verify_parser()}


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


# --- verify ---------------------------------------------------------------------------------------


def _verify_parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="shardwright data verify",
        description="Read a run's tokens, or entries of the cache, and compare them with the "
        "hashes that were kept when they were written.",
        epilog="Exit codes: 0, 1 where a file differs, 2 on bad input.",
    )
    found.add_argument(
        "paths", type=path_of, nargs="*", metavar="RUN_DIR|CACHE_ENTRY", help="one or several"
    )
    found.add_argument("--all", action="store_true", help="every entry of the cache")
    _add_cache_dir(found)
    return found


def _add_cache_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache-dir",
        type=path_of,
        metavar="DIR",
        help=f"data.cache_dir of the runs (default {cache.default_root()})",
    )


def _verify(arguments: Sequence[str]) -> int:
    options = parsers()["verify"].parse_args(arguments)
    targets = list(_targets(options))
    total = sum(_bytes_in(target.entry) for target in targets)
    problems = 0
    with progress.phase("verifying", total=total, unit="B", console=sys.stderr) as shown:
        for target in targets:
            found = verify(target.entry, vocabulary_of(target), shown.advance)
            progress.write(_verified(found), sys.stdout)
            problems += len(found.problems)
    return FAILED if problems else 0


def _targets(options: argparse.Namespace) -> Iterator[Target]:
    """Yield what is to be verified. Raises UserError where that is not said, or is not there."""
    if bool(options.paths) == options.all:
        raise UserError("give run directories or entries of the cache, or --all, and not both")
    if not options.all and options.cache_dir is not None:
        raise UserError(
            "--cache-dir goes with --all: a run knows its own cache, and an entry lies in one"
        )
    if not options.all:
        yield from map(target_of, options.paths)
        return
    root = options.cache_dir or cache.default_root()
    if not root.is_dir():
        raise UserError(f"there is no cache in {root}; give the runs' data.cache_dir: --cache-dir")
    yield from (Target(entry, None) for entry in entries(root))


def _bytes_in(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*") if path.is_file())


def _verified(found: Verified) -> str:
    """Return what is said of an entry. Pure."""
    if found.problems:
        return "\n".join(
            [f"{found.entry} is not what was written:", *(f"  {p}" for p in found.problems)]
        )
    how = "hashes checked" if found.hashed else "sizes checked: it is from before hashes were kept"
    return f"{found.entry}: {counted(found.files, 'file')}, {size(found.bytes)}, whole, {how}"


_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"show": _show, "verify": _verify}
