"""A function of the user's own that drops documents or rewrites them, in a process of its own."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from shardwright.train import own_files, own_parts
from shardwright.train.data.sources.files.pieces import Text, pieces
from shardwright.train.data.sources.source import Reading
from shardwright.train.errors import UserError
from shardwright.train.process.frames import read, write
from shardwright.train.program import package_environment

BATCH_CHARACTERS = 2**18
BATCH_TEXTS = 256
KEY = "data.filter"


class Document(NamedTuple):
    """What a function decides over."""

    text: str
    fields: Mapping[str, Any]
    """What else there is in its row; nothing where it is in none."""


def located(text: str | None) -> str | None:
    """Return the same function by a path that means it from any directory."""
    return None if text is None else own_parts.located(KEY, text)


def check(text: str | None) -> None:
    """Raise UserError where a file has no such function, as far as shows without running it."""
    if text is not None:
        own_parts.check(KEY, text)


def identity(text: str | None) -> dict[str, Any]:
    """Return what changes with the function's file; nothing where there is none."""
    return {} if text is None else {"filter": own_files.fingerprint(KEY, text)}


def filtered(texts: Iterable[Text], name: str, reading: Reading) -> Iterator[Text]:
    """Yield what a function leaves of documents; those that it drops are counted.

    It gets each document whole, so that a long one is in memory whole. Raises UserError where the
    function cannot be imported, raises, returns something else or ends its process.
    """
    for batch in _batches(texts):
        for document, answer in zip(batch, _running(name).answers(batch), strict=True):
            text = document.text if answer is True else answer or ""
            if text.strip():
                yield from pieces(text)
            else:
                reading.filtered += 1


def takes_fields(name: str | None) -> bool:
    """Return whether a function takes what else is in a document's row, beside its text."""
    return name is not None and _running(name).takes_fields


def _batches(texts: Iterable[Text]) -> Iterator[list[Document]]:
    """Yield whole documents, as many as are sent at once; those without any text are left out."""
    batch: list[Document] = []
    parts: list[str] = []
    fields: Mapping[str, Any] = {}
    characters = 0
    for piece in texts:
        if piece.begins:
            parts, fields = [], piece.fields or {}
        parts.append(piece.text)
        if not piece.ends:
            continue
        document = "".join(parts)
        if not document.strip():
            continue
        batch.append(Document(document, fields))
        characters += len(document)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_TEXTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


_processes: dict[str, _Process] = {}
"""Of each function one, which serves all that this process reads."""


def _running(name: str) -> _Process:
    return _processes.setdefault(name, _Process(name))


@atexit.register
def stop() -> None:
    """End the processes of all functions."""
    while _processes:
        _processes.popitem()[1].stop()


class _Process:
    """Calls the function; it ends with this process, which closes its pipe."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._child: subprocess.Popen[bytes] | None = None
        self._takes_fields = False

    @property
    def takes_fields(self) -> bool:
        if self._child is None:
            self._start()
        return self._takes_fields

    def answers(self, documents: Sequence[Document]) -> list[bool | str]:
        try:
            return self._checked(documents, self._call(documents))
        except _Ended:
            # One by one, to find which of them it was.
            for document in documents:
                try:
                    self._checked([document], self._call([document]))
                except _Ended as error:
                    raise UserError(f"{self._at(document)}: its process {error}") from None
            raise UserError(
                f"{self._at(documents[0])} or one of the {len(documents) - 1:,} after it: its "
                "process has ended"
            ) from None

    def _call(self, documents: Sequence[Document]) -> list[Any]:
        child = self._child or self._start()
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            given = [tuple(each) if self._takes_fields else (each.text,) for each in documents]
            write(child.stdin, given)
            found = read(child.stdout)
        except (BrokenPipeError, EOFError):
            self._child = None
            with child:
                code = child.wait()
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else "has ended"
            raise _Ended(how + (f" with exit code {code}" if code >= 0 else "")) from None
        assert isinstance(found, list)
        return found

    def _start(self) -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-m", "shardwright.train.data.sources.filter_process", self._name]
        child = subprocess.Popen(
            [*argv, str(os.getpid())],
            env={**os.environ, **package_environment(os.environ)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert child.stdout is not None
        try:
            answer = read(child.stdout)
        except EOFError:
            with child:
                code = child.wait()
            answer = f"its process ended with exit code {code} while it was imported"
        if isinstance(answer, str):  # what is wrong with it
            child.kill()
            raise UserError(f"{KEY}={self._name}: {answer}")
        self._child, self._takes_fields = child, bool(answer)
        return child

    def stop(self) -> None:
        if (child := self._child) is not None:
            self._child = None
            child.kill()
            with child:  # closes the pipes
                pass

    def _checked(self, documents: Sequence[Document], answers: Sequence[Any]) -> list[bool | str]:
        for document, answer in zip(documents, answers, strict=True):
            if isinstance(answer, Failed):
                raise UserError(f"{self._at(document)}: {answer.message}")
        return list(answers)

    def _at(self, document: Document) -> str:
        begin = document.text.strip()[:60]
        return f"{KEY}={self._name} failed at the document that begins with {begin!r}"


class Failed(NamedTuple):
    """What a function's process says of a document that it has no answer for."""

    message: str


class _Ended(Exception):
    """The process is no more."""
