"""Curate: ids from content, names given once, nothing doubled when a run is killed, and refusals that help."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import jobs.curate
from jobs.curate import curate, explain_clips, load_curate_recipe, print_curate, read_set, set_row
from pipeline.rules import Bounds, CurateRecipe, ScorerPins, VideoBounds
from schemas.catalog import Lake
from schemas.clips import CLIPS
from schemas.curated import CURATED, CURATED_SETS, RECIPES
from schemas.errors import ConfigError, SchemaError
from schemas.identity import clip_id
from schemas.runs import RUNS
from schemas.scores import MOTION, RESOLUTION, TECHNICAL, TEXT
from schemas.tables import TABLES
from tests.conftest import CHECKOUT

RECIPE = CurateRecipe(resolution=Bounds(low=512), motion=VideoBounds(low=0.1))
NUM = 12


def fill(lake: Lake, numbers: Sequence[int], *, motion_of: Sequence[int] | None = None, scorer: str = "m1") -> None:
    """Clips of even number are images, the others videos; their short edge and motion follow from the number."""
    clips, resolution, motion = [], [], []
    for number in numbers:
        kind = "video" if number % 2 else "image"
        media = f"{number:016x}"
        name = clip_id(media, 0, 2000 if kind == "video" else 0)
        span = {"start_ms": 0, "end_ms": 2000, "start_frame": 0, "end_frame": 48, "fps": 24.0}
        clips.append({"clip_id": name, "segmentation_id": "seg1", "media_id": media, "kind": kind, **span})
        edge = 256.0 if number % 4 == 3 else 720.0
        sizes = {"short_edge_px": edge, "long_edge_px": 1280.0, "aspect_ratio": 1.5, "duration_s": 2.0}
        resolution.append({"clip_id": name, "scorer_id": "r1", **sizes})
        if motion_of is None or number in motion_of:
            value = (number % 10) / 10 if kind == "video" else None
            score = {"motion": value, "motion_max": value, "num_samples": 4}
            motion.append({"clip_id": name, "scorer_id": scorer, **score})
    lake.append(CLIPS, clips, "scan")
    lake.append(RESOLUTION, resolution, "scan")
    lake.append(MOTION, motion, "scan")


def expected(numbers: Sequence[int]) -> list[str]:
    """What RECIPE keeps, worked out by hand: images of 720; videos of 720 that move by 0.1 or more."""
    kept = [n for n in numbers if n % 4 != 3 and (n % 2 == 0 or n % 10 >= 1)]
    return sorted(clip_id(f"{n:016x}", 0, 2000 if n % 2 else 0) for n in kept)


def state(lake: Lake) -> dict[str, tuple[int | None, dict[str, int]]]:
    """Everything a commit could change: the snapshot and the tags of every table."""
    return {table.name: (lake.snapshot_id(table), lake.tags(table)) for table in TABLES}


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    made = Lake(tmp_path / "lake")
    fill(made, range(NUM))
    return made


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """A lake for tests that add sets under names of their own, or only read."""
    made = Lake(tmp_path_factory.mktemp("shared") / "lake")
    fill(made, range(NUM))
    return made


# --- what a set is ---


def test_a_set_holds_what_the_recipe_keeps(shared: Lake) -> None:
    result = curate(shared, RECIPE, "kept")
    assert result.created
    clips = read_set(shared, "kept")
    assert clips["clip_id"].to_pylist() == expected(range(NUM))
    assert clips.column_names == CLIPS.content_columns
    assert result.num_clips == len(clips) == set_row(shared, "kept")["num_clips"]
    assert [(step.rule, step.num_in, step.num_left) for step in result.funnel] == [
        ("resolution", 12, 9),
        ("motion", 9, 9),
    ]


def test_the_same_again_costs_no_snapshot_anywhere(lake: Lake) -> None:
    first = curate(lake, RECIPE, "x")
    before = state(lake)
    again = curate(Lake(lake.where), RECIPE, "x")
    assert state(lake) == before
    assert not again.created
    assert (again.curated_id, again.funnel) == (first.curated_id, first.funnel)


def test_another_name_for_the_same_set_has_its_id_and_adds_no_rows(lake: Lake) -> None:
    first = curate(lake, RECIPE, "x")
    other = curate(lake, RECIPE, "y")
    assert other.created
    assert other.curated_id == first.curated_id
    assert lake.facts(CURATED).num_rows == first.num_clips
    assert lake.facts(RECIPES).num_rows == 1
    assert read_set(lake, "x").equals(read_set(lake, "y"))


def test_ids_come_from_content_not_from_history(lake: Lake, tmp_path: Path) -> None:
    other = Lake(tmp_path / "other")
    numbers = list(range(NUM))
    random.Random(0).shuffle(numbers)
    for start in range(0, NUM, 5):
        fill(other, numbers[start : start + 5])
    one, two = curate(lake, RECIPE, "x"), curate(other, RECIPE, "other-name")
    assert lake.snapshot_id(CLIPS) != other.snapshot_id(CLIPS)
    assert (one.curated_id, one.content_sha256) == (two.curated_id, two.content_sha256)
    rows = [set_row(lake, "x"), set_row(other, "other-name")]
    assert rows[0]["inputs"] == rows[1]["inputs"]
    assert rows[0]["pins"] != rows[1]["pins"]
    assert rows[0]["funnel"] == rows[1]["funnel"]


def test_any_change_of_recipe_or_used_content_is_another_id(lake: Lake) -> None:
    def dry() -> str:
        return curate(lake, RECIPE, None, dry_run=True).curated_id

    first = dry()
    assert curate(lake, CurateRecipe(resolution=Bounds(low=512)), None, dry_run=True).curated_id != first
    lower = RECIPE.model_copy(update={"resolution": Bounds(low=511)})
    assert (
        curate(lake, lower, None, dry_run=True).content_sha256
        == curate(lake, RECIPE, None, dry_run=True).content_sha256
    )
    assert curate(lake, lower, None, dry_run=True).curated_id != first
    scores = {"text_coverage_max": 0.0, "text_coverage_mean": 0.0, "num_samples": 1}
    lake.append(TEXT, [{"clip_id": expected(range(NUM))[0], "scorer_id": "t", **scores}], "r")
    assert dry() == first  # no rule reads text
    fill(lake, [NUM])
    assert dry() != first


def test_a_pinned_recipe_is_stored_and_gives_the_same_set(lake: Lake) -> None:
    first = curate(lake, RECIPE, "x")
    assert first.recipe.segmentation_id == "seg1"
    assert first.recipe.scorers == ScorerPins(resolution="r1", motion="m1")
    stored = json.loads(lake.read(RECIPES)["recipe"][0].as_py())
    assert curate(lake, CurateRecipe.model_validate(stored), "x").curated_id == first.curated_id
    fill(lake, range(NUM), scorer="m2")  # a second scorer changes nothing for a recipe that names the first
    again = curate(lake, CurateRecipe.model_validate(stored), "x")
    assert (again.curated_id, again.created) == (first.curated_id, False)


def test_old_sets_stay_as_they_were_when_media_come(lake: Lake) -> None:
    curate(lake, RECIPE, "x")
    before = read_set(lake, "x")
    fill(lake, range(NUM, 2 * NUM))
    assert read_set(lake, "x").equals(before)
    curate(lake, RECIPE, "y")
    assert read_set(lake, "y")["clip_id"].to_pylist() == expected(range(2 * NUM))


def test_every_input_is_tagged_at_what_was_read(lake: Lake) -> None:
    curate(lake, RECIPE, "x")
    pins = json.loads(set_row(lake, "x")["pins"])
    assert set(pins) == {"clips", "score_resolution", "score_motion", "curated"}
    for table in (CLIPS, RESOLUTION, MOTION, CURATED):
        assert lake.tags(table) == {"curated/x": pins[table.name]["snapshot_id"]}
        assert pins[table.name] == {"uuid": lake.uuid(table), "snapshot_id": lake.snapshot_id(table)}


@pytest.mark.parametrize("bound", [0.1, 0.3, 0.7])
def test_a_bound_on_a_stored_value_keeps_it(shared: Lake, bound: float) -> None:
    recipe = CurateRecipe(kinds=("video",), motion=VideoBounds(low=bound, high=bound))
    told = explain_clips(shared, recipe).filter(pa.compute.field("verdict") == "kept")
    motion = {row["clip_id"]: row["motion"] for row in shared.read(MOTION).to_pylist()}
    assert {motion[name] for name in told["clip_id"].to_pylist()} == {np.float32(bound)}


def test_a_dry_run_writes_nothing(lake: Lake) -> None:
    before = state(lake)
    result = curate(lake, RECIPE, None, dry_run=True)
    assert state(lake) == before
    assert result.name is None
    assert result.num_clips == len(expected(range(NUM)))


def test_kinds_bound_the_whole_recipe(shared: Lake) -> None:
    recipe = CurateRecipe(kinds=("image",), resolution=Bounds(low=1))
    result = curate(shared, recipe, None, dry_run=True)
    assert (result.num_in, result.num_clips) == (6, 6)


def test_a_split_keeps_media_apart_and_loses_none(tmp_path: Path) -> None:
    lake = Lake.open(tmp_path / "lake")
    fill(lake, [number << 58 for number in range(64)])  # ids spread over all that there can be
    sets = {}
    for name, bounds in (("learn", Bounds(low=0.25)), ("kept", Bounds(high=0.24)), ("all", None)):
        curate(lake, CurateRecipe(resolution=Bounds(low=1), split=bounds), name)
        sets[name] = set(read_set(lake, name)["media_id"].to_pylist())
    assert len(sets["kept"]) == 16
    assert sets["learn"] | sets["kept"] == sets["all"]
    assert not sets["learn"] & sets["kept"]


def test_a_null_score_passes_no_rule_and_says_so(lake: Lake) -> None:
    number = NUM + 1
    fill(lake, [number], motion_of=[])
    name = clip_id(f"{number:016x}", 0, 2000)
    lake.append(MOTION, [{"clip_id": name, "scorer_id": "m1", "motion": None, "num_samples": 1}], "scan")
    told = {row["clip_id"]: row for row in explain_clips(lake, RECIPE).to_pylist()}
    assert told[name] == {"clip_id": name, "verdict": "rejected", "rule": "motion", "value": None}


# --- refusals ---


@pytest.mark.parametrize("name", ["", "a b", "a/b", "ü", "a\n", None, "--x y", "a:b"])
def test_names_that_no_tag_could_have_are_refused_first(shared: Lake, name: str | None) -> None:
    with pytest.raises(ConfigError, match="letters, digits"):
        curate(shared, RECIPE, name)


def test_a_name_is_given_once(lake: Lake) -> None:
    curate(lake, RECIPE, "x")
    before = state(lake)
    with pytest.raises(ConfigError, match="Sets never change"):
        curate(lake, CurateRecipe(resolution=Bounds(low=1)), "x")
    fill(lake, [NUM])
    before |= {t.name: (lake.snapshot_id(t), lake.tags(t)) for t in (CLIPS, RESOLUTION, MOTION)}
    with pytest.raises(ConfigError, match="Sets never change"):
        curate(lake, RECIPE, "x")
    assert state(lake) == before


def test_an_empty_lake_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="clips is empty\\. Run `outback scan`"):
        curate(Lake(tmp_path / "none"), RECIPE, "x")


def test_scores_of_two_scorers_need_a_choice(lake: Lake) -> None:
    fill(lake, range(NUM), scorer="m2")
    with pytest.raises(ConfigError, match=r"m1 \(12 rows\), m2 \(12 rows\)\. Choose one with --set scorers\.motion="):
        curate(lake, RECIPE, "x")
    pinned = RECIPE.model_copy(update={"scorers": ScorerPins(motion="m2")})
    assert curate(lake, pinned, "x").recipe.scorers.motion == "m2"
    with pytest.raises(ConfigError, match=r"no rows of scorers\.motion=m3; it holds: m1"):
        curate(lake, RECIPE.model_copy(update={"scorers": ScorerPins(motion="m3")}), "y")


def test_missing_scores_are_refused_or_counted(lake: Lake) -> None:
    fill(lake, [NUM, NUM + 1], motion_of=[])
    with pytest.raises(ConfigError, match=r"no row of scorer m1 for 1 of 4 clips.*outback scan"):
        curate(lake, RECIPE, "x")  # three small videos do not come to motion, and the image without a row is not asked
    partly = RECIPE.model_copy(update={"coverage": 0.7})
    result = curate(lake, partly, "x")
    assert result.missing == {"score_resolution": 0, "score_motion": 1}
    assert clip_id(f"{NUM + 1:016x}", 0, 2000) not in read_set(lake, "x")["clip_id"].to_pylist()


def test_just_the_coverage_that_is_asked_for_is_enough(tmp_path: Path) -> None:
    lake = Lake(tmp_path / "lake")
    videos = range(1, 41, 4)
    fill(lake, videos, motion_of=videos[:8])
    with pytest.raises(ConfigError, match="for 2 of 10 clips"):
        curate(lake, RECIPE.model_copy(update={"coverage": 0.81}), "x")
    result = curate(lake, RECIPE.model_copy(update={"coverage": 0.8}), "x")  # and (1.0 - 0.8) * 10 is less than 2
    assert result.missing["score_motion"] == 2


def test_a_recipe_that_keeps_nothing_gives_no_name(lake: Lake) -> None:
    before = state(lake)
    with pytest.raises(ConfigError, match=r"keeps none of 12 clips.*--dry-run"):
        curate(lake, CurateRecipe(resolution=Bounds(low=1e6)), "x")
    assert state(lake) == before


def test_an_unknown_set_names_those_there_are(lake: Lake) -> None:
    curate(lake, RECIPE, "x")
    with pytest.raises(ConfigError, match="there is no curated set 'z'; there are: x"):
        read_set(lake, "z")


def test_a_set_that_no_longer_holds_what_was_published_is_refused(lake: Lake) -> None:
    result = curate(lake, RECIPE, "x")
    row = set_row(lake, "x") | {"name": "forged", "num_clips": result.num_clips + 1}
    lake.append(CURATED_SETS, [row], "r")
    with pytest.raises(SchemaError, match="changed by another program"):
        read_set(lake, "forged")


# --- kills and races ---

COMMITS = ("runs", "recipes", "curated", "tag curated", "tag clips", "tag score_motion", "curated_sets", "end of run")

KILLED = """
import os, signal, sys
from tests.jobs.test_curate import *
lake, at = Lake(sys.argv[1]), sys.argv[2]
append, tag = Lake.append, Lake.tag
def stop(name):
    if name == at:
        os.kill(os.getpid(), signal.SIGKILL)
