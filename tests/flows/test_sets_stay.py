"""A set is what it was when it was named, and a new threshold costs neither Ray nor a decoder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.curate import curate, load_curate_recipe, read_set
from jobs.ingest import IngestConfig, ingest
from jobs.sql import run_sql
from schemas.catalog import Lake
from schemas.table import content_sha256
from schemas.tables import TABLES
from tests.flows.small_media import write_image, write_video
from tests.flows.test_scan_failures import ROOT, driver, finish

SMALL = ("resolution.low=64", "motion.low=0", "text.high=1", "sharpness.low=0", "colour.high=1", "letterbox.high=1")


def grow(lake: Lake, folder: Path, first_seed: int) -> None:
    folder.mkdir()
    for seed in range(first_seed, first_seed + 3):
        write_image(folder / f"image{seed}.png", seed)
        write_video(folder / f"video{seed}.mp4", seed)
    ingest(lake, [str(folder)], options=IngestConfig())
    finish(driver(lake.folder))


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Lake, str, dict[str, str]]:
    """A lake with the set `first`, more media after it, the set's hash before that, and outputs of the state then."""
    folder = tmp_path_factory.mktemp("grown")
    lake = Lake.open(folder / "lake")
    grow(lake, folder / "media1", 0)
    curate(lake, load_curate_recipe("offline", SMALL), "first")
    first = read_set(lake, "first")
    before = {"sha256": content_sha256(first, first.column_names, ["clip_id"])}
    grow(lake, folder / "media2", 100)
    return lake, str(folder), before


def test_a_set_reads_back_byte_equal_after_more_media(grown: tuple[Lake, str, dict[str, str]]) -> None:
    lake, _, before = grown
    now = read_set(lake, "first")
    assert content_sha256(now, now.column_names, ["clip_id"]) == before["sha256"]
    assert len(now) == 9  # three images, and three videos of two clips


def test_sql_sees_both_states(grown: tuple[Lake, str, dict[str, str]]) -> None:
    lake, _, _ = grown
    query = "select count(*) as n from clips"
    assert run_sql(lake, query, None)["n"].to_pylist() == [18]
    assert run_sql(lake, query, "first")["n"].to_pylist() == [9]


def test_a_new_threshold_opens_no_medium_and_starts_no_ray(grown: tuple[Lake, str, dict[str, str]]) -> None:
    lake, folder, _ = grown
    for media in ("media1", "media2"):
        Path(folder, media).rename(Path(folder, f"{media}.away"))
    script = (
        "import sys, jobs.cli\n"
        "try:\n    jobs.cli.main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'ray', 'torch', 'cv2', 'av', 'decord', 'duckdb', 'rapidocr'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    options = [part for override in (*SMALL, "resolution.low=90") for part in ("--set", override)]
    command = [sys.executable, "-c", script, "curate", "offline", "--name", "stricter", "--json", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OUTBACK_LAKE": str(lake.folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_clips"] == 18


def test_the_same_recipe_again_gives_the_same_id_and_no_snapshot(grown: tuple[Lake, str, dict[str, str]]) -> None:
    lake, _, _ = grown
    first = curate(lake, load_curate_recipe("offline", SMALL), "again")
    snapshots = {table.name: lake.snapshot_id(table) for table in TABLES}
    second = curate(lake, load_curate_recipe("offline", SMALL), "again")
    assert second.curated_id == first.curated_id
    assert not second.created
    assert {table.name: lake.snapshot_id(table) for table in TABLES} == snapshots
