"""Rows of Parquet, Arrow and Feather files."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shardwright.train.data.sources.files.errors import column_missing, no_text, twice, unreadable
from shardwright.train.data.sources.files.ranges import Range
from shardwright.train.errors import UserError

ROWS_AT_ONCE = 256
BYTES_AT_ONCE = 2**22


def rows(path: Path, text_field: str, within: Range | None = None) -> Iterator[str]:
    """Yield the text column of a Parquet, Arrow or Feather file; ``within``, of some row groups."""
    import pyarrow

    read: Callable[[Path, str], Iterator[Any]] = _arrow_columns
    if path.suffix == ".parquet":
        read = functools.partial(_parquet_columns, within=within)
    try:
        if path.stat().st_size == 0:
            return
        for column in read(path, text_field):
            # One at a time: the rows of a batch may all be long.
            yield from (text for row in column if (text := row.as_py()) is not None)
    except UnicodeDecodeError as error:
        raise UserError(
            f"data.paths: {path} holds text in {text_field} that is not UTF-8 "
            f"(0x{error.object[error.start]:02x}); save it again as UTF-8, or leave it out"
        ) from None
    except (OSError, pyarrow.ArrowException) as error:
        raise unreadable(path, error) from None


def _parquet_columns(path: Path, text_field: str, *, within: Range | None = None) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        _check_column(path, text_field, file.schema_arrow)
        rows = _rows_at_once(file.metadata, text_field)
        groups = None if within is None else list(range(*within))
        for batch in file.iter_batches(batch_size=rows, row_groups=groups, columns=[text_field]):
            yield batch.column(0)


def _rows_at_once(metadata: Any, text_field: str) -> int:
    """Return how many rows to have in memory together, going by the size of an average one."""
    most = 1
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        for j in range(group.num_columns):
            chunk = group.column(j)
            if chunk.path_in_schema == text_field:
                most = max(most, chunk.total_uncompressed_size // max(1, group.num_rows))
    return max(1, min(ROWS_AT_ONCE, BYTES_AT_ONCE // most))


def _arrow_columns(path: Path, text_field: str) -> Iterator[Any]:
    """Yield a column of Arrow's file format, as Feather is, or of its streams, as datasets has."""
    import pyarrow.ipc

    with pyarrow.memory_map(str(path)) as source:
        magic = source.read(6)
        is_file = magic == b"ARROW1"
        if magic[:4] == b"FEA1":
            raise UserError(
                f"data.paths: {path} is Feather in its version 1, which is not read; save it "
                "again as version 2"
            )
        source.seek(0)
        if is_file:
            file = pyarrow.ipc.open_file(source)
            _check_column(path, text_field, file.schema)
            batches = (file.get_batch(index) for index in range(file.num_record_batches))
        else:
            batches = stream = pyarrow.ipc.open_stream(source)
            _check_column(path, text_field, stream.schema)
        for batch in batches:
            column = batch.column(batch.schema.get_field_index(text_field))
            for start in range(0, len(column), ROWS_AT_ONCE):
                yield column.slice(start, ROWS_AT_ONCE)


def _check_column(path: Path, text_field: str, schema: Any) -> None:
    """Raise UserError where a table has not just one column of that name, of texts."""
    import pyarrow

    names = schema.names
    if text_field not in names:
        raise column_missing(str(path), text_field, names)
    if names.count(text_field) > 1:
        raise twice(str(path), text_field)
    kind = schema.field(text_field).type
    of_values = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    types = pyarrow.types
    # Null is the type of a column in which there is nothing at all.
    texts = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    if not any(is_text(of_values) for is_text in texts):
        raise no_text(str(path), text_field, str(kind))
