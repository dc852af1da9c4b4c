"""Texts: which documents a file holds, and what is none."""

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.read_rows import columns_of, read_rows
from pipeline.read_texts import BrokenText, Text, read_texts
from schemas.errors import RowError


def write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


@pytest.mark.parametrize(
    ("data", "text"),
    [("one\ntwo\n", "one\ntwo"), ("one\r\n", "one"), ("\ufeffone", "one"), (" one\n\n", " one\n"), ("日本", "日本")],
)
def test_a_plain_file_is_one_document(tmp_path: Path, data: str, text: str) -> None:
    assert list(read_texts(write(tmp_path / "x.txt", data), "CC0")) == [Text(text, 0, "CC0")]


def test_the_id_is_the_hash_of_the_text() -> None:
    assert Text("grün", 3, None).text_id == hashlib.sha256("grün".encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet", "x.csv"])
def test_a_file_of_rows_is_one_document_per_row(tmp_path: Path, name: str) -> None:
    rows = [
        {"text": "one", "licence": "MIT"},
        {"text": "two\nlines", "licence": None},
        {"text": "three", "licence": None},
    ]
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif name.endswith("csv"):
        write(path, 'text,licence\none,MIT\n"two\nlines",\nthree,\n')
    else:
        write(path, "".join(json.dumps(row) + "\n" for row in rows))
    assert list(read_texts(path, "CC0")) == [
        Text("one", 0, "MIT"),
        Text("two\nlines", 1, "CC0"),
        Text("three", 2, "CC0"),
    ]


def test_broken_rows_are_told_with_their_place_and_the_rest_is_read(tmp_path: Path) -> None:
    lines = [
        b'{"text": "one"}',
        b"{",
        b'{"text": ""}',
        b'{"text": " \\n"}',
        b'{"text": 7}',
        b'{"x": 1}',
        b'{"text": "\xff"}',
    ]
    lines += [b'{"text": "\\ud800"}', b"", b'{"text": "last"}', b"[" * 100_000]
    found = list(read_texts(write(tmp_path / "x.jsonl", b"\n".join(lines))))
    assert [item.text for item in found if isinstance(item, Text)] == ["one", "last"]
    broken = {item.row: item.error.reason for item in found if isinstance(item, BrokenText)}
    assert broken == {
        1: "BrokenRow",
        2: "EmptyText",
        3: "EmptyText",
        4: "NoText",
        5: "NoText",
        6: "BrokenRow",
        7: "NotUtf8",
        9: "BrokenRow",
    }


@pytest.mark.parametrize(("data", "reason"), [(b"\xff\xfe", "NotUtf8"), (b"", "EmptyText"), (b" \n", "EmptyText")])
def test_plain_files_that_are_no_document(tmp_path: Path, data: bytes, reason: str) -> None:
    (item,) = read_texts(write(tmp_path / "x.txt", data))
    assert isinstance(item, BrokenText)
    assert item.error.reason == reason


def test_a_parquet_file_that_breaks_off_keeps_what_came_before(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    rows = pa.table({"text": [f"text {index} " + "x" * 200 for index in range(4000)]})
    pq.write_table(rows, path, row_group_size=1000, compression="none", use_dictionary=False)
    data = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    data[start : start + 64] = b"\xff" * 64
    found = list(read_rows(write(path, bytes(data)), ("text",)))
    assert [row.index for row in found] == list(range(len(found)))
    assert all(row.error is None for row in found[:-1])
    assert 1000 <= len(found) <= 2001
    assert isinstance(found[-1].error, RowError)


def test_columns_of_a_csv_file_without_its_mark(tmp_path: Path) -> None:
    assert columns_of(write(tmp_path / "x.csv", "\ufeffpath , text\n")) == ("path", "text")


def test_a_line_longer_than_any_document_is_one_broken_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.read_rows.MAX_LINE_BYTES", 64)
    lines = [b'{"text": "short"}', b'{"text": "' + b"x" * 500 + b'"}', b'{"text": "after"}']
    found = list(read_texts(write(tmp_path / "x.jsonl", b"\n".join(lines))))
    assert [item.text if isinstance(item, Text) else item.error.reason for item in found] == [
        "short",
        "BrokenRow",
        "after",
    ]