def appending(self, table, rows, run_id):
    stop("end of run" if table is RUNS and self.snapshot_id(CURATED_SETS) else table.name)
    return append(self, table, rows, run_id)
def tagging(self, table, name, snapshot_id):
    stop("tag " + table.name)
    return tag(self, table, name, snapshot_id)
Lake.append, Lake.tag = appending, tagging
curate(lake, RECIPE, "x")
"""


def in_a_process(program: str, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=CHECKOUT,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class Killed(BaseException):
    """Stands for a kill: nothing in the job catches it, and nothing is cleaned up after it."""


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Set `at` to the commit before which a run is to end, as if it were killed there."""
    where = {"at": ""}
    append, tag = Lake.append, Lake.tag

    def stop(name: str) -> None:
        if where["at"] == name:
            raise Killed(name)

    def appending(self: Lake, table: Any, rows: Any, run_id: str) -> int:
        if where["at"] and table is RUNS and any(row["status"] == "failed" for row in rows):
            return 0  # a killed run writes no end
        stop("end of run" if table is RUNS and any(row["status"] == "done" for row in rows) else table.name)
        return append(self, table, rows, run_id)

    def tagging(self: Lake, table: Any, name: str, snapshot_id: int) -> None:
        stop(f"tag {table.name}")
        tag(self, table, name, snapshot_id)

    monkeypatch.setattr(Lake, "append", appending)
    monkeypatch.setattr(Lake, "tag", tagging)
    yield where
    where["at"] = ""


