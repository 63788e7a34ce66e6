"""Rows of Parquet, Arrow and Feather files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from shardwright.train.data.sources.files.errors import (
    BadDocument,
    column_missing,
    file_is_bad,
    no_text,
    row_is_bad,
    twice,
    unreadable,
)
from shardwright.train.data.sources.files.fields import names_of, texts_within
from shardwright.train.data.sources.files.file import File
from shardwright.train.data.sources.files.formats import ending
from shardwright.train.data.sources.files.pieces import Row
from shardwright.train.data.sources.files.ranges import Range
from shardwright.train.data.sources.files.skipping import Skipping
from shardwright.train.data.sources.mapped import forgetting, mapped

ROWS_AT_ONCE = 256
BYTES_AT_ONCE = 2**22
LISTS = {"list", "element", "item", "bag", "array", "array_element"}
"""What Parquet's writers put into a column's path for a list in it."""

Found = TypeVar("Found")


class Place(NamedTuple):
    """Where the texts of a table are."""

    column: str
    within: tuple[str, ...] = ()
    """Names of fields, each in the one before."""
    rest: tuple[str, ...] = ()
    """What leads on from there, where there are lists."""


def rows(
    file: File, text_field: str, within: Range | None, bad: Skipping, with_fields: bool = False
) -> Iterator[Row]:
    """Yield the texts of a Parquet, Arrow or Feather file; ``within``, of some row groups.

    Rows without one are left out.
    """
    import pyarrow

    if ending(file.name) == ".parquet":
        columns = _parquet_columns(file, text_field, within, with_fields)
    else:
        columns = _arrow_columns(file, text_field)
    try:
        for rest, column, batch in columns:
            # One at a time: the rows of a batch may all be long.
            for index, value in enumerate(column):
                try:
                    texts = _texts(value, rest, text_field, file)
                    fields = _fields(batch, index, text_field, file) if with_fields else None
                except BadDocument as error:
                    bad.meet(error)
                else:
                    yield from (Row(text, fields) for text in texts)
    except (OSError, pyarrow.ArrowException) as error:
        raise unreadable(file, error) from None


def _fields(batch: Any, index: int, text_field: str, file: File) -> dict[str, Any]:
    """Return what else there is in a row of a batch."""
    names = enumerate(batch.schema.names)
    return {
        name: _plain(batch.column(number)[index], name, file)
        for number, name in names
        if name != text_field
    }


def _plain(value: Any, name: str, file: File) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise row_is_bad(
            "that are not UTF-8",
            file,
            f" holds text in {name} that is not UTF-8 (0x{error.object[error.start]:02x}); "
            "save it again as UTF-8, or leave it out",
        ) from None


def _texts(value: Any, rest: Sequence[str], text_field: str, file: File) -> list[str]:
    row = _plain(value, text_field, file)
    return [row] if isinstance(row, str) else list(texts_within(row, rest, text_field, str(file)))


def _parquet_columns(
    file: File, text_field: str, within: Range | None, with_fields: bool
) -> Iterator[tuple[Sequence[str], Any, Any]]:
    """Yield what leads on from a column of texts, the column, and the batch that it is of."""
    import pyarrow.parquet

    with contextlib.ExitStack() as opened:
        source: Any = file if isinstance(file, Path) else opened.enter_context(file.open("rb"))
        table = opened.enter_context(pyarrow.parquet.ParquetFile(source))
        place = _place(file, text_field, table.schema_arrow)
        paths = [table.schema.column(i).path for i in range(len(table.schema))]
        columns = paths if with_fields else _columns(place, paths)
        rows = rows_at_once(table.metadata, columns)
        groups = None if within is None else list(range(*within))
        for batch in table.iter_batches(rows, groups, None if with_fields else columns):
            column = batch.column(batch.schema.get_field_index(place.column))
            yield place.rest, _inner(column, place), batch


def _columns(place: Place, paths: Sequence[str]) -> list[str]:
    """Return which of Parquet's columns, by their paths, hold the texts of a table. Pure."""
    if not place.within and not place.rest:
        return [place.column]
    names = [place.column, *place.within, *(n for n in place.rest if not n.isdecimal())]

    def leads_there(path: str) -> bool:
        left = list(names)
        for part in path.split("."):
            if left and part == left[0]:
                del left[0]
            elif part not in LISTS:
                return False
        return not left

    return [path for path in paths if leads_there(path)] or [place.column]


