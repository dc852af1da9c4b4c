"""Rows of a CSV, JSONL or Parquet file, one at a time. A broken row is an item of its own, not the end of them."""

import csv
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from schemas.errors import RowError

ROW_SUFFIXES = (".csv", ".jsonl", ".parquet")
MAX_LINE_BYTES = 64 << 20
BATCH_ROWS = 1024
SAMPLED_ROWS = 1000

csv.field_size_limit(MAX_LINE_BYTES)


@dataclass(frozen=True)
class Row:
    """Row `index` of a file, from 0: its values, or why there are none."""

    index: int
    values: Mapping[str, Any]
    error: RowError | None = None


def read_rows(path: Path, columns: tuple[str, ...] = ()) -> Iterator[Row]:
    """A .csv, .jsonl or .parquet file -> its rows in order; of Parquet only `columns` are read, where there are any.

    Raises: RowError if the file as a whole cannot be read; OSError if it cannot be opened.
    """
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl}
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(path, columns)
    return readers[suffix](path)


def columns_of(path: Path) -> tuple[str, ...]:
    """A file of rows -> its column names; of JSONL those of its first thousand rows that are objects.

    Raises: RowError if the file holds no rows at all or cannot be read; OSError if it cannot be opened.
    """
    if path.suffix.lower() == ".parquet":
        return tuple(_open_parquet(path).schema_arrow.names)
    if path.suffix.lower() == ".csv":
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            return tuple(_csv_header(csv.reader(_lines(file), strict=True)))
    broken: RowError | None = None
    found: dict[str, None] = {}
    for row in itertools.islice(_read_jsonl(path), SAMPLED_ROWS):
        found |= dict.fromkeys(row.values)
        broken = broken or row.error
    if found:
        return tuple(found)
    raise broken or RowError("EmptyFile", "found no rows, expected one JSON object per line")


def _lines(file: TextIO) -> Iterator[str]:
    """Lines of a text file. Raises: RowError if one is so long that it would not fit into memory."""
    while line := file.readline(MAX_LINE_BYTES):
        if len(line) == MAX_LINE_BYTES and not line.endswith("\n"):
            raise RowError("BrokenRows", f"found a line of more than {MAX_LINE_BYTES} characters")
        yield line


def _csv_header(reader: Iterator[list[str]]) -> list[str]:
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise RowError("BrokenRows", f"the header is not CSV: {error}") from error
    if not any(header):
        raise RowError("EmptyFile", "found no header, expected a first line of column names")
    return [name.strip() for name in header]


def _read_csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(_lines(file), strict=True)
        header = _csv_header(reader)
        index = -1
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                index += 1
                yield Row(index, {}, RowError("BrokenRow", f"line {reader.line_num} is not CSV: {error}"))
                continue
            if not cells:
                continue
            index += 1
            if len(cells) != len(header):
                found = f"line {reader.line_num} has {len(cells)} cells, expected the {len(header)} of the header"
                yield Row(index, {}, RowError("BrokenRow", found))
            else:
                yield Row(index, {name: cell for name, cell in zip(header, cells, strict=True) if cell != ""})


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        index = -1
        while line := file.readline(MAX_LINE_BYTES):
            whole = line.endswith(b"\n") or len(line) < MAX_LINE_BYTES
            while not whole and (more := file.readline(MAX_LINE_BYTES)):
                whole = more.endswith(b"\n")
                line = b""
            if line and not line.strip():
                continue
            index += 1
            yield _json_row(index, line)


def _json_row(index: int, line: bytes) -> Row:
    if not line:
        return Row(index, {}, RowError("BrokenRow", f"a line of more than {MAX_LINE_BYTES} bytes"))
    try:
        values = json.loads(line.decode("utf-8-sig" if index == 0 else "utf-8"))
    except UnicodeDecodeError as error:
        return Row(index, {}, RowError("BrokenRow", f"not UTF-8: {error}"))
    except (ValueError, RecursionError) as error:
        return Row(index, {}, RowError("BrokenRow", f"not JSON: {error}"))
    if not isinstance(values, dict):
        return Row(index, {}, RowError("BrokenRow", f"found a JSON {type(values).__name__}, expected an object"))
    return Row(index, values)


def _open_parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise RowError("BrokenRows", f"not a Parquet file: {error}") from error


def _read_parquet(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    import pyarrow as pa

    index = 0
    try:
        with _open_parquet(path) as file:
            wanted = [name for name in file.schema_arrow.names if not columns or name in columns]
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=wanted):
                for values in batch.to_pylist():
                    yield Row(index, {name: value for name, value in values.items() if value is not None})
                    index += 1
    except (pa.ArrowException, OSError) as error:
        yield Row(index, {}, RowError("BrokenRow", f"the file cannot be read from row {index} on: {error}"))
