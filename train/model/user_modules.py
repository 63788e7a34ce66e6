"""Modules of the user's own, which register a model's classes with transformers. No torch here."""

from __future__ import annotations

import argparse
import importlib
import importlib.machinery
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from shardwright.train.config.tree import load
from shardwright.train.errors import UserError
from shardwright.train.run_directory.names import RUN_CONFIG

FLAG = "--import"


def import_all(modules: Sequence[str], asked_by: str = "model.import") -> None:
    """Import each of the modules, once in a process. Raises UserError where one cannot be."""
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever code of the user's raises
            raise UserError(_failed(name, error, asked_by)) from error


def import_for(directory: Path | None, given: Sequence[str] = ()) -> None:
    """Import what the run of a model directory, or of this directory, says, and what is given.

    Raises UserError where one cannot be imported.
    """
    import_all(given, FLAG)
    for place in () if directory is None else (directory, directory.parent):
        if (place / RUN_CONFIG).is_file():
            try:
                modules = load(place).model.imports
            except UserError:  # what is damaged in it says whoever needs it
                return
            import_all(modules)
            return


def add_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag by which a command is told of such modules."""
    parser.add_argument(
        FLAG,
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="import this first: it registers the model's classes; those of the run's model.import "
        "are imported anyway",
    )


def not_found(modules: Sequence[str]) -> Iterator[str]:
    """Yield a message for each module whose package is nowhere to be found; imports none."""
    for name in modules:
        first = name.partition(".")[0]
        if first in sys.modules or first in sys.builtin_module_names:
            continue
        if importlib.machinery.PathFinder.find_spec(first) is None:
            yield _nowhere(name, "model.import")


def _failed(name: str, error: Exception, asked_by: str) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name in (name, name.partition(".")[0]):
        return _nowhere(name, asked_by)
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{asked_by}={name} cannot be imported: {reason}; {_looked()}. Correct the module"


def _nowhere(name: str, asked_by: str) -> str:
    text = f"{asked_by}={name}: there is no such module; {_looked()}"
    here = Path.cwd()
    beside = name.partition(".")[0]
    if (here / beside).is_dir() or (here / f"{beside}.py").is_file():
        return f"{text}. It lies in the current directory: set PYTHONPATH={here}, or install it"
    return f"{text}. Install it, or set PYTHONPATH to the directory that holds it"


def _looked() -> str:
    path = os.environ.get("PYTHONPATH") or "not set"
    return f"PYTHONPATH is {path}, and the current directory, {Path.cwd()}, is not looked into"