def rows_at_once(metadata: Any, columns: Sequence[str]) -> int:
    """Return how many rows to have in memory together, going by the size of an average one."""
    most = 1
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        for j in range(group.num_columns):
            chunk = group.column(j)
            path = chunk.path_in_schema
            if any(path == column or path.startswith(f"{column}.") for column in columns):
                most = max(most, chunk.total_uncompressed_size // max(1, group.num_rows))
    return _rows_of(most)


def _arrow_columns(file: File, text_field: str) -> Iterator[tuple[Sequence[str], Any, Any]]:
    def place_of(schema: Any) -> Place:
        return _place(file, text_field, schema)

    for place, batch in arrow_batches(file, place_of):
        column = _inner(batch.column(batch.schema.get_field_index(place.column)), place)
        yield place.rest, column, batch


def arrow_batches(file: File, looked_at: Callable[[Any], Found]) -> Iterator[tuple[Found, Any]]:
    """Yield Arrow's file format, as Feather is, or its streams, as datasets has, by some rows.

    Each comes with what was found in the schema, which is looked at first.
    """
    import pyarrow.ipc

    with contextlib.ExitStack() as opened:
        pages = None
        if isinstance(file, Path):
            # Whoever wrote it may have put all of it into one batch, which would be memory if read.
            pages = mapped(file)
            source = pyarrow.BufferReader(pyarrow.py_buffer(pages))
        else:
            stream = opened.enter_context(file.open("rb"))
            source = opened.enter_context(pyarrow.PythonFile(stream, mode="r"))
        magic = source.read(6)
        is_file = magic == b"ARROW1"
        if magic[:4] == b"FEA1":
            raise file_is_bad(
                "",
                file,
                " is Feather in its version 1, which is not read; save it again as version 2",
            )
        source.seek(0)
        if is_file:
            table = pyarrow.ipc.open_file(source)
            schema = table.schema
            batches = (table.get_batch(index) for index in range(table.num_record_batches))
        else:
            batches = pyarrow.ipc.open_stream(source)
            schema = batches.schema
        found = looked_at(schema)
        parts = (part for batch in batches for part in _parts(batch))
        for part in forgetting(parts, pages, lambda part: part.nbytes):
            yield found, part


def _parts(batch: Any) -> Iterator[Any]:
    """Yield a batch by as many rows as are to be in memory together."""
    rows = _rows_of(batch.nbytes // max(1, batch.num_rows))
    for start in range(0, batch.num_rows, rows):
        yield batch.slice(start, rows)


def _rows_of(row_bytes: int) -> int:
    """Return how many rows of a size to have in memory together. Pure."""
    return max(1, min(ROWS_AT_ONCE, BYTES_AT_ONCE // max(1, row_bytes)))


def _inner(column: Any, place: Place) -> Any:
    if not place.within:
        return column
    import pyarrow.compute

    return pyarrow.compute.struct_field(column, list(place.within))


def _place(file: File, text_field: str, schema: Any) -> Place:
    """Return where the texts of a table are; raise UserError where they are in no column of it."""
    import pyarrow

    types = pyarrow.types
    where = str(file)
    column, *names = names_of(schema.names, text_field)
    if column not in schema.names:
        raise column_missing(where, text_field, schema.names)
    if schema.names.count(column) > 1:
        raise twice(where, column)
    outer = kind = schema.field(column).type
    within: list[str] = []
    rest: list[str] = []
    for name in names:
        if is_list(kind) and name.isdecimal():
            rest.append(name)
            kind = kind.value_type
            continue
        while is_list(kind):
            kind = kind.value_type
            rest = rest or [""]
        if not types.is_struct(kind):
            raise no_text(where, text_field, str(kind))
        if kind.get_field_index(name) < 0:
            raise column_missing(where, text_field, [field.name for field in kind])
        kind = kind.field(name).type
        (rest if rest else within).append(name)
    if is_list(kind):
        kind = kind.value_type
    of_values = kind.value_type if types.is_dictionary(kind) else kind
    # Null is the type of a column in which there is nothing at all.
    texts = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    if not any(is_text(of_values) for is_text in texts):
        raise no_text(where, text_field, str(kind if names else outer))
    return Place(column, tuple(within), tuple(filter(None, rest)))


def is_list(kind: Any) -> bool:
    from pyarrow import types

    return any(
        is_list(kind) for is_list in (types.is_list, types.is_large_list, types.is_fixed_size_list)
    )
