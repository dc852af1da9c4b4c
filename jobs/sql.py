"""SQL over the lake by DuckDB: read-only, at any state, with files and network out of reach.

Each table is a view over the Parquet files of one snapshot. `at` chooses the state: the name of a curated set (or any
tag) reads every table the tag names exactly as it was pinned, and all others as of the moment the set was made; a
snapshot id reads its table there and the others as of its commit; a time in ISO form (UTC unless it says otherwise)
reads all as of then. Only SELECT runs: DuckDB's lock on its configuration would still let COPY overwrite a file that
may be read.
"""

import csv
import itertools
import json
import math
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs.families import all_tables
from schemas.catalog import Lake
from schemas.curated import CURATED_SETS
from schemas.errors import ConfigError
from schemas.runs import RUNS
from schemas.table import Table

if TYPE_CHECKING:
    import duckdb

TAG_PREFIX = "curated/"
MAX_CELL = 60
WIDTH = 240  # of a table that no terminal shows


def run_sql(lake: Lake, query: str, at: str | None) -> pa.Table:
    """One SELECT over the tables as they are, or were at `at` -> its rows.

    Raises: ConfigError if `at` names no state, or the query is wrong or would do anything but read; UnicodeEncodeError
        if it is no text.
    """
    import duckdb

    query.encode()  # a command line may hold bytes that are no text
    connection = duckdb.connect(":memory:")
    try:
        _add_views(connection, lake, snapshots_at(lake, at))
        statements = connection.extract_statements(query)
        if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
            found = ", ".join(statement.type.name for statement in statements) or "nothing"
            raise ConfigError(f"found {found}, expected one SELECT: the lake is read-only to SQL")
        return _unique_names(connection.sql(query).to_arrow_table())
    except duckdb.Error as error:
        raise ConfigError(f"{type(error).__name__.removesuffix('Exception')} error in the query: {error}") from error
    finally:
        connection.close()


def snapshots_at(lake: Lake, at: str | None) -> dict[str, int | None]:
    """A state as people name it -> snapshot id per table name; None where the table was empty.

    Raises: ConfigError if it is no tag, snapshot id or time.
    """
    if at is None:
        return {table.name: lake.snapshot_id(table) for table in all_tables(lake)}
    tagged = _tagged(lake, at)
    if tagged:
        return _as_of(lake, _time_of(lake, at, tagged), tagged)
    if at.isascii() and at.isdigit():
        for table in all_tables(lake):
            if int(at) in lake.snapshot_ids(table):
                return _as_of(lake, lake.snapshot_time_ms(table, int(at)), {table.name: int(at)})
    try:
        moment = datetime.fromisoformat(at)
    except ValueError:
        names = sorted({name.removeprefix(TAG_PREFIX) for table in all_tables(lake) for name in lake.tags(table)})
        known = ", ".join(names) or "none yet"
        raise ConfigError(
            f"--at {at!r} is no set or tag (there are: {known}), no snapshot id (outback show tables), "
            "and no time such as 2026-01-31T12:00"
        ) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return _as_of(lake, int(moment.timestamp() * 1000), {})


def print_sql(rows: pa.Table, *, json: bool, csv: bool) -> None:
    """Rows -> stdout: a table for people, one JSON list of objects, or CSV."""
    if json:
        _print_json(rows)
    elif csv:
        _print_csv(rows)
    else:
        _print_table(rows)


# --- states ---


def _tagged(lake: Lake, name: str) -> dict[str, int]:
    found = {}
    for table in all_tables(lake):
        tags = lake.tags(table)
        snapshot_id = tags.get(TAG_PREFIX + name, tags.get(name))
        if snapshot_id is not None:
            found[table.name] = snapshot_id
    return found


