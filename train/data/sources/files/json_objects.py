"""Rows of .jsonl files, an object on each line, and of .json files, an array of objects."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from shardwright.train.data.sources.files.decoding import decoded, has_bad_bytes, lines
from shardwright.train.data.sources.files.errors import FILES, BadDocument, row_is_bad
from shardwright.train.data.sources.files.fields import others, texts_at
from shardwright.train.data.sources.files.file import File
from shardwright.train.data.sources.files.pieces import Row
from shardwright.train.data.sources.files.ranges import Range, line_number
from shardwright.train.data.sources.files.skipping import Skipping

SPACE = " \t\n\r"
_HALF = re.compile("[\ud800-\udfff]")


class _Line(NamedTuple):
    """A line's place, which is counted where it is written: in a message alone."""

    file: File
    number: int
    within: Range | None

    def __str__(self) -> str:
        return f"{self.file}, line {line_number(self.number, self.file, self.within)}"


def rows_of_lines(
    file: File, text_field: str, within: Range | None, bad: Skipping, with_fields: bool = False
) -> Iterator[Row]:
    """Yield the texts of a .jsonl file's objects."""
    for number, line in enumerate(lines(decoded(file, within=within, bad=bad)), 1):
        if not line.strip():
            continue
        where = _Line(file, number, within)
        try:
            if has_bad_bytes(line):
                raise _no_utf8(where)
            loaded = _loaded(line, where)
            texts = _texts(loaded, text_field, where, "\\u" in line)
        except BadDocument as error:
            bad.meet(error)
        else:
            fields = others(loaded, text_field) if with_fields else None
            yield from (Row(text, fields) for text in texts)


def _loaded(line: str, where: object) -> Any:
    try:
        return json.loads(line)
    except RecursionError:
        raise _too_deep(where) from None
    except ValueError as error:  # no JSON, or a number of thousands of digits
        raise _no_json(where, error) from None


def rows_of_array(
    file: File, text_field: str, within: Range | None, bad: Skipping, with_fields: bool = False
) -> Iterator[Row]:
    """Yield the texts of the objects of a .json file: of an array, or one behind the other.

    Memory is bounded by the longest of them. Behind what is not JSON nothing more is read.
    """
    assert within is None, "nobody can begin midway"
    files = bad.files
    try:
        yield from _rows_of_array(file, text_field, bad, with_fields)
    except BadDocument as error:
        if not bad.skips:
            raise
        if bad.files == files:  # and it is not only cut off, which is counted
            bad.meet(BadDocument(FILES, error.before, error.place, error.after))


def _rows_of_array(file: File, text_field: str, bad: Skipping, with_fields: bool) -> Iterator[Row]:
    for found in _Objects(file).read(decoded(file, bad=bad)):
        try:
            if found.has_bad_bytes:
                raise _no_utf8(found.where)
            texts = _texts(found.row, text_field, found.where, found.has_escapes)
        except BadDocument as error:
            if not bad.skips:
                raise
            bad.meet(error)
        else:
            fields = others(found.row, text_field) if with_fields else None
            yield from (Row(text, fields) for text in texts)


def _texts(row: Any, text_field: str, where: object, has_escapes: bool) -> list[str]:
    if not isinstance(row, dict):
        raise row_is_bad(
            "that are not JSON",
            where,
            f' is not a JSON object; write each row as {{"{text_field}": "..."}}',
        )
    texts = texts_at(row, text_field, where)
    return [_without_surrogates(text) for text in texts] if has_escapes else list(texts)


class _Found(NamedTuple):
    where: str
    row: Any
    has_escapes: bool
    has_bad_bytes: bool


class _Objects:
    """A text of JSON that is taken apart as it comes in."""

    def __init__(self, file: File) -> None:
        self.file = file
        self.text = ""
        self.at = 0
        self.line = 1
        self.decoder = json.JSONDecoder()

    def read(self, chunks: Iterable[str]) -> Iterator[_Found]:
        """Yield each object, or what else stands there."""
        chunks = iter(chunks)
        is_array = self._next(chunks) == "["
        self._advance(self.at + is_array)
        count = 0
        while (sign := self._next(chunks)) and not (is_array and sign == "]"):
            if is_array and count:
                if sign != ",":
                    raise _no_json(self._where, "a comma or the array's end is expected")
                self._advance(self.at + 1)
                self._next(chunks)
            where = self._where
            row, end = self._value(chunks)
            has_escapes = self.text.find("\\u", self.at, end) >= 0
            yield _Found(where, row, has_escapes, has_bad_bytes(self.text, self.at, end))
            self._advance(end)
            count += 1
        if is_array:
            if not sign:
                raise _no_json(self._where, "the array does not end")
            self._advance(self.at + 1)
            if self._next(chunks):
                raise _no_json(self._where, "there is more behind the array's end")

    def _value(self, chunks: Iterator[str]) -> tuple[Any, int]:
        """Return the value that begins here, and where it ends, reading on where it is cut off."""
        while True:
            try:
                row, end = self.decoder.raw_decode(self.text, self.at)
                # A number or word that ends where the text does may have more to come.
                if end < len(self.text) or isinstance(row, dict | list | str):
                    return row, end
                problem = ""
            except RecursionError:
                raise _too_deep(self._where) from None
            except json.JSONDecodeError as error:
                near_end = error.pos >= len(self.text) - len('"\\uXXXX\\uXXXX')
                if not near_end and not error.msg.startswith("Unterminated string"):
                    raise _no_json(self._where, error.msg) from None
                # Not the error, which holds the text, and itself by way of this frame.
                problem = error.msg
            except ValueError as error:
                raise _no_json(self._where, error) from None
            if not self._read_on(chunks):
                if not problem:
                    return row, end
                raise _no_json(self._where, problem) from None

    def _next(self, chunks: Iterator[str]) -> str:
        """Go to the next sign that is no space and return it; "" at the end."""
        while True:
            at = self.at
            while at < len(self.text) and self.text[at] in SPACE:
                at += 1
            self._advance(at)
            if at < len(self.text):
                return self.text[at]
            if not self._read_on(chunks):
                return ""

    def _read_on(self, chunks: Iterator[str]) -> bool:
        """Read as much again as is waiting, so that what is tried again is tried a few times."""
        parts = [self.text[self.at :]]
        wanted, length = 2 * len(parts[0]), len(parts[0])
        for chunk in chunks:
            parts.append(chunk)
            length += len(chunk)
            if length > wanted:
                break
        has_more = length > len(parts[0])
        self.text, self.at = "".join(parts), 0
        return has_more

    def _advance(self, to: int) -> None:
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    @property
    def _where(self) -> str:
        return f"{self.file}, line {self.line}"


def _no_json(where: object, why: object) -> BadDocument:
    return row_is_bad("that are not JSON", where, f" is not JSON ({why}); correct the line")


def _too_deep(where: object) -> BadDocument:
    return row_is_bad("that are not JSON", where, " is nested too deeply; correct the line")


def _no_utf8(where: object) -> BadDocument:
    return row_is_bad("that are not UTF-8", where, " is not UTF-8; convert it to UTF-8")


def _without_surrogates(text: str) -> str:
    """Return a text with U+FFFD for each half of a surrogate pair, which JSON can spell alone."""
    if _HALF.search(text) is None:
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
