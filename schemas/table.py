"""A column is written down once; Arrow schema, Iceberg schema, checks and the docs page derive from it.

Every write is cast through its `Table` first. That is what keeps stray columns, NaN, nulls in keys and silently widened
integers out of the lake: PyIceberg would accept some of these and Ray's own Iceberg writer would add columns by itself.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from schemas.errors import SchemaError

TIMESTAMP = pa.timestamp("us", "UTC")


@dataclass(frozen=True)
class Column:
    """One column: Arrow type, meaning with unit, and whether it says how the row came to be rather than what it says.

    `provenance` columns (run ids, times, hosts) are stored like all others but left out of a table's content hash: two
    lakes made from the same input by the same recipes then have the same hash, however often one was interrupted.
    """

    name: str
    type: pa.DataType
    doc: str
    nullable: bool = False
    provenance: bool = False

    def field(self) -> pa.Field:
        """The Arrow field, with the meaning as metadata that becomes the Iceberg column's doc."""
        return pa.field(self.name, self.type, self.nullable, {"doc": self.doc})


@dataclass(frozen=True)
class Table:
    """One append-only table: its key, its columns, and the Iceberg properties it needs beyond the common ones."""

    name: str
    doc: str
    key: tuple[str, ...]
    columns: tuple[Column, ...]
    properties: Mapping[str, str] = field(default_factory=dict)
    ledger: bool = False
    """A ledger records executions, not content: one more run is one more row, so it has no content hash."""

    @property
    def arrow_schema(self) -> pa.Schema:
        """The Arrow schema every batch is cast to, in column order."""
        return pa.schema([column.field() for column in self.columns])

    @property
    def names(self) -> list[str]:
        """Column names in order."""
        return [column.name for column in self.columns]

    @property
    def content_columns(self) -> list[str]:
        """The columns that say what a row means: everything but provenance."""
        return [column.name for column in self.columns if not column.provenance]

    def empty(self) -> pa.Table:
        """No rows, with the table's schema."""
        return self.arrow_schema.empty_table()

    def cast(self, rows: pa.Table | Sequence[Mapping[str, object]]) -> pa.Table:
        """Rows -> an Arrow table of exactly this schema, sorted by key. Missing nullable columns become null.

        Raises: SchemaError for unknown or missing columns, nulls in required columns, NaN or infinity, wrong types.
        """
        if not isinstance(rows, pa.Table):
            rows = self._from_dicts(rows)
        unknown = [name for name in rows.column_names if name not in self.names]
        if unknown:
            raise SchemaError(f"{self.name} has no column {unknown}; its columns are {self.names}")
        arrays = [self._column(rows, column) for column in self.columns]
        table = pa.Table.from_arrays(arrays, schema=self.arrow_schema)
        return table.sort_by([(name, "ascending") for name in self.key])

    def _from_dicts(self, rows: Sequence[Mapping[str, object]]) -> pa.Table:
        names = {name for row in rows for name in row}
        if not rows:
            return self.empty()
        types = {column.name: column.type for column in self.columns}
        try:
            return pa.table({n: pa.array([row.get(n) for row in rows], types.get(n)) for n in sorted(names)})
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise SchemaError(f"rows do not fit {self.name}: {error}") from error

    def _column(self, rows: pa.Table, column: Column) -> pa.ChunkedArray:
        if column.name not in rows.column_names:
            if not column.nullable:
                raise SchemaError(f"{self.name}.{column.name} is required and was not written")
            return pa.chunked_array([pa.nulls(len(rows), column.type)])
        values = rows[column.name]
        if values.type != column.type:
            try:
                values = values.cast(column.type)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise SchemaError(f"{self.name}.{column.name} does not fit {column.type}: {error}") from error
        if not column.nullable and values.null_count:
            raise SchemaError(f"{self.name}.{column.name} is required and has {values.null_count} nulls")
        if pa.types.is_floating(column.type) and not pc.all(pc.is_finite(values), min_count=0).as_py():
            raise SchemaError(f"{self.name}.{column.name} holds NaN or infinity; a score is finite or null")
        return values


def sorted_by(rows: pa.Table, key: Sequence[str]) -> pa.Table:
    """Rows in ascending order of a key. Looking first whether they are so already costs a tenth of sorting them."""
    if len(key) == 1 and len(rows) > 1:
        values = rows[key[0]]
        if pc.all(pc.less_equal(values.slice(0, len(values) - 1), values.slice(1)), min_count=0).as_py():
            return rows
    return rows.sort_by([(name, "ascending") for name in key])


def content_sha256(rows: pa.Table, columns: Iterable[str], key: Sequence[str]) -> str:
    """Rows -> SHA-256 over the named columns in key order: equal content, equal hash, whatever the files and their order."""
    ordered = sorted_by(rows, key).select(list(columns))
    digest = hashlib.sha256()
    for name in ordered.column_names:
        digest.update(f"{name}:{ordered[name].type};".encode())
        for part in _canonical_bytes(ordered[name]):
            digest.update(part)
    return digest.hexdigest()


def _canonical_bytes(values: pa.ChunkedArray) -> Iterator[bytes | memoryview]:
    """Nulls and values apart, so that what lies under a null, chunk borders and slices cannot change the hash."""
    array = values.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # several chunks of more than 2 GiB stay apart
        array = pa.concat_arrays([chunk.cast(_large(chunk.type)) for chunk in array.chunks])
    yield pc.is_null(array).cast(pa.uint8()).to_numpy(zero_copy_only=False).tobytes()
    if pa.types.is_nested(array.type):
        yield repr(array.to_pylist()).encode()
    elif (
        _large(array.type) != array.type or pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type)
    ):
        filled = pc.fill_null(array.cast(pa.large_binary()), b"")
        yield pc.binary_length(filled).to_numpy(zero_copy_only=False).tobytes()
        offsets = memoryview(filled.buffers()[1]).cast("q")
        first, last = offsets[filled.offset], offsets[filled.offset + len(filled)]
        if last > first:
            yield memoryview(filled.buffers()[2])[first:last]
    elif pa.types.is_timestamp(array.type):
        yield pc.fill_null(array.cast(pa.int64()), 0).to_numpy(zero_copy_only=False).tobytes()
    elif pa.types.is_boolean(array.type):
        yield pc.fill_null(array.cast(pa.uint8()), 0).to_numpy(zero_copy_only=False).tobytes()
    else:
        yield pc.fill_null(array, 0).to_numpy(zero_copy_only=False).tobytes()


def _large(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_string(kind):
        return pa.large_string()
    return pa.large_binary() if pa.types.is_binary(kind) else kind
