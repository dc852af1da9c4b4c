"""The lake's promises, on real Iceberg tables: nothing lost, nothing doubled, no name moved; whatever is killed."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import schemas.catalog
from schemas.catalog import Lake
from schemas.errors import ConfigError, SchemaError
from schemas.runs import RUNS
from schemas.table import Column, Table
from tests.conftest import CHECKOUT

ITEMS = Table(
    name="items",
    doc="For tests.",
    key=("item", "part"),
    columns=(
        Column("item", pa.string(), "first part of the key"),
        Column("part", pa.int32(), "second part of the key"),
        Column("score", pa.float32(), "a score", nullable=True),
        Column("run_id", pa.string(), "who wrote it", provenance=True),
    ),
)
WIDER = Table(ITEMS.name, ITEMS.doc, ITEMS.key, (*ITEMS.columns, Column("label", pa.string(), "later", nullable=True)))
LEDGER = Table("ledger", "For tests.", ("run_id", "item"), (ITEMS.columns[3], ITEMS.columns[0]), ledger=True)


def rows(*parts: int, item: str = "a", score: float | None = 0.5) -> list[dict[str, object]]:
    return [{"item": item, "part": part, "score": score} for part in parts]


def parts(lake: Lake, at: int | None = None) -> list[int]:
    return sorted(lake.read(ITEMS, ["part"], at=at)["part"].to_pylist())


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(tmp_path / "lake")


def start(program: str, lake: Lake, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
    """A process with `lake` open and this module's tables at hand."""
    head = "import sys, os, time\nfrom tests.schemas.test_catalog import *\nlake = Lake(sys.argv[1])\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + program, lake.where, *arguments],
        cwd=CHECKOUT,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: "subprocess.Popen[str]") -> str:
    out, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    return out


# --- appending ---


def test_a_lake_that_is_not_there_is_empty_and_not_made_by_reading(lake: Lake) -> None:
    assert lake.read(ITEMS).schema.equals(ITEMS.arrow_schema)
    assert len(lake.read(ITEMS)) == 0
    assert lake.snapshot_id(ITEMS) is None
    assert lake.facts(ITEMS).num_rows == 0
    assert not lake.folder.exists()
    with pytest.raises(ConfigError, match="there is no lake"):
        Lake.open(lake.where, must_exist=True)


def test_an_append_is_idempotent_and_then_makes_no_snapshot(lake: Lake) -> None:
    assert lake.append(ITEMS, rows(1, 2), "r1") == 2
    first = lake.facts(ITEMS)
    assert lake.append(ITEMS, rows(2, 1), "r2") == 0
    assert lake.append(ITEMS, [], "r3") == 0
    assert lake.facts(ITEMS) == first
    assert lake.append(ITEMS, rows(2, 3), "r4") == 1
    assert parts(lake) == [1, 2, 3]
    assert lake.facts(ITEMS).num_snapshots == 2


def test_the_same_key_twice_in_one_append_is_one_row(lake: Lake) -> None:
    assert lake.append(ITEMS, [*rows(1, score=0.25), *rows(1, score=0.75)], "r") == 1
    assert len(lake.read(ITEMS)) == 1


def test_another_handle_sees_the_keys_of_the_first(lake: Lake) -> None:
    other = Lake(lake.where)
    for part in range(6):  # each handle appends what the other has already
        assert lake.append(ITEMS, rows(part), "r") == 1
        assert other.append(ITEMS, rows(part), "r") == 0
    assert parts(lake) == list(range(6))


def test_rows_that_do_not_fit_leave_nothing_behind(lake: Lake) -> None:
    for bad in ({"score": float("nan")}, {"part": None}, {"colour": "red"}):
        with pytest.raises(SchemaError):
            lake.append(ITEMS, [{**rows(1)[0], **bad}], "r")
    assert lake.snapshot_id(ITEMS) is None


def test_empty_and_filled_reads_have_one_schema(lake: Lake) -> None:
    lake.append(ITEMS, rows(1), "r")
    assert lake.read_where(ITEMS, "item", ["b"]).schema.equals(ITEMS.arrow_schema)
    assert lake.read_where(ITEMS, "item", []).schema.equals(ITEMS.arrow_schema)
    assert lake.read_where(ITEMS, "item", ["a"]).schema.equals(ITEMS.arrow_schema)
    assert lake.read_where(ITEMS, "item", ["a", "b"]).num_rows == 1


