"""Show: what is printed is what the lake holds, as JSON and for people."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from jobs.curate import curate
from jobs.run import recorded
from jobs.show import (
    attempt_reports,
    print_attempts,
    print_funnel,
    print_lineage,
    print_runs,
    print_sets,
    print_tables,
    run_reports,
    table_reports,
)
from schemas.catalog import Lake
from schemas.clips import CLIPS
from schemas.errors import ConfigError
from schemas.runs import ATTEMPTS, RUNS
from schemas.tables import TABLES
from tests.jobs.test_curate import NUM, RECIPE, fill

Read = Callable[[], str]


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    made = Lake(tmp_path_factory.mktemp("show") / "lake")
    fill(made, range(NUM))
    curate(made, RECIPE, "kept")
    return made


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Read:
    return lambda: capsys.readouterr().out


def attempt(item: str, number: int, reason: str, *, terminal: bool = True, stage: str = "scan") -> dict[str, Any]:
    row = {"stage": stage, "stage_id": "s", "item_id": item, "attempt": number, "error_class": reason, "host": "h"}
    moment = datetime.now(UTC)
    return {**row, "message": f"about {item}", "terminal": terminal, "uri": f"/m/{item}", "written_at": moment}


def test_tables(lake: Lake, said: Read) -> None:
    print_tables(lake, hashes=False, json=True)
    told = {row["name"]: row for row in json.loads(said())}
    assert list(told) == [table.name for table in TABLES]
    assert (told["clips"]["num_rows"], told["clips"]["num_files"], told["clips"]["tags"]) == (NUM, 1, ["curated/kept"])
    assert told["clips"]["num_bytes"] == sum(Path(path).stat().st_size for path in lake.data_files(CLIPS))
    assert (told["media"]["num_rows"], told["media"]["snapshot_id"]) == (0, None)
    assert told["clips"]["content_sha256"] is None
    print_tables(lake, hashes=False, json=False)
    assert "curated/kept" in said()


def test_hashes_compare_lakes(lake: Lake, tmp_path: Path, said: Read) -> None:
    other = Lake(tmp_path / "other")
    fill(other, range(NUM // 2, NUM))
    fill(other, range(NUM // 2))
    curate(other, RECIPE, "kept")
    hashes = [{one.name: one.content_sha256 for one in table_reports(which, hashes=True)} for which in (lake, other)]
    assert hashes[0] == hashes[1]
    assert hashes[0][RUNS.name] is None
    assert all(value for name, value in hashes[0].items() if name != RUNS.name)
    print_tables(lake, hashes=True, json=False)
    out = said()
    assert str(hashes[0][CLIPS.name]) in out
    assert "ledger" in out


def test_sets_and_funnel(lake: Lake, said: Read) -> None:
    print_sets(lake, json=True)
    told = json.loads(said())
    assert [row["name"] for row in told["curated_sets"]] == ["kept"]
    assert told["sequence_sets"] == []
    print_sets(lake, json=False)
    assert "kept" in said()
    print_funnel(lake, "kept", json=True)
    assert [step["num_left"] for step in json.loads(said())["funnel"]] == [9, 9]
    print_funnel(lake, "kept", json=False)
    out = said()
    assert "resolution" in out
    assert "256 < low 512" in out
    with pytest.raises(ConfigError, match="there are: kept"):
        print_funnel(lake, "other", json=False)


def test_runs_tell_done_from_failed_from_killed(tmp_path: Path, said: Read) -> None:
    lake = Lake(tmp_path / "lake")
    with recorded(lake, "one", {"a": 1}, {"b": 2}) as done:
        done.outcome["count"] = 3
    with pytest.raises(ConfigError), recorded(lake, "two", {}, {}):
        raise ConfigError("no")
    started = {
        "run_id": "three-1",
        "status": "started",
        "job": "three",
        "recipe": "{}",
        "inputs": "{}",
        "outcome": "{}",
    }
    lake.append(
        RUNS, [{**started, "code_version": "v", "environment": "{}", "written_at": datetime.now(UTC)}], "three-1"
    )
    reports = {run.job: run for run in run_reports(lake)}
    assert {job: run.status for job, run in reports.items()} == {
        "one": "done",
        "two": "failed",
        "three": "running or killed",
    }
    assert reports["one"].outcome["count"] == 3
    assert (reports["one"].recipe, reports["one"].inputs) == ({"a": 1}, {"b": 2})
    assert reports["two"].outcome["error"] == "ConfigError: no"
    assert reports["three"].seconds is None
    print_runs(lake, json=True)
    assert {row["run_id"] for row in json.loads(said())} == {run.run_id for run in reports.values()}
    print_runs(lake, json=False)
    assert "three-1" in said()


def test_attempts_count_items_by_their_latest_reason(tmp_path: Path, said: Read) -> None:
    lake = Lake(tmp_path / "lake")
    rows = [attempt(f"m{index}", 1, "Unreadable") for index in range(5)]
    rows += [attempt("x", 1, "DecodeTimeout", terminal=False), attempt("x", 2, "Moved", terminal=False)]
    rows += [attempt("y", 1, "Missing", stage="ingest")]
    lake.append(ATTEMPTS, rows, "r")
    reports = attempt_reports(lake)
    assert [(one.stage, one.reason, one.num_items, one.terminal) for one in reports] == [
        ("ingest", "Missing", 1, True),
        ("scan", "Moved", 1, False),
        ("scan", "Unreadable", 5, True),
    ]
    assert [example["item_id"] for example in reports[2].examples] == ["m0", "m1", "m2"]
    print_attempts(lake, json=True)
    assert json.loads(said())[0]["examples"][0]["message"] == "about y"
    print_attempts(lake, json=False)
    out = said()
    assert "/m/m2" in out
    assert "may be tried again" in out


def test_an_empty_lake_shows_nothing_and_fails_nowhere(tmp_path: Path, said: Read) -> None:
    lake = Lake(tmp_path / "none")
    for show in (print_sets, print_runs, print_attempts):
        show(lake, json=True)
        told = json.loads(said())
        assert told in ([], {"curated_sets": [], "sequence_sets": [], "preference_sets": []})
        show(lake, json=False)
        assert said()
    print_tables(lake, hashes=True, json=False)
    with pytest.raises(ConfigError):
        print_lineage(lake, "g", json=False)