@pytest.mark.parametrize("at", COMMITS)
def test_a_run_that_ends_between_two_commits_is_completed_by_the_next(
    lake: Lake, stops: dict[str, str], at: str
) -> None:
    stops["at"] = at
    with pytest.raises(Killed):
        curate(lake, RECIPE, "x")
    published = at == "end of run"
    assert lake.facts(CURATED_SETS).num_rows == int(published)
    stops["at"] = ""
    result = curate(Lake(lake.where), RECIPE, "x")
    assert result.created is not published
    assert read_set(lake, "x")["clip_id"].to_pylist() == expected(range(NUM))
    assert lake.facts(CURATED).num_rows == result.num_clips
    assert lake.facts(CURATED_SETS).num_rows == lake.facts(RECIPES).num_rows == 1


def test_sigkill_before_the_name_is_given(lake: Lake) -> None:
    process = in_a_process(KILLED, lake.where, "curated_sets")
    _, error = process.communicate(timeout=240)
    assert process.returncode == -9, error
    with pytest.raises(ConfigError, match="no curated set"):
        read_set(lake, "x")
    assert curate(lake, RECIPE, "x").created
    assert read_set(lake, "x")["clip_id"].to_pylist() == expected(range(NUM))


def test_an_unfinished_set_is_completed_over_tables_that_grew_elsewhere(lake: Lake, stops: dict[str, str]) -> None:
    """The tables have new snapshots, and what the recipe reads of them is the same."""
    stops["at"] = "curated_sets"
    pinned = RECIPE.model_copy(update={"scorers": ScorerPins(motion="m1")})
    with pytest.raises(Killed):
        curate(lake, pinned, "x")
    stops["at"] = ""
    fill(lake, range(NUM), scorer="m2")
    curate(lake, CurateRecipe(resolution=Bounds(low=1)), "y")
    assert curate(lake, pinned, "x").created
    assert read_set(lake, "x")["clip_id"].to_pylist() == expected(range(NUM))


