"""SQL: the tables at any state, and no way to anything else."""

import csv
import io
import json
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest

from jobs.curate import curate
from jobs.sql import print_sql, run_sql
from schemas.catalog import Lake
from schemas.clips import CLIPS
from schemas.curated import CURATED_SETS
from schemas.errors import ConfigError
from schemas.scores import MOTION
from schemas.tables import TABLES
from schemas.vision_tokens import VISION_TOKENS
from tests.jobs.test_curate import NUM, RECIPE, expected, fill


def one(lake: Lake, query: str, at: str | None = None) -> object:
    """The only cell of an answer."""
    rows = run_sql(lake, query, at)
    assert rows.shape == (1, 1)
    return rows[0][0].as_py()


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """A lake with a set `first`, more clips after it, then a set `second`."""
    made = Lake(tmp_path_factory.mktemp("sql") / "lake [1] ü'x")
    fill(made, range(NUM))
    curate(made, RECIPE, "first")
    fill(made, range(NUM, 2 * NUM))
    curate(made, RECIPE, "second")
    return made


def test_tables_are_joined_as_they_are(lake: Lake) -> None:
    query = """
        SELECT clip_id FROM clips JOIN score_resolution USING (clip_id) JOIN score_motion USING (clip_id)
        WHERE short_edge_px >= 512 AND (kind = 'image' OR motion >= 0.1) ORDER BY clip_id
    """
    assert run_sql(lake, query, None)["clip_id"].to_pylist() == expected(range(2 * NUM))


def test_the_names_of_sets_and_tags_name_states(lake: Lake) -> None:
    count = "SELECT count(*) FROM clips"
    assert [one(lake, count, at) for at in ("first", "curated/first", "second", None)] == [NUM, NUM, 2 * NUM, 2 * NUM]
    members = "SELECT count(*) FROM curated_sets s JOIN curated c USING (curated_id) WHERE s.name = 'first'"
    assert one(lake, members, "first") == len(expected(range(NUM)))


def test_tables_that_a_set_did_not_read_are_as_when_it_was_made(lake: Lake) -> None:
    names = "SELECT string_agg(name ORDER BY name) FROM curated_sets"
    assert one(lake, names, "first") == "first"
    assert one(lake, names, "second") == "first,second"
    assert one(lake, names) == "first,second"
    assert one(lake, "SELECT count(*) FROM media", "first") == 0


def test_a_snapshot_id_and_a_time_name_states(lake: Lake) -> None:
    oldest = lake.snapshot_ids(CLIPS)[0]
    assert one(lake, "SELECT count(*) FROM clips", str(oldest)) == NUM
    assert one(lake, "SELECT count(*) FROM curated_sets", str(oldest)) == 0
    assert one(lake, "SELECT count(*) FROM clips", "2020-01-01") == 0
    assert one(lake, "SELECT count(*) FROM clips", "2120-01-01T00:00:00+02:00") == 2 * NUM
    made = lake.read(CURATED_SETS, ["name", "written_at"]).sort_by("name")["written_at"][0].as_py()
    assert one(lake, "SELECT count(*) FROM clips", made.isoformat()) == NUM
    assert one(lake, "SELECT count(*) FROM clips", made.astimezone(UTC).replace(tzinfo=None).isoformat()) == NUM


def test_what_names_no_state_is_refused_with_what_does(lake: Lake) -> None:
    for at in ("third", "123456789", "yesterday"):
        with pytest.raises(ConfigError, match="there are: first, second"):
            run_sql(lake, "SELECT 1", at)


def test_every_table_is_there_with_its_columns_and_types(lake: Lake, tmp_path: Path) -> None:
    for where in (lake, Lake(tmp_path / "none")):
        for table in TABLES:
            rows = run_sql(where, f"SELECT * FROM {table.name} LIMIT 0", None)
            assert rows.column_names == table.names
            assert rows.schema.field("run_id").type == pa.string()
    types = run_sql(lake, "SELECT codes, t, fps FROM vision_tokens", None).schema.types
    assert types == [pa.binary(), pa.int32(), pa.float64()]
    columns = run_sql(lake, "DESCRIBE clips", None)["column_name"].to_pylist()
    assert columns == CLIPS.names
    assert run_sql(lake, "SHOW TABLES", None)["name"].to_pylist() == sorted(table.name for table in TABLES)


