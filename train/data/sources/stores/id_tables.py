"""Token ids in a column of lists of a Parquet, Arrow or Feather file, a document a row."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shardwright.train.data.sources.files import tables
from shardwright.train.data.sources.files.errors import column_missing, unreadable
from shardwright.train.data.sources.stores.ids import Ids, in_pieces
from shardwright.train.errors import UserError


def documents(path: Path, column: str) -> Iterator[Ids]:
    """Yield the ids of each row; rows without any are left out."""
    import pyarrow

    try:
        for values in _columns(path, column):
            for row in values:
                if not row.is_valid:
                    continue
                if row.values.null_count:
                    raise _no_ids(path, column, "a list with nulls")
                yield from in_pieces(np.asarray(row.values))
    except (OSError, pyarrow.ArrowException) as error:
        raise unreadable(path, error) from None


def _columns(path: Path, column: str) -> Iterator[Any]:
    import pyarrow.parquet

    if path.suffix == ".parquet":
        with pyarrow.parquet.ParquetFile(path) as table:
            _check(path, column, table.schema_arrow)
            rows = tables.rows_at_once(table.metadata, [column])
            for batch in table.iter_batches(batch_size=rows, columns=[column]):
                yield batch.column(0)
    else:
        for _, batch in tables.arrow_batches(path, partial(_check, path, column)):
            yield batch.column(batch.schema.get_field_index(column))


def _check(path: Path, column: str, schema: Any) -> None:
    import pyarrow

    if column not in schema.names:
        raise UserError(str(column_missing(path, column, schema.names)).replace("text", "ids"))
    kind = schema.field(column).type
    if not tables.is_list(kind) or not pyarrow.types.is_integer(kind.value_type):
        raise _no_ids(path, column, str(kind))


def _no_ids(path: Path, column: str, found: str) -> UserError:
    return UserError(
        f"data.ids_field={column}: {path} holds {found} there, not lists of whole numbers; set "
        "data.ids_field to the column that holds the ids"
    )