def test_the_name_of_an_unfinished_set_is_not_taken_over(lake: Lake, stops: dict[str, str]) -> None:
    stops["at"] = "curated_sets"
    with pytest.raises(Killed):
        curate(lake, RECIPE, "x")
    stops["at"] = ""
    with pytest.raises(ConfigError, match="tags never move"):
        curate(lake, CurateRecipe(resolution=Bounds(low=1)), "x")
    assert curate(lake, RECIPE, "x").created


def test_a_loser_of_a_race_for_the_row_is_told(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program that gives the name without tags, between our look and our row."""
    whole = jobs.curate._tag_set

    def lose(lake: Lake, tag: str, result: jobs.curate.CurateResult) -> int:
        row = {"name": "x", "curated_id": "0" * 16, "recipe_id": "1" * 16, "inputs": "{}", "pins": "{}", "funnel": "[]"}
        lake.append(CURATED_SETS, [{**row, "num_clips": 1, "content_sha256": ""}], "other")
        return whole(lake, tag, result)

    monkeypatch.setattr(jobs.curate, "_tag_set", lose)
    with pytest.raises(ConfigError, match="was given to the set 0000000000000000"):
        curate(lake, RECIPE, "x")


RACE = """
import sys, time
from tests.jobs.test_curate import *
low, moment = float(sys.argv[2]), float(sys.argv[3])
import pyiceberg.catalog.sql, pyiceberg.io.pyarrow
while time.time() < moment:
    time.sleep(0.001)
try:
    print(curate(Lake(sys.argv[1]), CurateRecipe(resolution=Bounds(low=low)), "x").curated_id)
except ConfigError:
    print("lost")
"""


@pytest.mark.slow
def test_of_two_recipes_that_race_for_a_name_one_gets_it(lake: Lake) -> None:
    import time

    moment = str(time.time() + 10)
    processes = [in_a_process(RACE, lake.where, low, moment) for low in ("1", "512")]
    said = []
    for process in processes:
        out, error = process.communicate(timeout=240)
        assert process.returncode == 0, error
        said.append(out.strip())
    assert sorted(said)[1] == "lost"
    assert set_row(lake, "x")["curated_id"] == min(said)
    read_set(lake, "x")


# --- recipes, printing and cost ---


def test_the_shipped_recipe_takes_overrides() -> None:
    recipe = load_curate_recipe("offline", ["motion.low=0.002"])
    assert recipe.motion is not None
    assert recipe.motion.low == 0.002
    assert recipe.motion.high is not None
    assert recipe.resolution is not None
    assert recipe.resolution.low == 512  # Emu3 report: images below 512x512 are dropped
    with pytest.raises(ConfigError, match=r"did you mean 'motion\.low'"):
        load_curate_recipe("offline", ["motion.lo=1"])


def test_what_is_printed(shared: Lake, capsys: pytest.CaptureFixture[str]) -> None:
    result = curate(shared, RECIPE, None, dry_run=True)
    print_curate(result, True)
    told = json.loads(capsys.readouterr().out)
    assert told["curated_id"] == result.curated_id
    assert [step["num_left"] for step in told["funnel"]] == [9, 9]
    assert told["funnel"][0]["examples"][0]["value"] == 256.0
    print_curate(result, False)
    out = capsys.readouterr().out
    assert "512 <= x" in out
    assert "256 < low 512" in out
    assert "9 clips would be kept" in out


def test_curate_imports_nothing_slow(shared: Lake) -> None:
    program = (
        "import sys, json\n"
        "from jobs.curate import curate, leave_pandas_out\n"
        "leave_pandas_out()\n"
        "from pipeline.rules import *\nfrom schemas.catalog import Lake\n"
        "curate(Lake(sys.argv[1]), CurateRecipe(resolution=Bounds(low=1)), 'imports')\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    out, error = in_a_process(program, shared.where).communicate(timeout=240)
    assert out, error
    assert not set(json.loads(out)) & {"av", "cv2", "duckdb", "pandas", "PIL", "ray", "scipy", "torch"}


def test_only_the_tables_that_rules_ask_for_are_read(shared: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    whole = Lake.read

    def note(self: Lake, table: Any, columns: Any = None, *rest: Any, **more: Any) -> pa.Table:
        read.append((table.name, tuple(columns or ())))
        return whole(self, table, columns, *rest, **more)

    monkeypatch.setattr(Lake, "read", note)
    curate(shared, CurateRecipe(resolution=Bounds(low=1)), None, dry_run=True)
    assert sorted(read) == [
        ("clips", ("clip_id", "segmentation_id", "kind")),
        ("score_resolution", ("clip_id", "scorer_id", "short_edge_px")),
    ]
    assert TECHNICAL.name not in dict(read)
