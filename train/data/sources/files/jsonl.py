"""Rows of .jsonl files: an object on each line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from shardwright.train.data.sources.files.decoding import decoded, lines
from shardwright.train.data.sources.files.errors import column_missing, no_text
from shardwright.train.data.sources.files.ranges import Range, line_number
from shardwright.train.errors import UserError


def rows(path: Path, text_field: str, within: Range | None = None) -> Iterator[str]:
    for place, line in enumerate(lines(decoded(path, within=within)), 1):
        if not line.strip():
            continue
        number = line_number(place, path, within)
        try:
            row = json.loads(line)
        except RecursionError:
            raise UserError(
                f"data.paths: {path}, line {number} is nested too deeply; correct the line"
            ) from None
        except ValueError as error:  # no JSON, or a number of thousands of digits
            raise UserError(
                f"data.paths: {path}, line {number} is not JSON ({error}); correct the line"
            ) from None
        if not isinstance(row, dict):
            raise UserError(
                f"data.paths: {path}, line {number} is not a JSON object; "
                f'write each row as {{"{text_field}": "..."}}'
            )
        if text_field not in row:
            raise column_missing(f"{path}, line {number}", text_field, row)
        text = row[text_field]
        if text is None:
            continue
        if not isinstance(text, str):
            raise no_text(f"{path}, line {number}", text_field, type(text).__name__)
        yield _without_surrogates(text) if "\\u" in line else text


def _without_surrogates(text: str) -> str:
    """Return a text with U+FFFD for each half of a surrogate pair, which JSON can spell alone."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
