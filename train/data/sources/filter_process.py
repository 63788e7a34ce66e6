"""The process that calls a filter of the user's: `python -m` runs it, `filtering` feeds it."""

from __future__ import annotations

import inspect
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from shardwright.train import own_parts
from shardwright.train.data.sources.filtering import KEY, Failed
from shardwright.train.process.frames import read, write
from shardwright.train.process.parent import end_with


def main(name: str, parent: int) -> None:
    """Answer batches of documents until standard input is closed."""
    # A Ctrl-C reaches every process of the terminal; this one ends with the one that it works for.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not end_with(parent):
        return
    given, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the function prints is no answer
    with suppress(EOFError, BrokenPipeError):
        try:
            call = imported(own_parts.part(KEY, name))
        except BaseException as error:
            write(answers, f"it cannot be imported: {own_parts.said(error)}")
            return
        write(answers, takes_fields(call))
        while True:
            write(answers, [answered(call, *document) for document in read(given)])


def imported(found: own_parts.Part) -> Callable[..., Any]:
    """Return the function; raise what its module raises, or AttributeError, or TypeError."""
    call: Callable[..., Any] = own_parts.imported(found)
    if (count := _required(call)) > 2:
        raise TypeError(
            f"{found.name} takes {count} arguments, and is called with a document's text, or with "
            "that and the other fields of its row"
        )
    return call


def takes_fields(call: Callable[..., Any]) -> bool:
    """Return whether a function is called with what else a document's row has: if it has to be."""
    return _required(call) == 2


def _required(call: Callable[..., Any]) -> int:
    """Return how many arguments a function has to be given by their places."""
    try:
        parameters = inspect.signature(call).parameters.values()
    except (TypeError, ValueError):  # one that is compiled may not tell
        return 1
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in by_place and p.default is inspect.Parameter.empty for p in parameters)


def answered(call: Callable[..., Any], *document: Any) -> bool | str | Failed:
    """Return what becomes of a document: whether it stays, or its new text."""
    try:
        answer = call(*document)
    except Exception as error:
        return Failed(own_parts.said(error))
    if isinstance(answer, bool | str):
        return answer
    if type(answer).__name__ == "bool":  # numpy's
        return bool(answer)
    return Failed(
        f"it returned {type(answer).__name__}; return True to keep a document, False to drop it, "
        "or its new text"
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
    os._exit(0)