def test_nulls_and_floats_come_back_as_they_were(lake: Lake) -> None:
    values = [None, 0.1, 0.3, 0.7, -0.0, 3.4e38, 1e-45]
    lake.append(ITEMS, [{"item": "a", "part": i, "score": v} for i, v in enumerate(values)], "r")
    found = lake.read(ITEMS).sort_by("part")["score"]
    assert found.equals(pa.chunked_array([pa.array(values, pa.float32())]))


def test_a_run_is_recorded_once_per_status_whatever_the_file_count(lake: Lake) -> None:
    for run in ("a", "b", "c"):
        for item in ("started", "started", "done"):
            lake.append(LEDGER, [{"run_id": run, "item": item}], run)
    assert lake.read(LEDGER).num_rows == 6
    assert lake.facts(LEDGER).num_snapshots == 6


@pytest.mark.parametrize("name", ["a lake, ü", "quote'\"", "[a-z]*"])
def test_names_a_path_may_have(tmp_path: Path, name: str) -> None:
    lake = Lake(tmp_path / name)
    lake.append(ITEMS, rows(1), "r")
    assert parts(Lake(lake.where)) == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


@pytest.mark.parametrize("name", ["#1", "50%25", "what?", "new\nline", "not utf-8 \udcff"])
def test_names_a_path_may_not_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="use another folder"):
        Lake(tmp_path / name)
    assert not list(tmp_path.iterdir())


CONFIGURED = """
lake = Lake.open("catalog:tested", must_exist=True)
assert parts(lake) == []
assert lake.append(ITEMS, rows(1, 2), "r") == 2
assert pickle.loads(pickle.dumps(lake)).append(ITEMS, rows(2, 3), "r") == 1
assert lake.commit_files(ITEMS, [lake.write_files(ITEMS, rows(3, 4), "r")], "r") == 1
lake.tag(ITEMS, "x", lake.snapshot_id(ITEMS))
assert parts(lake) == [1, 2, 3, 4]
"""


def test_a_catalog_of_pyicebergs_own_configuration(lake: Lake, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="set OUTBACK_FILES"):
        Lake.open("catalog:tested")
    folder = tmp_path / "warehouse"
    folder.mkdir()
    settings = {"TYPE": "sql", "URI": f"sqlite:///{folder}/c.db", "WAREHOUSE": f"file://{folder}"}
    environment = {f"PYICEBERG_CATALOG__TESTED__{name}": value for name, value in settings.items()}
    finish(start(CONFIGURED, lake, **environment, OUTBACK_FILES=str(tmp_path / "files")))
    assert list(folder.rglob("*.parquet"))


# --- files of workers ---


def test_files_of_workers_are_published_once(lake: Lake) -> None:
    written = [lake.write_files(ITEMS, rows(part, part + 1), "r") for part in (0, 2, 4)]
    assert parts(lake) == []
    received = pickle.loads(pickle.dumps(written))
    assert lake.commit_files(ITEMS, received, "r") == 6
    assert lake.commit_files(ITEMS, received, "r") == 0
    assert parts(lake) == list(range(6))
    assert lake.facts(ITEMS).num_snapshots == 1


def test_files_that_overlap_give_each_row_once(lake: Lake) -> None:
    lake.append(ITEMS, rows(0), "r")
    written = [lake.write_files(ITEMS, rows(0, 1), "r"), lake.write_files(ITEMS, rows(1, 2), "r")]
    assert lake.commit_files(ITEMS, written, "r") == 2
    assert parts(lake) == [0, 1, 2]


# --- processes ---

APPEND_ALL = """
for part in range(int(sys.argv[2])):
    lake.append(ITEMS, rows(part), "r")
    lake.append(ITEMS, rows(part, item=sys.argv[3]), "r")
print(len(lake.read(ITEMS)))
"""


def test_two_processes_with_the_same_keys_lose_and_double_nothing(lake: Lake) -> None:
    processes = [start(APPEND_ALL, lake, "8", f"own{name}") for name in range(2)]
    for process in processes:
        finish(process)
    found = lake.read(ITEMS, ["item", "part"]).to_pylist()
    expected = {(item, part) for item in ("a", "own0", "own1") for part in range(8)}
    assert len(found) == len(expected)
    assert {(row["item"], row["part"]) for row in found} == expected


