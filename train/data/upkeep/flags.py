"""The flags of the commands that show what a run trains on."""

from __future__ import annotations

import argparse

from shardwright.train.console import terminal
from shardwright.train.data.upkeep.facts import COLUMNS, Wanted
from shardwright.train.units import bytes_of

READ_BYTES = "32MB"
"""Reading them takes a second, making tokens of them on two cores some ten."""


def add_own_flags(to: argparse.ArgumentParser) -> None:
    """Add the flags of `shardwright inspect` to a command line."""
    to.add_argument(
        "--bytes",
        type=_size,
        default=READ_BYTES,
        metavar="SIZE",
        help=f"read about this much text at most; a larger corpus is judged by it ({READ_BYTES})",
    )
    add_flags(to)


def _size(text: str) -> int:
    try:
        found = bytes_of(text)
    except ValueError:
        found = 0
    if found < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 32MB or 1GiB")
    return found


def add_flags(to: argparse.ArgumentParser) -> None:
    """Add what is said of the samples and of the form."""
    to.add_argument(
        "--samples", type=_count, default=3, metavar="N", help="the first N samples (default 3)"
    )
    to.add_argument(
        "--held-out", action="store_true", help="samples of the first evaluation, not of training"
    )
    to.add_argument("--json", action="store_true", help="print one JSON object instead")


def _count(text: str) -> int:
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return number


def wanted(options: argparse.Namespace) -> Wanted:
    """Return which samples the flags ask for."""
    return Wanted(options.samples, options.held_out, terminal.columns() or COLUMNS)
