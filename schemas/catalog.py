"""The lake: the only module that talks to PyIceberg.

Tables are append-only and every append is idempotent on the table's key: rows whose key is already there are left out,
checked again after every lost race, so a commit repeated after a crash, a lost answer or a second driver adds nothing.
Workers write Parquet files (`write_files`); the driver publishes them (`commit_files`) while the stream runs.

PyIceberg's own commit retry is switched off on our handles: it would publish rows that were checked against an older
state. Tags are set in a commit of their own, create-only, because a retried transaction drops its tag silently.
"""

import contextlib
import fcntl
import os
import pickle
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from schemas.errors import ConfigError, SchemaError, TransientError
from schemas.table import Table, content_sha256

if TYPE_CHECKING:
    from pyiceberg.catalog import Catalog
    from pyiceberg.expressions import BooleanExpression
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


@dataclass(frozen=True)
class WrittenFiles:
    """Parquet files a worker wrote for one table, not yet published. Small and picklable: it crosses the object store."""

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

    `where` is a folder (SQLite catalog and files inside it, made on first use) or `catalog:NAME`, a catalog of PyIceberg's
    own configuration; then OUTBACK_FILES names the folder for files. Instances are picklable and cheap to reopen.
    """

    def __init__(self, where: str | Path) -> None:
        self.where = str(where)
        if self.where.startswith("catalog:"):
            files = os.environ.get("OUTBACK_FILES")
            if not files:
                raise ConfigError(f"lake {self.where}: set OUTBACK_FILES to the folder for checkpoints and generated files")
            self.folder = Path(files).resolve()
        else:
            self.where = str(Path(where).resolve())
            self.folder = Path(self.where)
        self._catalog: Catalog | None = None
        self._seen: dict[str, _SeenKeys] = {}

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
    ) -> pa.Table:
        """Rows of `table` at snapshot `at` (default: now) as Arrow with the table's own types, in no particular order."""
        names = list(columns) if columns is not None else table.names
        schema = pa.schema([table.arrow_schema.field(name) for name in names])
        handle = self._load(table)
        if handle is None or (at is None and handle.current_snapshot() is None):
            return schema.empty_table()
        from pyiceberg.expressions import AlwaysTrue

        present = [name for name in names if name in handle.schema().column_names]
        scan = handle.scan(row_filter=where or AlwaysTrue(), selected_fields=tuple(present), snapshot_id=at)
        rows = scan.to_arrow()
        arrays = [rows[n].cast(schema.field(n).type) if n in present else pa.nulls(len(rows), schema.field(n).type) for n in names]
        return pa.Table.from_arrays(arrays, schema=schema)

    def read_where(self, table: Table, column: str, values: Sequence[str], columns: Sequence[str] | None = None) -> pa.Table:
        """Rows whose string `column` is one of `values`."""
        from pyiceberg.expressions import In

        if not values:
            return self.read(table, columns, at=None).slice(0, 0)
        return self.read(table, columns, where=In(column, set(values)))  # type: ignore[arg-type]  # stub lacks set[str]

    def iter_batches(
        self, table: Table, columns: Sequence[str], at: "int | None" = None, batch_rows: int = 256
    ) -> Iterator[pa.RecordBatch]:
        """Rows file by file in small batches: for tables with large cells, which must not be in memory at once."""
        import pyarrow.parquet as pq

        for path in self.data_files(table, at):
            with pq.ParquetFile(path) as file:
                yield from file.iter_batches(batch_size=batch_rows, columns=list(columns))

    def data_files(self, table: Table, at: "int | None" = None) -> list[str]:
        """Paths of the Parquet files that make up the table at a snapshot, sorted.

        Raises: SchemaError if files carry row deletes, which append-only tables never have.
        """
        handle = self._load(table)
        if handle is None or (at is None and handle.current_snapshot() is None):
            return []
        tasks = list(handle.scan(snapshot_id=at).plan_files())
        if any(task.delete_files for task in tasks):
            raise SchemaError(f"{table.name} has row deletes, written by another program; compact it there first")
        return sorted(task.file.file_path.removeprefix("file://") for task in tasks)

    def snapshot_id(self, table: Table) -> int | None:
        """The table's current snapshot, or None while it is empty."""
        handle = self._load(table)
        snapshot = handle.current_snapshot() if handle is not None else None
        return snapshot.snapshot_id if snapshot is not None else None

    def snapshot_as_of(self, table: Table, timestamp_ms: int) -> int | None:
        """The snapshot that was current at a time in milliseconds since 1970, or None if the table was empty then."""
        handle = self._load(table)
        snapshot = handle.snapshot_as_of_timestamp(timestamp_ms) if handle is not None else None
        return snapshot.snapshot_id if snapshot is not None else None

    def snapshot_time_ms(self, table: Table, snapshot_id: int) -> int:
        """When a snapshot was committed, in milliseconds since 1970. Raises: ConfigError if there is none of that id."""
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
        if handle is None:
            return {}
        return {name: ref.snapshot_id for name, ref in handle.metadata.refs.items() if ref.snapshot_ref_type.value == "tag"}

    def content_sha256(self, table: Table, at: "int | None" = None) -> str:
        """SHA-256 over the rows' content, provenance left out: equal for lakes that hold the same."""
        return content_sha256(self.read(table, table.content_columns, at=at), table.content_columns, table.key)

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
        keys = _key_strings(table, stamped)

        def publish(handle: "IcebergTable", seen: set[str], properties: dict[str, str]) -> int:
            fresh = stamped.filter(pa.array([key not in seen for key in keys]))
            if len(fresh):
                handle.append(fresh, snapshot_properties=properties)
            return len(fresh)

        return self._publish(table, publish, run_id)

    def write_files(self, table: Table, rows: pa.Table | Sequence[Mapping[str, object]], run_id: str) -> WrittenFiles:
        """In a worker: write rows as Parquet files of the table without publishing them."""
        from pyiceberg.io.pyarrow import _dataframe_to_data_files

        stamped = self._first_per_key(table, self._stamp(table, rows, run_id))
        handle = self._load_for_write(table)
        data_files = list(_dataframe_to_data_files(handle.metadata, stamped, handle.io)) if len(stamped) else []
        return WrittenFiles(table.name, pickle.dumps(data_files), tuple(_key_strings(table, stamped)))

    def commit_files(self, table: Table, written: Sequence[WrittenFiles], run_id: str) -> int:
        """In the driver: publish what workers wrote, in one snapshot; returns the rows added.

        Files that hold a key already published are read back and only their new rows are added.
        """
        import pyarrow.parquet as pq

        batches = [batch for batch in written if batch.num_rows]

        def publish(handle: "IcebergTable", seen: set[str], properties: dict[str, str]) -> int:
            taken: set[str] = set()
            whole, rest, added = [], [], 0
            for batch in batches:
                files = pickle.loads(batch.data_files)
                if seen.isdisjoint(batch.keys) and taken.isdisjoint(batch.keys):
                    whole += files
                    added += batch.num_rows
                else:
                    rows = pa.concat_tables([pq.read_table(file.file_path.removeprefix("file://")) for file in files])
                    rows = table.cast(rows)
                    fresh = [key not in seen and key not in taken for key in _key_strings(table, rows)]
                    rest.append(rows.filter(pa.array(fresh)))
                taken.update(batch.keys)
            leftover = pa.concat_tables(rest) if rest else table.empty()
            if not whole and not len(leftover):
                return 0
            from pyiceberg.io.pyarrow import _dataframe_to_data_files

            if len(leftover):
                whole += list(_dataframe_to_data_files(handle.metadata, leftover, handle.io))
            with handle.transaction() as transaction, transaction.update_snapshot(properties).merge_append() as snapshot:
                for file in whole:
                    snapshot.append_data_file(file)
            return added + len(leftover)

        return self._publish(table, publish, run_id) if batches else 0

    def tag(self, table: Table, name: str, snapshot_id: int) -> None:
        """Name a snapshot, once. The same name for the same snapshot is a no-op.

        Raises: ConfigError if the name is taken by another snapshot.
        """
        for attempt in range(COMMIT_ATTEMPTS):
            taken = self.tags(table).get(name)
            if taken == snapshot_id:
                return
            if taken is not None:
                raise ConfigError(f"tag {name!r} of {table.name} names snapshot {taken}; tags never move. Choose another name")
            handle = self._load_for_write(table)
            with _contention(attempt, table):
                handle.manage_snapshots().create_tag(snapshot_id, name).commit()
        raise TransientError(f"tag {name!r} of {table.name} could not be set in {COMMIT_ATTEMPTS} attempts")

    # --- inside ---

    def _publish(self, table: Table, publish: Any, run_id: str) -> int:
        for attempt in range(COMMIT_ATTEMPTS):
            handle = self._load_for_write(table)
            handle.metadata = handle.metadata.model_copy(
                update={"properties": {**handle.metadata.properties, "commit.retry.num-retries": "0"}}
            )
            seen = self._known_keys(table, handle)
            with _contention(attempt, table):
                return int(publish(handle, seen, {"outback.run": run_id}))
        raise TransientError(f"{table.name} could not be appended to in {COMMIT_ATTEMPTS} attempts: too many writers")

    def _known_keys(self, table: Table, handle: "IcebergTable") -> set[str]:
        """All keys of the handle's snapshot. Only files added since the last call are read."""
        seen = self._seen.setdefault(table.name, _SeenKeys())
        snapshot = handle.current_snapshot()
        if snapshot is None or snapshot.snapshot_id == seen.snapshot_id:
            return seen.keys
        new_ids = _snapshots_since(handle, snapshot, seen.snapshot_id)
        if new_ids is None:  # history was rewritten: start over
            seen.keys = set(_key_strings(table, self.read(table, list(table.key))))
        else:
            import pyarrow.parquet as pq

            for path in _files_added_by(handle, snapshot, new_ids):
                seen.keys.update(_key_strings(table, pq.read_table(path, columns=list(table.key))))
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
                rows = rows.append_column(name, pa.array([value] * len(rows), kind))
        return table.cast(rows)

    @staticmethod
    def _first_per_key(table: Table, rows: pa.Table) -> pa.Table:
        keys = _key_strings(table, rows)
        if len(set(keys)) == len(keys):
            return rows
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        return rows.take(sorted(first.values()))

    def _open_catalog(self, *, create: bool) -> "Catalog | None":
        if self._catalog is not None:
            return self._catalog
        if self.where.startswith("catalog:"):
            from pyiceberg.catalog import load_catalog

            self._catalog = load_catalog(self.where.removeprefix("catalog:"))
            if create:
                self._catalog.create_namespace_if_not_exists(NAMESPACE)
            return self._catalog
        if not (self.folder / "catalog.db").exists():
            if not create:
                return None
            self._create_embedded()
        self._catalog = self._embedded(init_tables=False)
        return self._catalog

    def _embedded(self, *, init_tables: bool) -> "Catalog":
        from pyiceberg.catalog.sql import SqlCatalog

        return SqlCatalog(
            "outback",
            uri=f"sqlite:///{self.folder}/catalog.db?timeout=60",
            warehouse=f"file://{self.folder}/tables",
            init_catalog_tables=str(init_tables).lower(),
        )

    def _create_embedded(self) -> None:
        # Creating an SQLite catalog is racy in PyIceberg: processes that start together take turns here. The database is
        # made beside its place and moved into it whole, so a process killed in between leaves nothing half made.
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._creation_lock():
            if (self.folder / "catalog.db").exists():
                return
            draft = self.folder / "catalog.db.draft"
            draft.unlink(missing_ok=True)
            from pyiceberg.catalog.sql import SqlCatalog

            catalog = SqlCatalog("outback", uri=f"sqlite:///{draft}?timeout=60", warehouse=f"file://{self.folder}/tables")
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
                handle = catalog.create_table_if_not_exists(
                    (NAMESPACE, table.name),
                    schema=table.arrow_schema,
                    properties={**COMMON_PROPERTIES, **table.properties},
                )
        if set(table.names) - set(handle.schema().column_names):
            with handle.update_schema() as update:
                update.union_by_name(table.arrow_schema)
        return handle


