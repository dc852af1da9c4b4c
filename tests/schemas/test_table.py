"""What every write goes through: types, nulls, NaN, keys; and a hash that depends on content alone."""

import hashlib
import random
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

import schemas.table
from schemas.errors import SchemaError
from schemas.table import TIMESTAMP, Column, Table, content_sha256, update_sha256

NUMBERS = Table(
    name="numbers",
    doc="For tests.",
    key=("item", "part"),
    columns=(
        Column("item", pa.string(), "first part of the key"),
        Column("part", pa.int32(), "second part of the key"),
        Column("score", pa.float32(), "a score", nullable=True),
        Column("data", pa.binary(), "bytes", nullable=True),
        Column("flag", pa.bool_(), "a flag", nullable=True),
        Column("at", TIMESTAMP, "a time", nullable=True),
        Column("parts", pa.list_(pa.int64()), "nested", nullable=True),
        Column("run", pa.string(), "who wrote it", nullable=True, provenance=True),
    ),
)
NAMES = NUMBERS.content_columns


def sha(rows: pa.Table) -> str:
    return content_sha256(rows, NAMES, NUMBERS.key)


def some_rows(count: int = 50) -> list[dict[str, object]]:
    rng = random.Random(0)
    return [
        {
            "item": f"i{index % 7}",
            "part": index,
            "score": None if index % 5 == 0 else rng.random(),
            "data": None if index % 6 == 0 else rng.randbytes(index % 4),
            "flag": None if index % 4 == 0 else index % 2 == 0,
            "at": datetime(2026, 1, 1, tzinfo=UTC),
            "parts": None if index % 3 == 0 else list(range(index % 5)),
            "run": f"run {rng.random()}",
        }
        for index in range(count)
    ]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_score_is_finite_or_null(bad: float) -> None:
    with pytest.raises(SchemaError, match="NaN or infinity"):
        NUMBERS.cast([{"item": "a", "part": 1, "score": bad}])
    assert NUMBERS.cast([{"item": "a", "part": 1, "score": None}])["score"].to_pylist() == [None]


def test_a_finite_double_that_float32_cannot_hold_is_refused() -> None:
    with pytest.raises(SchemaError):
        NUMBERS.cast([{"item": "a", "part": 1, "score": 1e39}])


def test_keys_are_never_null() -> None:
    with pytest.raises(SchemaError, match=r"numbers\.item is required and has 1 nulls"):
        NUMBERS.cast([{"item": None, "part": 1}])
    with pytest.raises(SchemaError, match="required and was not written"):
        NUMBERS.cast([{"item": "a"}])


def test_unknown_columns_and_wrong_types_are_refused() -> None:
    with pytest.raises(SchemaError, match=r"no column \['scores'\]"):
        NUMBERS.cast([{"item": "a", "part": 1, "scores": 0.5}])
    with pytest.raises(SchemaError, match="do not fit"):
        NUMBERS.cast([{"item": "a", "part": "one"}])
    with pytest.raises(SchemaError, match="do not fit"):
        NUMBERS.cast([{"item": "a", "part": 2**31}])
    with pytest.raises(SchemaError, match="does not fit"):
        NUMBERS.cast(pa.table({"item": ["a"], "part": [1.5]}))


def test_cast_sorts_by_key_and_fills_missing_nullable_columns() -> None:
    rows = NUMBERS.cast([{"item": "b", "part": 1}, {"item": "a", "part": 2}, {"item": "a", "part": 1}])
    assert rows.schema.equals(NUMBERS.arrow_schema)
    assert list(zip(rows["item"].to_pylist(), rows["part"].to_pylist(), strict=True)) == [("a", 1), ("a", 2), ("b", 1)]
    assert rows["score"].null_count == 3


def test_no_rows_cast_to_the_schema() -> None:
    assert NUMBERS.cast([]).schema.equals(NUMBERS.arrow_schema)
    assert NUMBERS.cast(NUMBERS.empty()).num_rows == 0


def test_the_hash_depends_neither_on_order_nor_on_chunks() -> None:
    rows = some_rows()
    whole = NUMBERS.cast(rows)
    random.Random(1).shuffle(rows)
    parts = [pa.Table.from_pylist(rows[start : start + 7], NUMBERS.arrow_schema) for start in range(0, 50, 7)]
    assert sha(pa.concat_tables(parts)) == sha(whole)
    padded = pa.concat_tables([NUMBERS.cast([{"item": "zzz", "part": 0}]), whole])
    assert sha(padded.slice(1)) == sha(whole)


