"""The process that runs a source of the user's: `python -m` runs it, `python` reads from it."""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from shardwright.train import own_parts
from shardwright.train.process.frames import write
from shardwright.train.process.parent import end_with

KEY = "data.source"
BATCH_CHARACTERS = 2**18
BATCH_TEXTS = 256


def main(parent: int) -> None:
    """Write batches of documents, an empty one last; a text in place of one says what is wrong."""
    # A Ctrl-C reaches every process of the terminal; this one ends with the one that it works for.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not end_with(parent):
        return
    asked = json.load(sys.stdin)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the source prints is no document
    with suppress(BrokenPipeError):
        try:
            made = bound(own_parts.imported(own_parts.part(KEY, asked["source"])), asked["options"])
        except BaseException as error:
            write(answers, f"it cannot be imported: {own_parts.said(error)}")
            return
        try:
            for batch in batches(documents(made(), asked["text_field"])):
                write(answers, batch)
            write(answers, [])
        except BrokenPipeError:
            raise
        except BaseException as error:
            write(answers, own_parts.said(error))


def bound(found: Callable[..., Any], options: Mapping[str, Any]) -> Callable[[], Any]:
    """Return a call of a source with its options; raise TypeError where it does not take them."""
    with suppress(ValueError):  # one that is compiled may not tell
        try:
            inspect.signature(found).bind(**options)
        except TypeError as error:
            given = ", ".join(options) or "no options"
            raise TypeError(f"it is called with {given}: {error}") from None
    return lambda: found(**options)


def documents(source: Iterable[Any], text_field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield text and other fields of each document; raise TypeError where it is none."""
    if isinstance(source, str | bytes) or not isinstance(source, Iterable):
        raise TypeError(
            f"it gives {type(source).__name__}, and is to give what yields documents, one by one"
        )
    for number, document in enumerate(source):
        fields: dict[str, Any] = {}
        text: Any = document
        if isinstance(document, Mapping):
            if text_field not in document:
                raise TypeError(
                    f"document {number:,} has no {text_field} (it has: {', '.join(document)}); set "
                    "data.text_field"
                )
            fields = {str(name): each for name, each in document.items() if name != text_field}
            text = document[text_field]
        if not isinstance(text, str):
            raise TypeError(
                f"document {number:,} is {type(text).__name__}, and is to be a text or a mapping "
                "with one"
            )
        yield text, fields


def batches(
    given: Iterable[tuple[str, dict[str, Any]]],
) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Yield documents, as many as are sent at once."""
    batch: list[tuple[str, dict[str, Any]]] = []
    characters = 0
    for document in given:
        batch.append(document)
        characters += len(document[0])
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_TEXTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


if __name__ == "__main__":
    main(int(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)
