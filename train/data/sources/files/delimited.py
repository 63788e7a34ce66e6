"""Rows of .csv and .tsv files."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from shardwright.train.data.sources.files.decoding import decoded, has_bad_bytes, lines
from shardwright.train.data.sources.files.errors import (
    column_missing,
    file_is_bad,
    row_is_bad,
    twice,
)
from shardwright.train.data.sources.files.fields import others
from shardwright.train.data.sources.files.file import File
from shardwright.train.data.sources.files.formats import ending
from shardwright.train.data.sources.files.pieces import Row
from shardwright.train.data.sources.files.ranges import Range
from shardwright.train.data.sources.files.skipping import Skipping

SEPARATORS = {".csv": (",", "comma"), ".tsv": ("\t", "tab")}


def rows(
    file: File, text_field: str, within: Range | None, bad: Skipping, with_fields: bool = False
) -> Iterator[Row]:
    """Yield the text column; a field within quotes may hold any sign, in both formats."""
    assert within is None, "nobody can begin midway"
    csv.field_size_limit(2**31 - 1)
    separator, separator_is = SEPARATORS[ending(file.name)]
    # Strict, or a quote that nothing closes would take all rows behind it into one.
    text_lines = (line + "\n" for line in lines(decoded(file, bad=bad)))
    reader = csv.reader(text_lines, delimiter=separator, strict=True)
    first_line = 1
    try:
        header = next(filter(None, reader), None)
        if header is None:
            return
        if header.count(text_field) > 1:
            raise twice(str(file), text_field)
        if text_field not in header:
            raise column_missing(str(file), text_field, header)
        column = header.index(text_field)
        first_line = reader.line_num + 1
        for row in reader:
            if problem := _problem(row, len(header), column, text_field, separator_is):
                kind, why = problem
                bad.meet(row_is_bad(kind, f"{file}, line {first_line}", why))
            elif row:
                named = zip(header, row, strict=False)  # a row may lack its last ones
                fields = others(dict(named), text_field) if with_fields else None
                yield Row(row[column], fields)
            first_line = reader.line_num + 1
    except csv.Error as error:
        what = f"is not {ending(file.name)[1:].upper()} ({error})"
        if "unexpected end of data" in str(error):
            what = "opens a quote that is never closed"
        raise file_is_bad(
            "",
            f"{file}, line {first_line}",
            f' {what}; correct the line, and write a quote within quotes as ""',
        ) from None


def _problem(
    row: list[str], columns: int, column: int, text_field: str, separator_is: str
) -> tuple[str, str] | None:
    """Return what is wrong with a row, its kind first; None where it has a text or is blank."""
    kind = "with too many or too few fields"
    if len(row) > columns:
        return kind, (
            f" has {len(row)} fields, and the header names {columns}; put quotes around a field "
            f"that holds a {separator_is}"
        )
    if row and len(row) <= column:
        return kind, f" has {len(row)} fields and no {text_field}; correct the line"
    if row and has_bad_bytes(row[column]):
        return "that are not UTF-8", " is not UTF-8; convert it to UTF-8"
    return None
