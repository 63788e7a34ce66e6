"""Rows of .csv and .tsv files."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from shardwright.train.data.sources.files.decoding import decoded, lines
from shardwright.train.data.sources.files.errors import column_missing, twice
from shardwright.train.data.sources.files.file import File
from shardwright.train.data.sources.files.formats import ending
from shardwright.train.data.sources.files.ranges import Range
from shardwright.train.errors import UserError

SEPARATORS = {".csv": (",", "comma"), ".tsv": ("\t", "tab")}


def rows(file: File, text_field: str, within: Range | None = None) -> Iterator[str]:
    """Yield the text column; a field within quotes may hold any sign, in both formats."""
    assert within is None, "nobody can begin midway"
    csv.field_size_limit(2**31 - 1)
    separator, separator_is = SEPARATORS[ending(file.name)]
    # Strict, or a quote that nothing closes would take all rows behind it into one.
    text_lines = (line + "\n" for line in lines(decoded(file)))
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
            if len(row) > len(header):
                raise UserError(
                    f"data.paths: {file}, line {first_line} has {len(row)} fields, and the header "
                    f"names {len(header)}; put quotes around a field that holds a {separator_is}"
                )
            if len(row) > column:
                yield row[column]
            elif row:
                raise UserError(
                    f"data.paths: {file}, line {first_line} has {len(row)} fields and no "
                    f"{text_field}; correct the line"
                )
            first_line = reader.line_num + 1
    except csv.Error as error:
        what = f"is not {ending(file.name)[1:].upper()} ({error})"
        if "unexpected end of data" in str(error):
            what = "opens a quote that is never closed"
        raise UserError(
            f"data.paths: {file}, line {first_line} {what}; correct the line, and write a quote "
            'within quotes as ""'
        ) from None
