"""The lake: the only module that talks to PyIceberg.

Tables are append-only and every append is idempotent on the table's key: rows whose key is already there are left out,
checked again after every lost race, so a commit repeated after a crash, a lost answer or a second driver adds nothing.
Workers write Parquet files (`write_files`); the driver publishes them (`commit_files`) while the stream runs.

PyIceberg's own commit retry is switched off on our handles: it would publish rows that were checked against an older
state. Tags are set in a commit of their own, create-only, because a retried transaction drops its tag silently.
"""

import contextlib
import fcntl
import hashlib
import os
import pickle
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from schemas.errors import ConfigError, SchemaError, TransientError
from schemas.table import Table, content_sha256

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile
    from pyiceberg.catalog import Catalog
    from pyiceberg.expressions import BooleanExpression
    from pyiceberg.manifest import DataFile
    from pyiceberg.table import Table as IcebergTable
    from pyiceberg.table.snapshots import Snapshot

NAMESPACE = "outback"
COMMIT_ATTEMPTS = 40
COMMON_PROPERTIES = {
    "format-version": "2",
    "commit.manifest-merge.enabled": "true",
    "commit.manifest.min-count-to-merge": "20",
    "write.metadata.delete-after-commit.enabled": "true",
    "write.metadata.previous-versions-max": "20",
    "write.parquet.compression-codec": "zstd",
}
KEY_SEPARATOR = "\x1f"
RUN_PROPERTY = "outback.run"
FEW_KEYS = 64  # PyIceberg prunes by up to 200


@dataclass(frozen=True)
class WrittenFiles:
    """Parquet files a worker wrote for one table, not yet published. Small and picklable: crosses the object store."""

    table: str
    data_files: bytes
    keys: tuple[str, ...]

    @property
    def num_rows(self) -> int:
        """Rows in the files."""
        return len(self.keys)


@dataclass(frozen=True)
class TableFacts:
    """What `show tables` says of one table at one snapshot."""

    name: str
    num_rows: int
    num_files: int
    num_bytes: int
    num_snapshots: int
    snapshot_id: int | None
    tags: tuple[str, ...]


@dataclass
class _SeenKeys:
    snapshot_id: int | None = None
    keys: set[str] = field(default_factory=set)