def test_the_hash_leaves_provenance_out() -> None:
    rows = some_rows()
    assert sha(NUMBERS.cast(rows)) == sha(NUMBERS.cast([{**row, "run": "another"} for row in rows]))


@pytest.mark.parametrize(
    ("column", "one", "other"),
    [
        ("score", 0.5, np.nextafter(np.float32(0.5), np.float32(1)).item()),
        ("score", None, 0.0),
        ("data", b"", None),
        ("data", b"a", b"b"),
        ("flag", None, False),
        ("parts", [], None),
        ("parts", [1, 2], [2, 1]),
        ("at", None, datetime(1970, 1, 1, tzinfo=UTC)),
    ],
)
def test_the_hash_tells_values_and_nulls_apart(column: str, one: object, other: object) -> None:
    hashes = {sha(NUMBERS.cast([{"item": "a", "part": 1, column: value}])) for value in (one, other)}
    assert len(hashes) == 2


def test_the_hash_tells_cell_borders_apart() -> None:
    def pair(first: bytes, second: bytes) -> str:
        return sha(NUMBERS.cast([{"item": "a", "part": 1, "data": first}, {"item": "a", "part": 2, "data": second}]))

    assert pair(b"ab", b"c") != pair(b"a", b"bc")


def test_what_lies_under_a_null_does_not_count() -> None:
    values = pa.array([1.0, 2.0], pa.float32(), mask=np.array([False, True]))
    clean = pa.array([1.0, None], pa.float32())
    hashes = [content_sha256(pa.table({"k": [1, 2], "v": array}), ["k", "v"], ["k"]) for array in (values, clean)]
    assert hashes[0] == hashes[1]


def test_the_hash_is_the_documented_one() -> None:
    rows = pa.table({"k": pa.array([2, 1], pa.int64())})
    expected = hashlib.sha256(b"k:int64;" + bytes(2) + np.array([1, 2], "<i8").tobytes()).hexdigest()
    assert content_sha256(rows, ["k"], ["k"]) == expected


@given(st.data())
def test_columns_in_pieces_and_by_places_hash_like_rows_in_order(data: st.DataObject) -> None:
    """However a column is cut, encoded and ordered, the hash is that of the plain rows in key order."""
    count = data.draw(st.integers(0, 12))
    columns = {
        "k": pa.array(
            data.draw(st.lists(st.text(st.characters(codec="utf-8")), min_size=count, max_size=count, unique=True)),
            pa.string(),
        ),
        "few": pa.array(
            data.draw(st.lists(st.sampled_from(["a", "bc", None]), min_size=count, max_size=count)), pa.string()
        ),
        "x": pa.array(data.draw(st.lists(st.none() | st.integers(0, 9), min_size=count, max_size=count)), pa.float32()),
        "yes": pa.array(data.draw(st.lists(st.none() | st.booleans(), min_size=count, max_size=count)), pa.bool_()),
        "many": pa.array([[number] for number in range(count)], pa.list_(pa.int64())),
    }
    rows = pa.table(columns)
    plain = hashlib.sha256()
    for name, values in rows.sort_by("k").to_pydict().items():
        kind = columns[name].type
        plain.update(f"{name}:{kind};".encode())
        plain.update(bytes(value is None for value in values))
        if kind == pa.string():
            texts = [(value or "").encode() for value in values]
            plain.update(np.array([len(text) for text in texts], "<i8").tobytes() + b"".join(texts))
        elif kind == pa.float32():
            plain.update(np.array([value or 0 for value in values], "<f4").tobytes())
        elif kind == pa.bool_():
            plain.update(bytes(bool(value) for value in values))
        else:
            plain.update(repr(values).encode())
    cut = data.draw(st.integers(0, count))
    pieces = pa.concat_tables([rows.slice(0, cut), rows.slice(cut)])
    pieces = pieces.set_column(1, "few", pieces["few"].dictionary_encode())
    digest = hashlib.sha256()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schemas.table, "PIECE_ROWS", data.draw(st.integers(1, 5)))
        update_sha256(digest, pieces, pc.sort_indices(pieces["k"]))
        assert content_sha256(rows, rows.column_names, ["k"]) == digest.hexdigest()
    assert digest.hexdigest() == plain.hexdigest()