def _time_of(lake: Lake, name: str, tagged: Mapping[str, int]) -> int:
    """When a set was made: at the end of its run, which saw its name published; else at the newest tagged commit."""
    sets = lake.read_where(CURATED_SETS, "name", [name.removeprefix(TAG_PREFIX)], ["run_id"])
    if len(sets):
        ends = lake.read_where(RUNS, "run_id", [sets["run_id"][0].as_py()], ["status", "written_at"])
        ends = ends.filter(pc.equal(ends["status"], "done"))
        if len(ends):
            end: datetime = ends["written_at"][0].as_py()
            return math.ceil(end.timestamp() * 1000)
    by_name = {table.name: table for table in all_tables(lake)}
    return max(lake.snapshot_time_ms(by_name[table], snapshot_id) for table, snapshot_id in tagged.items())


def _as_of(lake: Lake, timestamp_ms: int, exactly: Mapping[str, int]) -> dict[str, int | None]:
    return {
        table.name: exactly[table.name] if table.name in exactly else lake.snapshot_as_of(table, timestamp_ms)
        for table in all_tables(lake)
    }


# --- views ---


def _add_views(connection: "duckdb.DuckDBPyConnection", lake: Lake, snapshots: Mapping[str, int | None]) -> None:
    tables = [table for table in all_tables(lake) if table.name in snapshots]
    files = {t.name: lake.data_files(t, at=snapshots[t.name]) if snapshots[t.name] else [] for t in tables}
    connection.execute("SET python_enable_replacements = false")
    allowed = {name for paths in files.values() for path in paths for name in (path, _literal(path))}
    connection.execute("SET allowed_paths = $paths", {"paths": sorted(allowed)})
    for table in tables:
        connection.execute(_view(connection, table, files[table.name]))
    connection.execute("SET enable_external_access = false")
    connection.execute("SET autoinstall_known_extensions = false")
    connection.execute("SET autoload_known_extensions = false")
    connection.execute("SET lock_configuration = true")


def _view(connection: "duckdb.DuckDBPyConnection", table: Table, paths: list[str]) -> str:
    """The statement that makes a table's view, with all its columns, even those that no file has yet."""
    kinds = connection.from_arrow(table.empty()).types
    nulls = ", ".join(f'CAST(NULL AS {kind}) AS "{name}"' for name, kind in zip(table.names, kinds, strict=True))
    view = f"CREATE VIEW {table.name} AS SELECT {nulls} WHERE false"
    if not paths:
        return view
    listed = ", ".join("'" + _literal(path).replace("'", "''") + "'" for path in paths)
    return f"{view} UNION ALL BY NAME SELECT * FROM read_parquet([{listed}], union_by_name = true)"


def _literal(path: str) -> str:
    """A path -> the pattern that matches it alone: DuckDB takes every path for a pattern."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in path)


def _unique_names(rows: pa.Table) -> pa.Table:
    names: list[str] = []
    for name in rows.column_names:
        copies = (f"{name}_{count}" for count in itertools.count(1))
        names.append(
            name if name not in names else next(copy for copy in copies if copy not in rows.column_names + names)
        )
    return rows.rename_columns(names)


# --- printing ---


def _plain(value: Any) -> Any:
    """A cell -> what JSON and CSV can hold: bytes as hex, times in ISO form, no number (null) for NaN and infinities."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _print_json(rows: pa.Table) -> None:
    print(json.dumps([_plain(row) for row in rows.to_pylist()], ensure_ascii=False, allow_nan=False))


def _print_csv(rows: pa.Table) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(rows.column_names)
    for row in rows.to_pylist():
        cells = [_plain(value) for value in row.values()]
        writer.writerow([json.dumps(cell) if isinstance(cell, list | dict) else cell for cell in cells])


def _print_table(rows: pa.Table) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(caption=f"{len(rows)} rows", caption_justify="left")
    for field in rows.schema:
        right = pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
        table.add_column(Text(field.name), justify="right" if right else "left", overflow="fold")
    for row in rows.to_pylist():
        table.add_row(*(Text(_short(value)) for value in row.values()))
    console = Console()
    Console(width=console.width if console.is_terminal else WIDTH).print(table)


def _short(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bytes) and len(value) > MAX_CELL // 4:
        return f"{value[:8].hex()}... {len(value)} bytes"
    text = str(_plain(value))
    return text if len(text) <= MAX_CELL else f"{text[: MAX_CELL - 3]}..."
