"""Rows of .csv files."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from shardwright.train.data.sources.files.decoding import decoded, lines
from shardwright.train.data.sources.files.errors import column_missing, twice
from shardwright.train.errors import UserError


def rows(path: Path, text_field: str) -> Iterator[str]:
    csv.field_size_limit(2**31 - 1)
    # Strict, or a quote that nothing closes would take all rows behind it into one.
    reader = csv.reader((line + "\n" for line in lines(decoded(path))), strict=True)
    first_line = 1
    try:
        header = next(filter(None, reader), None)
        if header is None:
            return
        if header.count(text_field) > 1:
            raise twice(str(path), text_field)
        if text_field not in header:
            raise column_missing(str(path), text_field, header)
        column = header.index(text_field)
        first_line = reader.line_num + 1
        for row in reader:
            if len(row) > len(header):
                raise UserError(
                    f"data.paths: {path}, line {first_line} has {len(row)} fields, and the header "
                    f"names {len(header)}; put quotes around a field that holds a comma"
                )
            if len(row) > column:
                yield row[column]
            elif row:
                raise UserError(
                    f"data.paths: {path}, line {first_line} has {len(row)} fields and no "
                    f"{text_field}; correct the line"
                )
            first_line = reader.line_num + 1
    except csv.Error as error:
        what = f"is not CSV ({error})"
        if "unexpected end of data" in str(error):
            what = "opens a quote that is never closed"
        raise UserError(
            f"data.paths: {path}, line {first_line} {what}; correct the line, and write a quote "
            'within quotes as ""'
        ) from None
