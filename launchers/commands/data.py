"""`shardwright data`: what a run trains on, and what the cache holds of it."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from shardwright.launchers.ranks import child
from shardwright.launchers.runs import everywhere, is_done
from shardwright.train import config as run_config
from shardwright.train.console import progress
from shardwright.train.data.tokens import cache
from shardwright.train.data.upkeep import show
from shardwright.train.data.upkeep.clean import Found, chosen, look, remove
from shardwright.train.data.upkeep.target import Target, target_of, vocabulary_of
from shardwright.train.data.upkeep.verify import Verified, entries, verify
from shardwright.train.errors import FAILED, UserError
from shardwright.train.process.arguments import path as path_of
from shardwright.train.program import package_environment
from shardwright.train.units import bytes_of, counted, duration, seconds_of, size


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
    return {"show": show.parser(), "verify": _verify_parser(), "clean": _clean_parser()}


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
    if options.all:
        yield from (Target(entry, None) for entry in entries(_root(options)))
    else:
        yield from map(target_of, options.paths)


def _root(options: argparse.Namespace) -> Path:
    root: Path = (options.cache_dir or cache.default_root()).absolute()
    if not root.is_dir():
        raise UserError(f"there is no cache in {root}; give the runs' data.cache_dir: --cache-dir")
    return root


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


# --- clean ----------------------------------------------------------------------------------------


def _clean_parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="shardwright data clean",
        description="Remove from the cache what killed preparations have left and, as far as it "
        "is asked for, what was not used for longest; never what a run uses.",
        epilog="Without --older-than and --max-bytes only what is left over is removed. Exit "
        "codes: 0, 2 on bad input.",
    )
    found.add_argument(
        "--older-than",
        type=_quantity(seconds_of),
        metavar="AGE",
        help="what was not used for this long, as 30d or 12h",
    )
    found.add_argument(
        "--max-bytes",
        type=_quantity(bytes_of),
        metavar="SIZE",
        help="the longest unused until no more than this is left, as 50GB",
    )
    found.add_argument(
        "--done", action="store_true", help="also the tokens of runs that have come to their end"
    )
    found.add_argument("--dry-run", action="store_true", help="list it, and remove nothing")
    found.add_argument("--yes", action="store_true", help="do not ask")
    _add_cache_dir(found)
    return found


def _quantity(of: Callable[[str], float]) -> Callable[[str], float]:
    def quantity(text: str) -> float:
        try:
            value = of(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text} is not understood; say 30d, 12h or 45min for a time, 50GB or 1.5TB for a "
                "size"
            ) from None
        if not 0 <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is less than 0, or endless")
        return value

    return quantity


def _clean(arguments: Sequence[str]) -> int:
    options = parsers()["clean"].parse_args(arguments)
    root, runs = _root(options), everywhere(Path.cwd(), {})
    may_go = _is_done if options.done else _never
    found, now = look(root, runs, may_go), time.time()
    going = chosen(
        found,
        now=now,
        older_than_seconds=options.older_than,
        max_bytes=options.max_bytes,
    )
    print("\n".join(listing(root, found, going, options.max_bytes, now=now)))
    if not going or options.dry_run:
        return 0
    if not options.yes and not _agreed():
        print("nothing is removed")
        return 0
    freed = 0
    for each in going:
        if (why := remove(each, runs, may_go)) is None:
            freed += each.bytes
        else:
            print(f"{each.path} is kept: {why}")
    print(f"freed {size(freed)}")
    return 0


def listing(
    root: Path, found: Sequence[Found], going: Sequence[Found], max_bytes: int | None, *, now: float
) -> Iterator[str]:
    """Yield a line for each thing in a cache, and what comes of it. Pure."""
    yield f"{root}: {size(_total(found))}"
    for each in found:
        does = "remove" if each in going else "keep"
        why = each.kept_for or ("left over" if each.is_left_over else "")
        yield (
            f"  {does:<6}  {size(each.bytes):>8}  {duration(now - each.used_at):>10}  "
            f"{each.path.relative_to(root)}{f'  ({why})' if why else ''}"
        )
    left = _total(found) - _total(going)
    yield f"to remove: {size(_total(going))}, which leaves {size(left)}"
    if max_bytes is not None and left > max_bytes:
        yield f"that is more than {size(max_bytes)}: the rest is in use"


def _total(found: Sequence[Found]) -> int:
    return sum(each.bytes for each in found)


def _agreed() -> bool:
    """Ask. Raises UserError where there is nobody to ask."""
    if not sys.stdin.isatty():
        raise UserError("there is no terminal to ask on; add --yes to remove it, or --dry-run")
    try:
        return input("remove it? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _is_done(run_dir: Path) -> bool:
    """Return whether a run has come to its end, so that no resume is to open its tokens again."""
    try:
        return is_done(run_dir, run_config.load(run_dir))
    except (UserError, OSError):
        return False  # nothing is known of it


def _never(run_dir: Path) -> bool:
    del run_dir
    return False


_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "show": _show,
    "verify": _verify,
    "clean": _clean,
}