FORBIDDEN = [
    "COPY clips TO '{out}'",
    "COPY (SELECT 1) TO '{own}' (FORMAT parquet, USE_TMP_FILE false)",
    "COPY (SELECT 1) TO '/dev/stdout'",
    "EXPORT DATABASE '{out}'",
    "SELECT * FROM read_csv('/etc/passwd')",
    "SELECT * FROM read_text('/etc/passwd')",
    "SELECT * FROM read_blob('/proc/self/environ')",
    "SELECT * FROM '/etc/passwd'",
    "SELECT * FROM read_parquet('{other}')",
    "SELECT * FROM glob('/etc/*')",
    "SELECT * FROM sniff_csv('/etc/passwd')",
    "SELECT * FROM read_parquet('https://localhost/x.parquet')",
    "ATTACH '{out}'",
    "ATTACH ':memory:' AS other",
    "INSTALL httpfs",
    "LOAD httpfs",
    "SET enable_external_access = true",
    "SET lock_configuration = false",
    "RESET allowed_paths",
    "PRAGMA enable_profiling",
    "CREATE TABLE x (a INT)",
    "CREATE OR REPLACE VIEW clips AS SELECT 1",
    "CREATE TEMP TABLE x (a INT)",
    "DROP VIEW clips",
    "INSERT INTO clips SELECT * FROM clips",
    "DELETE FROM clips",
    "SELECT 1; COPY clips TO '{out}'",
    "EXPLAIN ANALYZE COPY (SELECT 1) TO '{own}' (FORMAT parquet, USE_TMP_FILE false)",
    "SELECT * FROM query('COPY (SELECT 1) TO ''{out}''')",
    "PREPARE x AS COPY clips TO '{out}'",
    "SELECT * FROM lake",
    "SELECT getenv('HOME')",
    "CALL force_checkpoint()",
    "",
    "SELEC 1",
]


@pytest.mark.parametrize("query", FORBIDDEN)
def test_nothing_but_reading_the_tables_is_possible(lake: Lake, tmp_path: Path, query: str) -> None:
    own = lake.data_files(MOTION)[0]
    before = Path(own).read_bytes()
    other = next(path for path in (lake.folder / "tables").rglob("*.avro"))
    out = tmp_path / "out"
    with pytest.raises(ConfigError):
        run_sql(lake, query.format(out=out, own=own.replace("'", "''"), other=str(other).replace("'", "''")), None)
    assert Path(own).read_bytes() == before
    assert not list(tmp_path.iterdir())


def test_python_objects_are_no_tables(lake: Lake) -> None:
    secrets = pa.table({"a": [1]})
    with pytest.raises(ConfigError, match="secrets"):
        run_sql(lake, "SELECT * FROM secrets", None)
    assert len(secrets) == 1


def test_printing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lake = Lake(tmp_path / "lake")
    codes = bytes(range(20))
    row = {"clip_id": "c", "tokenizer_id": "t", "kind": "image", "t": 1, "h": 2, "w": 5, "codes": codes, "crc32": 0}
    lake.append(VISION_TOKENS, [row], "r")
    moment = datetime(2026, 1, 2, tzinfo=UTC)
    rows = run_sql(lake, "SELECT clip_id, codes, fps, [1, 2] l, 'a,b' s, 1 AS x, 2 AS x FROM vision_tokens", None)
    rows = rows.append_column("written_at", pa.array([moment], pa.timestamp("us", "UTC")))
    print_sql(rows, json=True, csv=False)
    (told,) = json.loads(capsys.readouterr().out)
    assert told == {
        "clip_id": "c",
        "codes": codes.hex(),
        "fps": None,
        "l": [1, 2],
        "s": "a,b",
        "x": 1,
        "x_1": 2,
        "written_at": moment.isoformat(),
    }
    print_sql(rows, json=False, csv=True)
    header, cells = csv.reader(io.StringIO(capsys.readouterr().out))
    assert header == list(told)
    assert cells == ["c", codes.hex(), "", "[1, 2]", "a,b", "1", "2", moment.isoformat()]
    print_sql(rows, json=False, csv=False)
    out = capsys.readouterr().out
    assert "0001020304050607... 20 bytes" in out
    assert "1 rows" in out


def test_numbers_that_json_has_not_are_null(lake: Lake, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run_sql(lake, "select 'nan'::double as a, 'inf'::double as b, ['-inf'::double, 1.5] as c", None)
    print_sql(rows, json=True, csv=False)
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == [{"a": None, "b": None, "c": [None, 1.5]}]


def test_what_looks_like_a_number_but_is_none(lake: Lake) -> None:
    with pytest.raises(ConfigError, match="is no set or tag"):
        run_sql(lake, "select 1", "\u00b2")
