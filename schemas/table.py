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
PIECE_ROWS = 1 << 16


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
        return sorted_by(pa.Table.from_arrays(arrays, schema=self.arrow_schema), self.key)

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
    if len(rows) < 2:
        return rows
    varying = [name for name in key if not _is_constant(rows[name])]
    if len(varying) <= 1:
        values = rows[(*varying, key[0])[0]]
        if pc.all(pc.less_equal(values.slice(0, len(values) - 1), values.slice(1)), min_count=0).as_py():
            return rows
    return rows.sort_by([(name, "ascending") for name in key])


def _is_constant(values: pa.ChunkedArray) -> bool:
    first, last = values[0], values[len(values) - 1]
    return bool(first == last and first.is_valid and pc.all(pc.equal(values, first), min_count=0).as_py())


def content_sha256(rows: pa.Table, columns: Iterable[str], key: Sequence[str]) -> str:
    """Rows -> SHA-256 over the named columns in key order: equal content, equal hash, whatever the files and their order."""
    digest = hashlib.sha256()
    update_sha256(digest, sorted_by(rows, key).select(list(columns)))
    return digest.hexdigest()


def update_sha256(digest: "hashlib._Hash", rows: pa.Table, order: pa.Array | None = None) -> None:
    """Add columns to the hash of those before them. `order`: the places of the rows in key order; None if they are in it.

    Columns are put in order and hashed piece by piece: no copy is made of one. A dictionary-encoded one counts as decoded.
    """
    for name in rows.column_names:
        values = rows[name]
        kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
        digest.update(f"{name}:{kind};".encode())
        for part in _canonical_bytes(values, kind, order):
            digest.update(part)


def _canonical_bytes(
    values: pa.ChunkedArray, kind: pa.DataType, order: pa.Array | None
) -> Iterator[bytes | memoryview]:
    """Nulls and values apart, so that what lies under a null, chunk borders and slices cannot change the hash."""
    if values.null_count:
        yield from (_memory(piece.cast(pa.uint8())) for piece in _pieces(pc.is_null(values), order))
    else:
        yield bytes(len(values))
    if pa.types.is_nested(kind):
        yield repr([value for piece in _pieces(values, order) for value in piece.to_pylist()]).encode()
    elif pa.types.is_string(kind) or pa.types.is_binary(kind) or _is_large(kind):
        yield from (_memory(pc.fill_null(piece, 0).cast(pa.int64())) for piece in _pieces(_lengths(values), order))
        for piece in _pieces(values, order):
            filled = _filled(piece.cast(kind))
            offsets = memoryview(filled.buffers()[1]).cast("q")
            first, last = offsets[filled.offset], offsets[filled.offset + len(filled)]
            if last > first:
                yield memoryview(filled.buffers()[2])[first:last]
    elif pa.types.is_timestamp(kind):
        yield from (_memory(pc.fill_null(piece.cast(pa.int64()), 0)) for piece in _pieces(values, order))
    elif pa.types.is_boolean(kind):
        yield from (_memory(pc.fill_null(piece.cast(pa.uint8()), 0)) for piece in _pieces(values, order))
    else:
        yield from (_memory(pc.fill_null(piece, 0)) for piece in _pieces(values, order))


def _pieces(values: pa.ChunkedArray, order: pa.Array | None) -> Iterator[pa.Array]:
    """A column as arrays of a few rows each, in order."""
    if pa.types.is_dictionary(values.type) and not values.null_count:
        whole = values.combine_chunks()
        if len(whole.dictionary) == 1:  # as many columns are that say who wrote a row: any order is theirs
            same = pa.repeat(whole.dictionary[0], min(len(whole), PIECE_ROWS))
            yield from (same.slice(0, len(whole) - start) for start in range(0, len(whole), PIECE_ROWS))
            return
    if order is None:
        for chunk in values.chunks:
            yield from (chunk.slice(start, PIECE_ROWS) for start in range(0, len(chunk), PIECE_ROWS))
        return
    whole = values.combine_chunks()
    for start in range(0, len(order), PIECE_ROWS):
        piece = whole.take(order.slice(start, PIECE_ROWS))
        yield piece.combine_chunks() if isinstance(piece, pa.ChunkedArray) else piece


def _lengths(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    if not pa.types.is_dictionary(texts.type):
        return pc.binary_length(texts)
    chunks = [pc.binary_length(chunk.dictionary).take(chunk.indices).cast(pa.int64()) for chunk in texts.chunks]
    return pa.chunked_array(chunks, pa.int64())


def _filled(texts: pa.Array) -> pa.Array:
    return pc.fill_null(texts.cast(pa.large_binary()), b"")


def _memory(numbers: pa.Array) -> memoryview:
    return memoryview(numbers.to_numpy(zero_copy_only=False)).cast("B")


def _is_large(kind: pa.DataType) -> bool:
    return bool(pa.types.is_large_string(kind) or pa.types.is_large_binary(kind))