def _key_strings(table: Table, rows: pa.Table) -> list[str]:
    """One string per row that is equal exactly when the keys are."""
    parts = [rows[name].cast(pa.string()) for name in table.key]
    joined = parts[0] if len(parts) == 1 else pc.binary_join_element_wise(*parts, KEY_SEPARATOR)
    return joined.to_pylist()


def _snapshots_since(handle: "IcebergTable", snapshot: "Snapshot", since: int | None) -> set[int] | None:
    """Ids of the snapshots after `since` up to `snapshot`; None if `since` is not among its ancestors."""
    ids: set[int] = set()
    current: Snapshot | None = snapshot
    while current is not None and current.snapshot_id != since:
        if current.summary is not None and current.summary.operation.value != "append":
            return None
        ids.add(current.snapshot_id)
        parent = current.parent_snapshot_id
        current = handle.snapshot_by_id(parent) if parent is not None else None
    return ids if since is None or current is not None else None


def _files_added_by(handle: "IcebergTable", snapshot: "Snapshot", ids: set[int]) -> list[str]:
    return [
        entry.data_file.file_path.removeprefix("file://")
        for manifest in snapshot.manifests(handle.io)
        for entry in manifest.fetch_manifest_entry(handle.io)
        if entry.snapshot_id in ids
    ]


@contextlib.contextmanager
def _contention(attempt: int, table: Table) -> Iterator[None]:
    """Swallow what another writer's commit or a busy SQLite raises, after a growing random pause; the caller tries again."""
    from pyiceberg.exceptions import CommitFailedException, ServerError
    from sqlalchemy.exc import OperationalError

    try:
        yield
    except (CommitFailedException, ServerError, OperationalError) as error:
        if isinstance(error, OperationalError) and "locked" not in str(error) and "busy" not in str(error):
            raise TransientError(f"the catalog failed while {table.name} was committed: {error}") from error
        time.sleep(random.uniform(0.02, min(2.0, 0.05 * 2**attempt)))