class Lake:
    """A catalog of Outback's tables plus a folder for what is not a table (checkpoints, generated files).

    `where` is a folder (SQLite catalog and files inside it, made on first use) or `catalog:NAME`, a catalog of
    PyIceberg's own configuration; then OUTBACK_FILES names the folder for files. Instances are picklable and cheap to reopen.
    """

    def __init__(self, where: str | Path) -> None:
        self.where = str(where)
        if not self.where:
            raise ConfigError("the lake has an empty name; give a folder, or catalog:NAME")
        if self.where.startswith("catalog:"):
            files = os.environ.get("OUTBACK_FILES")
            if not files:
                raise ConfigError(
                    f"lake {self.where}: set OUTBACK_FILES to the folder for checkpoints and generated files"
                )
            self.folder = Path(files).resolve()
        else:
            self.where = str(Path(where).resolve())
            self.folder = Path(self.where)
            if strange := sorted(char for char in set(self.where) if char in "#?%" or not char.isprintable()):
                found = ", ".join(map(repr, strange))
                raise ConfigError(
                    f"lake {self.where!r}: found {found} in the path, which URIs cannot hold; use another folder"
                )
        self._catalog: Catalog | None = None
        self._seen: dict[str, _SeenKeys] = {}
        self._appended_to: set[str] = set()

    def __reduce__(self) -> tuple[type["Lake"], tuple[str]]:
        return (Lake, (self.where,))

    @classmethod
    def open(cls, where: str | Path, *, must_exist: bool = False) -> "Lake":
        """The lake at `where`. Raises: ConfigError if it must exist and does not."""
        lake = cls(where)
        if must_exist and not lake.exists():
            raise ConfigError(f"there is no lake at {lake.where}; `outback ingest` makes one, or give --lake")
        return lake

    def exists(self) -> bool:
        """Whether anything was ever written here."""
        return self.where.startswith("catalog:") or (self.folder / "catalog.db").exists()

    # --- reading ---

    def read(
        self,
        table: Table,
        columns: Sequence[str] | None = None,
        where: "BooleanExpression | None" = None,
        at: "int | None" = None,
        encoded: Sequence[str] = (),
        decoded: "dict[bytes, pa.ChunkedArray] | None" = None,
    ) -> pa.Table:
        """Rows of `table` at snapshot `at` (default: now) as Arrow of the table's own types, in no order to rely on.

        Files come by their first key, so that tables which were written batch by batch alike have their rows alike.
        `encoded` names string columns of few values, to be left dictionary-encoded: a fifth of the memory.
        `decoded` is handed from read to read of tables with the same first key: a file that stores its first key in the
        very bytes of an earlier one shares its array.
        """
        names = list(columns) if columns is not None else table.names
        schema = pa.schema([table.arrow_schema.field(name) for name in names])
        for name in encoded:
            index = schema.get_field_index(name)
            schema = schema.set(
                index, schema.field(index).with_type(pa.dictionary(pa.int32(), schema.field(index).type))
            )
        handle = self._load(table)
        if handle is None or (at is None and handle.current_snapshot() is None):
            return schema.empty_table()
        if where is None:
            parts = _read_all(handle, _planned_files(handle, at), names, table.key[0], encoded, decoded)
        else:
            scan = handle.scan(row_filter=where, snapshot_id=at)
            held = [name for name in names if name in scan.projection().column_names]
            parts = [scan.select(*held).to_arrow()]
        return pa.concat_tables([_conform(part, schema) for part in parts]) if parts else schema.empty_table()

    def read_where(
        self,
        table: Table,
        column: str,
        values: Sequence[str],
        columns: Sequence[str] | None = None,
        at: "int | None" = None,
    ) -> pa.Table:
        """Rows whose string `column` is one of `values`."""
        from pyiceberg.expressions import In

        if not values:
            return self.read(table, columns, at=None).slice(0, 0)
        return self.read(table, columns, where=In(column, set(values)), at=at)

    def read_beginning(
        self, table: Table, column: str, beginning: str, columns: Sequence[str] | None = None, at: "int | None" = None
    ) -> pa.Table:
        """Rows whose string `column` begins so."""
        from pyiceberg.expressions import StartsWith

        return self.read(table, columns, where=StartsWith(column, beginning), at=at)

    def iter_batches(
        self, table: Table, columns: Sequence[str], at: "int | None" = None, batch_rows: int = 256
    ) -> Iterator[pa.RecordBatch]:
        """Rows file by file in small batches: for tables with large cells, which must not be in memory at once."""
        handle = self._load(table)
        if handle is None or (at is None and handle.current_snapshot() is None):
            return
        schema = pa.schema([table.arrow_schema.field(name) for name in columns])
        for path in _planned_files(handle, at):
            with _open_parquet(handle, path) as file:
                held = [name for name in columns if name in file.schema_arrow.names]
                for batch in file.iter_batches(batch_size=batch_rows, columns=held):
                    yield from _conform(pa.Table.from_batches([batch]), schema).to_batches()

    def data_files(self, table: Table, at: "int | None" = None) -> list[str]:
        """Paths of the Parquet files that make up the table at a snapshot, sorted.

        Raises: SchemaError if files carry row deletes, which append-only tables never have.
        """
        handle = self._load(table)
        if handle is None or (at is None and handle.current_snapshot() is None):
            return []
        return [_local(path) for path in _planned_files(handle, at)]

    def snapshot_id(self, table: Table) -> int | None:
        """The table's current snapshot, or None while it is empty."""
        handle = self._load(table)
        snapshot = handle.current_snapshot() if handle is not None else None
        return snapshot.snapshot_id if snapshot is not None else None

    def snapshot_ids(self, table: Table) -> list[int]:
        """Every snapshot of the table that can still be read, oldest first."""
        handle = self._load(table)
        return [snapshot.snapshot_id for snapshot in handle.snapshots()] if handle is not None else []

    def snapshot_as_of(self, table: Table, timestamp_ms: int) -> int | None:
        """The snapshot that was current at a time in milliseconds since 1970, or None if the table was empty then."""
        handle = self._load(table)
        snapshot = handle.snapshot_as_of_timestamp(timestamp_ms) if handle is not None else None
        return snapshot.snapshot_id if snapshot is not None else None

    def snapshot_time_ms(self, table: Table, snapshot_id: int) -> int:
        """When a snapshot was committed, in milliseconds since 1970. Raises: ConfigError if there is no such one."""
        handle = self._load(table)
        snapshot = handle.snapshot_by_id(snapshot_id) if handle is not None else None
        if snapshot is None:
            raise ConfigError(f"{table.name} has no snapshot {snapshot_id}; `outback show tables` lists what there is")
        return snapshot.timestamp_ms

    def uuid(self, table: Table) -> str | None:
        """The table's own UUID, which a dropped and remade table does not keep."""
        handle = self._load(table)
        return str(handle.metadata.table_uuid) if handle is not None else None

    def tags(self, table: Table) -> dict[str, int]:
        """Tag name -> snapshot id."""
        handle = self._load(table)
        return _tags_of(handle) if handle is not None else {}

    def only_value(self, table: Table, column: str) -> str | None:
        """The value that all rows have in a string column, as far as the bounds of the data files tell without opening one.

        None if there are several or no rows, or if the bounds were cut short, as PyIceberg cuts those of long strings.
        """
        handle = self._load(table)
        if handle is None or handle.current_snapshot() is None:
            return None
        place = handle.schema().find_field(column).field_id
        bounds: set[bytes | None] = set()
        for task in handle.scan().plan_files():
            bounds |= {(task.file.lower_bounds or {}).get(place), (task.file.upper_bounds or {}).get(place)}
        (value, *others) = bounds or {None}
        return value.decode() if value is not None and not others else None

    def content_sha256(self, table: Table, at: "int | None" = None) -> str:
        """SHA-256 over the rows' content, provenance left out: equal for lakes that hold the same."""
        return content_sha256(self.read(table, table.content_columns, at=at), table.content_columns, table.key)

    def table_names(self) -> list[str]:
        """Names of the tables that were made, in order."""
        from pyiceberg.exceptions import NoSuchNamespaceError

        catalog = self._open_catalog(create=False)
        try:
            return sorted(name[-1] for name in catalog.list_tables(NAMESPACE)) if catalog is not None else []
        except NoSuchNamespaceError:
            return []

    def stored_docs(self, name: str) -> tuple[str, dict[str, str]]:
        """What the catalog says that a table, known by its name alone, and its columns mean."""
        catalog = self._open_catalog(create=False)
        assert catalog is not None  # a table of it has a name
        handle = catalog.load_table((NAMESPACE, name))
        return handle.properties.get("comment", ""), {
            column.name: column.doc or "" for column in handle.schema().fields
        }

    def facts(self, table: Table) -> TableFacts:
        """Counts and sizes by the current snapshot's summary, without opening a data file."""
        handle = self._load(table)
        snapshot = handle.current_snapshot() if handle is not None else None
        if handle is None or snapshot is None or snapshot.summary is None:
            return TableFacts(table.name, 0, 0, 0, 0, None, ())
        summary = snapshot.summary.additional_properties
        return TableFacts(
            name=table.name,
            num_rows=int(summary.get("total-records", 0)),
            num_files=int(summary.get("total-data-files", 0)),
            num_bytes=int(summary.get("total-files-size", 0)),
            num_snapshots=len(handle.metadata.snapshots),
            snapshot_id=snapshot.snapshot_id,
            tags=tuple(sorted(self.tags(table))),
        )

    # --- writing ---

    def append(self, table: Table, rows: pa.Table | Sequence[Mapping[str, object]], run_id: str) -> int:
        """Add the rows whose keys are not there yet, in one snapshot; returns how many that were. No rows, no snapshot.

        Raises: SchemaError if the rows do not fit, TransientError if the catalog stays contended or out of reach.
        """
        stamped = self._first_per_key(table, self._stamp(table, rows, run_id))
        if not len(stamped):
            return 0
        firsts = set(pc.unique(stamped[table.key[0]]).to_pylist())

        def publish(handle: "IcebergTable", properties: dict[str, str]) -> int:
            seen = self._known_keys_of(table, handle, firsts, run_id)
            fresh = stamped
            if seen:
                fresh = stamped.filter(pa.array([key not in seen for key in _key_strings(table, stamped)]))
            if len(fresh):
                _add_files(handle, _write_parquet(handle, fresh), properties)
            return len(fresh)

        return self._publish(table, publish, run_id)

    def write_files(self, table: Table, rows: pa.Table | Sequence[Mapping[str, object]], run_id: str) -> WrittenFiles:
        """In a worker: write rows as Parquet files of the table without publishing them."""
        stamped = self._first_per_key(table, self._stamp(table, rows, run_id))
        handle = self._load_for_write(table)
        data_files = _write_parquet(handle, stamped) if len(stamped) else []
        return WrittenFiles(table.name, pickle.dumps(data_files), tuple(_key_strings(table, stamped)))

    def commit_files(self, table: Table, written: Sequence[WrittenFiles], run_id: str) -> int:
        """In the driver: publish what workers wrote, in one snapshot; returns the rows added.

        Files that hold a key already published are read back and only their new rows are added.
        """
        batches = [batch for batch in written if batch.num_rows]

        def publish(handle: "IcebergTable", properties: dict[str, str]) -> int:
            seen = self._known_keys(table, handle)
            taken: set[str] = set()
            whole, rest, added = [], [], 0
            for batch in batches:
                files = pickle.loads(batch.data_files)
                if seen.isdisjoint(batch.keys) and taken.isdisjoint(batch.keys):
                    whole += files
                    added += batch.num_rows
                else:
                    rows = pa.concat_tables([_read_columns(handle, file.file_path, table.names) for file in files])
                    rows = table.cast(_conform(rows, table.arrow_schema))
                    fresh = [key not in seen and key not in taken for key in _key_strings(table, rows)]
                    rest.append(rows.filter(pa.array(fresh)))
                taken.update(batch.keys)
            leftover = pa.concat_tables(rest) if rest else table.empty()
            if not whole and not len(leftover):
                return 0
            if len(leftover):
                whole += _write_parquet(handle, leftover)
            _add_files(handle, whole, properties)
            return added + len(leftover)

        return self._publish(table, publish, run_id) if batches else 0

    def tag(self, table: Table, name: str, snapshot_id: int) -> None:
        """Name a snapshot, once. The same name for the same snapshot is a no-op.

        Raises: ConfigError if the name is taken by another snapshot.
        """
        for attempt in range(COMMIT_ATTEMPTS):
            # Checked on the very handle that commits: from a handle that knows the tag, PyIceberg would move it.
            handle = self._load_for_write(table)
            taken = _tags_of(handle).get(name)
            if taken == snapshot_id:
                return
            if taken is not None:
                raise ConfigError(f"tag {name!r} of {table.name} names snapshot {taken}; tags never move, take another")
            with _contention(attempt, table):
                handle.manage_snapshots().create_tag(snapshot_id, name).commit()
                return
        raise TransientError(f"tag {name!r} of {table.name} could not be set in {COMMIT_ATTEMPTS} attempts")

    # --- inside ---

    def _publish(self, table: Table, publish: Any, run_id: str) -> int:
        for attempt in range(COMMIT_ATTEMPTS):
            handle = self._load_for_write(table)
            handle.metadata = handle.metadata.model_copy(
                update={"properties": {**handle.metadata.properties, "commit.retry.num-retries": "0"}}
            )
            with _contention(attempt, table):
                return int(publish(handle, {RUN_PROPERTY: run_id}))
        raise TransientError(f"{table.name} could not be appended to in {COMMIT_ATTEMPTS} attempts: too many writers")

    def _known_keys_of(self, table: Table, handle: "IcebergTable", firsts: set[str], run_id: str) -> set[str]:
        """At least those keys of the handle's snapshot that start with one of `firsts`, reading no more than it must.

        Few first parts prune files by their bounds. A ledger's keys begin with the run, so only its own commits count.
        """
        snapshot = handle.current_snapshot()
        if snapshot is None:
            return set()
        if table.ledger:
            mine = [
                s
                for s in handle.snapshots()
                if s.summary and s.summary.additional_properties.get(RUN_PROPERTY) == run_id
            ]
            paths = [path for own in mine for path in _files_added_by(handle, own)]
        elif len(firsts) <= FEW_KEYS and table.name not in self._appended_to:
            self._appended_to.add(table.name)  # the second time it pays to remember all keys
            from pyiceberg.expressions import In

            paths = _planned_files(handle, None, In(table.key[0], firsts))
        else:
            return self._known_keys(table, handle)
        return {key for path in paths for key in _keys_in(table, handle, path)}

    def _known_keys(self, table: Table, handle: "IcebergTable") -> set[str]:
        """All keys of the handle's snapshot. Only files added since the last call are read."""
        seen = self._seen.setdefault(table.name, _SeenKeys())
        snapshot = handle.current_snapshot()
        if snapshot is None or snapshot.snapshot_id == seen.snapshot_id:
            return seen.keys
        new = _snapshots_since(handle, snapshot, seen.snapshot_id)
        if new is None:  # a first look, or history was rewritten
            seen.keys = set()
            paths = _planned_files(handle, None)
        else:
            paths = [path for one in new for path in _files_added_by(handle, one)]
        for path in paths:
            seen.keys.update(_keys_in(table, handle, path))
        seen.snapshot_id = snapshot.snapshot_id
        return seen.keys

    def _stamp(self, table: Table, rows: pa.Table | Sequence[Mapping[str, object]], run_id: str) -> pa.Table:
        now = datetime.now(UTC)
        stamps = {name: value for name, value in (("run_id", run_id), ("written_at", now)) if name in table.names}
        if not isinstance(rows, pa.Table):
            return table.cast([{**stamps, **row} for row in rows])
        for name, value in stamps.items():
            if name not in rows.column_names:
                kind = table.arrow_schema.field(name).type
                rows = rows.append_column(name, pa.repeat(pa.scalar(value, kind), len(rows)))
        return table.cast(rows)

    @staticmethod
    def _first_per_key(table: Table, rows: pa.Table) -> pa.Table:
        if len(rows) < 2:
            return rows
        before, after = rows.slice(0, len(rows) - 1), rows.slice(1)  # sorted by key: equal keys are neighbours
        again = reduce(pc.and_, (pc.equal(before[name], after[name]) for name in table.key))
        if not pc.any(again).as_py():
            return rows
        return rows.filter(pa.chunked_array([pa.array([True]), *pc.invert(again).chunks]))

    def _open_catalog(self, *, create: bool) -> "Catalog | None":
        if self._catalog is not None:
            return self._catalog
        if self.where.startswith("catalog:"):
            from pyiceberg.catalog import load_catalog

            try:
                self._catalog = load_catalog(self.where.removeprefix("catalog:"))
            except ValueError as error:
                raise ConfigError(f"lake {self.where}: PyIceberg knows no such catalog ({error})") from error
            return self._catalog
        if not (self.folder / "catalog.db").exists():
            if not create:
                return None
            self._create_embedded()
        from sqlalchemy.exc import SQLAlchemyError

        try:
            catalog = self._embedded(init_tables=False)
            catalog.list_namespaces()  # one question, so that a broken database says so at once
        except SQLAlchemyError as error:
            reason = str(getattr(error, "orig", error))
            raise ConfigError(f"{self.folder}/catalog.db is no catalog of a lake: {reason}") from error
        self._catalog = catalog
        return self._catalog

    def _embedded(self, *, init_tables: bool) -> "Catalog":
        return _remembering_catalog()(
            "outback",
            uri=f"sqlite:///{self.folder}/catalog.db?timeout=60",
            warehouse=f"file://{self.folder}/tables",
            init_catalog_tables=str(init_tables).lower(),
        )

    def _create_embedded(self) -> None:
        # Creating an SQLite catalog is racy in PyIceberg: processes that start together take turns here. The database
        # is made beside its place and moved into it whole, so a process killed in between leaves nothing half made.
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._creation_lock():
            if (self.folder / "catalog.db").exists():
                return
            draft = self.folder / "catalog.db.draft"
            draft.unlink(missing_ok=True)
            from pyiceberg.catalog.sql import SqlCatalog

            catalog = SqlCatalog(
                "outback", uri=f"sqlite:///{draft}?timeout=60", warehouse=f"file://{self.folder}/tables"
            )
            catalog.create_namespace(NAMESPACE)
            catalog.close()
            draft.rename(self.folder / "catalog.db")

    @contextlib.contextmanager
    def _creation_lock(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".create.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _load(self, table: Table) -> "IcebergTable | None":
        catalog = self._open_catalog(create=False)
        if catalog is None:
            return None
        from pyiceberg.exceptions import NoSuchTableError

        try:
            return catalog.load_table((NAMESPACE, table.name))
        except NoSuchTableError:
            return None

    def _load_for_write(self, table: Table) -> "IcebergTable":
        handle = self._load(table)
        if handle is None:
            catalog = self._open_catalog(create=True)
            assert catalog is not None
            with self._creation_lock():
                catalog.create_namespace_if_not_exists(NAMESPACE)
                handle = catalog.create_table_if_not_exists(
                    (NAMESPACE, table.name),
                    schema=table.arrow_schema,
                    properties={**COMMON_PROPERTIES, **table.properties},
                )
        for attempt in range(COMMIT_ATTEMPTS):
            if set(table.names) <= set(handle.schema().column_names):
                return handle
            with _contention(attempt, table), handle.update_schema() as update:
                update.union_by_name(table.arrow_schema)
            handle = self._load(table) or handle
        raise TransientError(f"{table.name} could not be widened in {COMMIT_ATTEMPTS} attempts: too many writers")


@cache
def _remembering_catalog() -> "type[Catalog]":
    """PyIceberg's SQL catalog, made quick for a process that loads and commits a dozen tables.

    A metadata file is parsed once, for files never change; and the deep copies that a transaction takes of metadata at
    every step share the snapshots, which nobody changes either. Otherwise each commit would slow down all later ones.
    """
    from pyiceberg.catalog.sql import IcebergTables, SqlCatalog
    from pyiceberg.table import CommitTableResponse, Table
    from pyiceberg.table.metadata import TableMetadata, TableMetadataV2

    class SharingMetadata(TableMetadataV2):
        def __deepcopy__(self, memo: dict[int, Any] | None = None) -> "SharingMetadata":
            return self.model_copy(update={k: copy(v) for k, v in self.__dict__.items() if isinstance(v, list | dict)})

    def sharing(metadata: TableMetadata) -> TableMetadata:
        return SharingMetadata.model_construct(**metadata.__dict__) if type(metadata) is TableMetadataV2 else metadata

    class RememberingCatalog(SqlCatalog):
        def __init__(self, name: str, **properties: str) -> None:
            super().__init__(name, **properties)
            self._parsed: dict[str, tuple[str, TableMetadata]] = {}

        def _convert_orm_to_iceberg(self, orm_table: IcebergTables) -> Table:
            made_at = str(orm_table.metadata_location).partition("/tables/")[0].removeprefix("file://")
            folder = self.properties["warehouse"].removesuffix("/tables").removeprefix("file://")
            if made_at != folder:
                raise ConfigError(
                    f"the lake at {folder} was made at {made_at} and has been moved or copied. Its tables name their files "
                    "by absolute path, so that writing here would change that lake: move it back, or use it where it was"
                )
            location, metadata = self._parsed.get(orm_table.table_name, ("", None))
            if metadata is None or location != orm_table.metadata_location:
                loaded = super()._convert_orm_to_iceberg(orm_table)
                location, metadata = loaded.metadata_location, sharing(loaded.metadata)
                self._parsed[orm_table.table_name] = (location, metadata)
            identifier = (orm_table.table_namespace, orm_table.table_name)
            return Table(identifier, metadata, location, self._load_file_io(metadata.properties, location), self)

        def commit_table(self, table: Table, requirements: Any, updates: Any) -> CommitTableResponse:
            response = super().commit_table(table, requirements, updates)
            self._parsed[table.name()[-1]] = (response.metadata_location, sharing(response.metadata))
            return response

    return RememberingCatalog


def _key_strings(table: Table, rows: pa.Table) -> list[str]:
    """One string per row that is equal exactly when the keys are."""
    parts = [rows[name].cast(pa.string()) for name in table.key]
    joined = parts[0] if len(parts) == 1 else pc.binary_join_element_wise(*parts, KEY_SEPARATOR)
    keys: list[str] = joined.to_pylist()
    return keys


def _tags_of(handle: "IcebergTable") -> dict[str, int]:
    refs = handle.metadata.refs.items()
    return {name: ref.snapshot_id for name, ref in refs if ref.snapshot_ref_type.value == "tag"}


def _keys_in(table: Table, handle: "IcebergTable", path: str) -> list[str]:
    return _key_strings(table, _read_columns(handle, path, table.key))


def _snapshots_since(handle: "IcebergTable", snapshot: "Snapshot", since: int | None) -> "list[Snapshot] | None":
    """The snapshots after `since` up to `snapshot`; None if `since` is no ancestor of it or rows were rewritten."""
    found: list[Snapshot] = []
    current: Snapshot | None = snapshot
    while since is not None and current is not None and current.snapshot_id != since:
        if current.summary is not None and current.summary.operation.value != "append":
            return None
        found.append(current)
        parent = current.parent_snapshot_id
        current = handle.snapshot_by_id(parent) if parent is not None else None
    return found if since is not None and current is not None else None


def _files_added_by(handle: "IcebergTable", snapshot: "Snapshot") -> list[str]:
    """What one commit added: listed in manifests of its own, among what it may have merged into them."""
    return [
        entry.data_file.file_path
        for manifest in snapshot.manifests(handle.io)
        if manifest.added_snapshot_id == snapshot.snapshot_id
        for entry in manifest.fetch_manifest_entry(handle.io)
        if entry.snapshot_id == snapshot.snapshot_id
    ]


def _write_parquet(handle: "IcebergTable", rows: pa.Table) -> "list[DataFile]":
    """Rows of the table's schema -> unpublished data files. PyIceberg's `append` would check the schema once more, and
    import a printer of tables for the case that it fails.
    """
    from pyiceberg.io.pyarrow import _dataframe_to_data_files

    return list(_dataframe_to_data_files(handle.metadata, rows, handle.io))


def _add_files(handle: "IcebergTable", files: "Sequence[DataFile]", properties: dict[str, str]) -> None:
    with handle.transaction() as transaction, transaction.update_snapshot(properties).merge_append() as snapshot:
        for file in files:
            snapshot.append_data_file(file)


def _planned_files(handle: "IcebergTable", at: int | None, where: "BooleanExpression | None" = None) -> list[str]:
    """Locations of the data files at a snapshot, sorted; those that may hold what `where` asks for.

    Raises: SchemaError if files carry row deletes, which append-only tables never have.
    """
    from pyiceberg.expressions import AlwaysTrue

    tasks = list(handle.scan(row_filter=where or AlwaysTrue(), snapshot_id=at).plan_files())
    if any(task.delete_files for task in tasks):
        name = handle.name()[-1]
        raise SchemaError(f"{name} has row deletes, written by another program; compact it there first")
    return sorted(task.file.file_path for task in tasks)


def _read_all(
    handle: "IcebergTable",
    paths: Sequence[str],
    names: Sequence[str],
    first_key: str,
    encoded: Sequence[str],
    decoded: "dict[bytes, pa.ChunkedArray] | None",
) -> list[pa.Table]:
    """Files -> their rows, file by file in the order of the first key of each. Several files are read at once, by a thread
    each: Arrow would share out the columns of one, which costs more than it brings where files are small.
    """
    if len(paths) < 2:
        return [_read_columns(handle, path, names, encoded) for path in paths]

    def read(path: str) -> pa.Table:
        if decoded is not None and first_key in names and first_key not in encoded:
            return _read_sharing(handle, path, names, encoded, first_key, decoded)
        return _read_columns(handle, path, names, encoded, use_threads=False)

    with ThreadPoolExecutor(pa.cpu_count()) as pool:
        parts = list(pool.map(read, paths))
    if first_key not in names:
        return parts
    return sorted((part for part in parts if len(part)), key=lambda part: part[first_key][0].as_py())


def _read_columns(
    handle: "IcebergTable", path: str, names: Sequence[str], encoded: Sequence[str] = (), *, use_threads: bool = True
) -> pa.Table:
    """Those of the named columns that a data file has."""
    with _open_parquet(handle, path, encoded) as file:
        held = [name for name in names if name in file.schema_arrow.names]
        return file.read(columns=held, use_threads=use_threads)


def _read_sharing(
    handle: "IcebergTable",
    path: str,
    names: Sequence[str],
    encoded: Sequence[str],
    first_key: str,
    decoded: "dict[bytes, pa.ChunkedArray]",
) -> pa.Table:
    """What `_read_columns` reads. Ids take longer to decode than all scores of a family, and equal bytes hold equal ids."""
    with _open_parquet(handle, path, encoded) as file:
        held = [name for name in names if name in file.schema_arrow.names]
        with _opened(handle, path) as source:
            stored = _stored_sha256(source, file, first_key)
        if stored in decoded:
            rest = file.read(columns=[name for name in held if name != first_key], use_threads=False)
            return rest.append_column(first_key, decoded[stored])
        rows = file.read(columns=held, use_threads=False)
        decoded[stored] = rows[first_key]
        return rows


def _stored_sha256(source: pa.NativeFile, file: "ParquetFile", name: str) -> bytes:
    """Hash of a column as it is stored, encoded and compressed, and of what else its decoding depends on."""
    index = file.schema_arrow.names.index(name)  # of tables without nested columns before it, such as the key's
    digest = hashlib.sha256(f"{file.schema.column(index).max_definition_level}".encode())
    for group in range(file.metadata.num_row_groups):
        column = file.metadata.row_group(group).column(index)
        assert column.path_in_schema == name
        digest.update(f";{column.physical_type} {column.compression} {column.num_values};".encode())
        start = column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
        source.seek(start)
        digest.update(source.read(column.total_compressed_size))
    return digest.digest()


def _opened(handle: "IcebergTable", path: str) -> Any:
    local = _local(path)
    return pa.OSFile(local) if local.startswith("/") else handle.io.new_input(path).open()


def _open_parquet(handle: "IcebergTable", path: str, encoded: Sequence[str] = ()) -> "ParquetFile":
    from pyarrow.parquet import ParquetFile

    local = _local(path)
    source = local if local.startswith("/") else handle.io.new_input(path).open()
    return ParquetFile(source, read_dictionary=list(encoded))


def _local(path: str) -> str:
    return path.removeprefix("file://")


def _conform(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """Rows as stored -> rows of the schema; a column younger than the file is null."""
    held = set(rows.column_names)
    arrays = [rows[f.name].cast(f.type) if f.name in held else pa.nulls(len(rows), f.type) for f in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


@contextlib.contextmanager
def _contention(attempt: int, table: Table) -> Iterator[None]:
    """Swallow what a commit raises when others commit too, after a growing random pause; the caller tries again."""
    from pyiceberg.exceptions import (
        CommitFailedException,
        CommitStateUnknownException,
        ServerError,
        ServiceUnavailableError,
        TooManyRequestsError,
    )
    from sqlalchemy.exc import OperationalError

    busy = (
        CommitFailedException,
        CommitStateUnknownException,
        ServerError,
        ServiceUnavailableError,
        TooManyRequestsError,
    )

    try:
        yield
    except (*busy, OperationalError) as error:
        if isinstance(error, OperationalError) and "locked" not in str(error) and "busy" not in str(error):
            raise TransientError(f"the catalog failed while {table.name} was committed: {error}") from error
        time.sleep(random.uniform(0.02, min(2.0, 0.05 * 2**attempt)))