KILLED = """
from pyiceberg.catalog.sql import SqlCatalog
whole = SqlCatalog.commit_table
def stop(self, table, requirements, updates):
    if table.name()[-1] == "items" and any(type(u).__name__ == "AddSnapshotUpdate" for u in updates):
        if sys.argv[2] == "after":
            whole(self, table, requirements, updates)
        print("here", flush=True)
        time.sleep(600)
    return whole(self, table, requirements, updates)
SqlCatalog.commit_table = stop
if sys.argv[3] == "append":
    lake.append(ITEMS, rows(1, 2, 3), "r")
else:
    lake.commit_files(ITEMS, [lake.write_files(ITEMS, rows(1, 2, 3), "r")], "r")
"""


@pytest.mark.parametrize("how", ["append", "commit_files"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_around_the_commit_leaves_each_row_once(lake: Lake, when: str, how: str) -> None:
    lake.append(ITEMS, rows(0), "r")
    process = start(KILLED, lake, when, how)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n", process.communicate()[1]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    written = list((lake.folder / "tables").rglob("*.parquet"))
    assert sum(pq.read_metadata(path).num_rows for path in written) == 4  # the data files were there
    assert parts(Lake(lake.where)) == ([0] if when == "before" else [0, 1, 2, 3])
    assert lake.append(ITEMS, rows(1, 2, 3), "r") == (3 if when == "before" else 0)
    assert parts(lake) == [0, 1, 2, 3]


@pytest.mark.parametrize("error", ["locked", "unknown"])
def test_a_lost_answer_does_not_double_rows(lake: Lake, monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    """The commit lands, and what comes back is an error that leaves it open whether it did."""
    import sqlite3

    from pyiceberg.catalog.sql import SqlCatalog
    from pyiceberg.exceptions import CommitStateUnknownException
    from sqlalchemy.exc import OperationalError

    lake.append(ITEMS, rows(0), "r")
    whole = SqlCatalog.commit_table
    lost: list[object] = []

    def lose_the_answer(*arguments: object) -> object:
        answer = whole(*arguments)  # type: ignore[arg-type]  # passed on as it came
        if not lost:
            lost.append(answer)
            if error == "locked":
                raise OperationalError("COMMIT", {}, sqlite3.OperationalError("database is locked"))
            raise CommitStateUnknownException("the connection broke")
        return answer

    monkeypatch.setattr(SqlCatalog, "commit_table", lose_the_answer)
    lake.append(ITEMS, rows(1), "r")
    assert lost
    assert parts(lake) == [0, 1]
    assert lake.facts(ITEMS).num_snapshots == 2


@pytest.mark.slow
def test_processes_that_start_together_make_one_lake(lake: Lake) -> None:
    program = "lake.append(ITEMS, rows(int(sys.argv[2])), 'r')"
    for process in [start(program, lake, str(part)) for part in range(4)]:
        finish(process)
    assert parts(lake) == [0, 1, 2, 3]


# --- tags ---


def test_a_tag_is_set_once_and_never_moves(lake: Lake) -> None:
    lake.append(ITEMS, rows(1), "r")
    first = lake.snapshot_id(ITEMS)
    assert first is not None
    lake.tag(ITEMS, "curated/x", first)
    lake.tag(ITEMS, "curated/x", first)
    lake.append(ITEMS, rows(2), "r")
    second = lake.snapshot_id(ITEMS)
    assert second is not None
    assert second != first
    with pytest.raises(ConfigError, match="tags never move"):
        lake.tag(ITEMS, "curated/x", second)
    assert lake.tags(ITEMS) == {"curated/x": first}
    assert parts(lake, at=first) == [1]
    assert parts(lake) == [1, 2]


def test_a_tag_set_between_the_look_and_the_commit_is_not_moved(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshots: list[int] = []
    for part in range(2):
        lake.append(ITEMS, rows(part), "r")
        snapshots.append(lake.snapshot_ids(ITEMS)[-1])
    other, load = Lake(lake.where), lake._load_for_write

    def load_and_lose(table: Table) -> object:
        handle = load(table)
        other.tag(ITEMS, "curated/x", snapshots[0])
        return handle

    monkeypatch.setattr(lake, "_load_for_write", load_and_lose)
    with pytest.raises(ConfigError, match="tags never move"):
        lake.tag(ITEMS, "curated/x", snapshots[1])
    assert lake.tags(ITEMS) == {"curated/x": snapshots[0]}


TAG = """
snapshot = int(sys.argv[2])
while time.time() < float(sys.argv[3]):
    time.sleep(0.001)
try:
    lake.tag(ITEMS, "curated/x", snapshot)
    print("won")
except ConfigError:
    print("lost")
"""


@pytest.mark.slow
def test_of_two_that_race_for_a_tag_one_wins_and_the_other_knows(lake: Lake) -> None:
    snapshots = []
    for part in range(2):
        lake.append(ITEMS, rows(part), "r")
        snapshots.append(lake.snapshot_id(ITEMS))
    lake.tags(ITEMS)
    moment = time.time() + 8
    processes = [start(TAG, lake, str(snapshot), str(moment)) for snapshot in snapshots]
    said = [finish(process).strip() for process in processes]
    assert sorted(said) == ["lost", "won"]
    assert lake.tags(ITEMS) == {"curated/x": snapshots[said.index("won")]}


# --- time, schema and content ---


def test_states_by_time(lake: Lake) -> None:
    before = int(time.time() * 1000) - 1
    lake.append(ITEMS, rows(1), "r")
    first = lake.snapshot_id(ITEMS)
    assert first is not None
    time.sleep(0.02)
    between = int(time.time() * 1000)
    time.sleep(0.02)
    lake.append(ITEMS, rows(2), "r")
    assert lake.snapshot_as_of(ITEMS, before) is None
    assert lake.snapshot_as_of(ITEMS, between) == first
    assert lake.snapshot_time_ms(ITEMS, first) < between
    assert lake.snapshot_ids(ITEMS) == [first, lake.snapshot_id(ITEMS)]
    with pytest.raises(ConfigError, match="no snapshot 12345"):
        lake.snapshot_time_ms(ITEMS, 12345)


def test_a_new_nullable_column_is_null_in_old_rows(lake: Lake) -> None:
    lake.append(ITEMS, rows(1), "r")
    old = lake.snapshot_id(ITEMS)
    assert lake.read(WIDER)["label"].to_pylist() == [None]  # read before anything was written with it
    lake.append(WIDER, [{**rows(2)[0], "label": "x"}], "r")
    found = lake.read(WIDER, ["part", "label"]).sort_by("part").to_pylist()
    assert found == [{"part": 1, "label": None}, {"part": 2, "label": "x"}]
    assert lake.read(WIDER, ["label"], at=old)["label"].to_pylist() == [None]
    assert lake.read_where(WIDER, "item", ["a"], ["label"]).num_rows == 2
    batches = list(lake.iter_batches(WIDER, ["label", "part"]))
    assert pa.Table.from_batches(batches).sort_by("part").to_pylist() == [
        {"label": None, "part": 1},
        {"label": "x", "part": 2},
    ]
    assert lake.append(ITEMS, rows(3), "r") == 1  # old code still writes
    assert parts(lake) == [1, 2, 3]


def test_two_that_widen_a_table_at_once(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    lake.append(ITEMS, rows(1), "r")
    other, load = Lake(lake.where), lake._load
    late: list[int] = []

    def load_and_be_late(table: Table) -> object:
        handle = load(table)
        if not late:
            late.append(other.append(WIDER, [{**rows(2)[0], "label": "x"}], "r"))
        return handle

    monkeypatch.setattr(lake, "_load", load_and_be_late)
    assert lake.append(WIDER, [{**rows(3)[0], "label": "y"}], "r") == 1
    assert late == [1]
    labels = lake.read(WIDER, ["part", "label"]).sort_by("part")["label"].to_pylist()
    assert labels == [None, "x", "y"]


def test_the_content_hash_does_not_depend_on_files_order_or_runs(tmp_path: Path) -> None:
    one, other = Lake(tmp_path / "one"), Lake(tmp_path / "other")
    one.append(ITEMS, rows(1, 2, 3, 4), "r1")
    for part in (3, 1, 4, 2):
        other.append(ITEMS, rows(part), f"r{part}")
    assert one.content_sha256(ITEMS) == other.content_sha256(ITEMS)
    other.append(ITEMS, rows(5), "r")
    assert one.content_sha256(ITEMS) != other.content_sha256(ITEMS)


def test_large_tables_are_read_in_small_batches(lake: Lake) -> None:
    lake.append(ITEMS, rows(*range(100)), "r")
    sizes = [len(batch) for batch in lake.iter_batches(ITEMS, ["part"], batch_rows=32)]
    assert sum(sizes) == 100
    assert max(sizes) <= 32


def test_columns_that_are_stored_alike_are_decoded_once_and_read_as_ever(lake: Lake) -> None:
    other = Table("others", "For tests.", ITEMS.key, ITEMS.columns)
    for item in "cab":
        lake.append(ITEMS, rows(1, 2, item=item), "r")
        lake.append(other, rows(1, 2, item="x" if item == "a" else item, score=0.25), "r")
    decoded: dict[bytes, pa.ChunkedArray] = {}
    for table, num_decoded in ((ITEMS, 3), (other, 4), (other, 4)):  # two of three files are alike
        assert lake.read(table, ["item", "score"], decoded=decoded).equals(lake.read(table, ["item", "score"]))
        assert len(decoded) == num_decoded


def test_the_only_value_of_a_column_is_told_by_bounds(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lake.only_value(ITEMS, "item") is None
    for part, item in ((1, "a"), (2, "a")):
        lake.append(ITEMS, rows(part, item=item), "long names, of which bounds hold the beginning alone")
    with monkeypatch.context() as patched:
        patched.setattr(schemas.catalog, "_open_parquet", None)
        assert lake.only_value(ITEMS, "item") == "a"
        assert lake.only_value(ITEMS, "run_id") is None
    lake.append(ITEMS, rows(3, item="b"), "r")
    assert lake.only_value(ITEMS, "item") is None


def test_a_lake_crosses_processes_by_pickle(lake: Lake) -> None:
    lake.append(ITEMS, rows(1), "r")
    assert parts(pickle.loads(pickle.dumps(lake))) == [1]


def test_the_real_ledger_takes_two_rows_per_run() -> None:
    assert RUNS.ledger
    assert RUNS.key == ("run_id", "status")  # appended under the run's own id: what `_known_keys_of` relies on


def test_commits_do_not_slow_down_with_history(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is copied per commit must not grow with the snapshots there are."""
    import copy

    copied = []
    whole = copy.deepcopy

    def count(value: object, memo: object = None) -> object:
        copied.append(type(value).__name__)
        return whole(value, memo)  # type: ignore[arg-type]  # passed on as it came

    for part in range(5):
        lake.append(ITEMS, rows(part), "r")
    monkeypatch.setattr(copy, "deepcopy", count)
    lake.append(ITEMS, rows(99), "r")
    assert copied.count("Snapshot") == 0


def test_only_new_files_are_read_for_keys(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in range(4):
        lake.append(ITEMS, rows(part), "r")
    opened = []
    whole = schemas.catalog._open_parquet

    def note(handle: object, path: str, encoded: object) -> object:
        opened.append(path)
        return whole(handle, path, encoded)  # type: ignore[arg-type]  # passed on as it came

    monkeypatch.setattr(schemas.catalog, "_open_parquet", note)
    lake.append(ITEMS, rows(4), "r")
    assert len(opened) == 1  # the file of the append before
    opened.clear()
    assert Lake(lake.where).append(ITEMS, rows(1, item="zz"), "r") == 1
    assert opened == []  # no file's bounds hold `zz`


def test_a_copied_or_moved_lake_is_refused_before_it_writes_into_the_one_it_came_from(lake: Lake) -> None:
    lake.append(ITEMS, rows(1), "run")
    copy = Path(lake.where).with_name("copy")
    shutil.copytree(lake.where, copy)
    before = sorted(path.name for path in Path(lake.where).rglob("*"))
    for use in (lambda: Lake(copy).read(ITEMS), lambda: Lake(copy).append(ITEMS, rows(2), "run")):
        with pytest.raises(ConfigError, match="moved or copied"):
            use()
    assert sorted(path.name for path in Path(lake.where).rglob("*")) == before
    assert parts(lake) == [1]


@pytest.mark.parametrize("content", [b"", b"no database at all, but something else" * 40])
def test_a_database_that_is_none_is_a_mistake_of_the_caller(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "catalog.db").write_bytes(content)
    with pytest.raises(ConfigError, match="no catalog of a lake"):
        Lake(tmp_path).read(ITEMS)


def test_a_lake_has_a_name() -> None:
    with pytest.raises(ConfigError, match="empty name"):
        Lake("")
