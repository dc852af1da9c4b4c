"""Whatever dies during a scan, nothing is lost and nothing is doubled."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.ingest import IngestConfig, ingest
from schemas.catalog import Lake
from schemas.clips import CLIPS, SCANS
from schemas.media import MEDIA
from schemas.runs import ATTEMPTS, RUNS
from schemas.scores import FAMILIES
from schemas.table import Table
from tests.flows.small_media import write_image, write_video

ROOT = Path(__file__).parents[2]
SCANNED = (CLIPS, *FAMILIES, SCANS)


def driver(lake: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.flows.scan_driver", str(lake), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str], expected: int = 0) -> str:
    out, err = process.communicate(timeout=600)
    assert process.returncode == expected, err
    return out.strip().splitlines()[-1] if out.strip() else ""


def contents(lake: Lake) -> dict[str, str]:
    return {table.name: lake.content_sha256(table) for table in (*SCANNED, ATTEMPTS)}


def assert_each_key_once(lake: Lake, tables: tuple[Table, ...] = SCANNED) -> None:
    for table in tables:
        keys = [tuple(row.values()) for row in lake.read(table, list(table.key)).to_pylist()]
        assert len(keys) == len(set(keys)), table.name


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    for seed in range(6):
        write_image(folder / f"image{seed}.png", seed)
    for seed in range(6):
        write_video(folder / f"video{seed}.mp4", seed)
    return folder


def new_lake(folder: Path, media: Path) -> Lake:
    lake = Lake.open(folder)
    ingest(lake, [str(media)], options=IngestConfig())
    return lake


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, media: Path) -> dict[str, str]:
    lake = new_lake(tmp_path_factory.mktemp("undisturbed") / "lake", media)
    finish(driver(lake.folder))
    assert len(lake.read(SCANS)) == 12
    assert len(lake.read(CLIPS)) == 6 + 2 * 6
    return contents(lake)


@pytest.mark.slow
@pytest.mark.parametrize("table", ["clips", "score_text", "scans"])
def test_driver_killed_between_data_files_and_commit(
    tmp_path: Path, media: Path, undisturbed: dict[str, str], table: str
) -> None:
    lake = new_lake(tmp_path / "lake", media)
    finish(driver(lake.folder, "--die-before", table), expected=-signal.SIGKILL)
    assert len(lake.read(SCANS)) == 0
    finish(driver(lake.folder))
    assert_each_key_once(lake)
    assert contents(lake) == undisturbed
    assert finish(driver(lake.folder)) == "nothing to do, 0 given up"


@pytest.mark.slow
def test_two_drivers_at_once(tmp_path: Path, media: Path, undisturbed: dict[str, str]) -> None:
    lake = new_lake(tmp_path / "lake", media)
    both = [driver(lake.folder), driver(lake.folder)]
    for process in both:
        finish(process)
    assert_each_key_once(lake)
    assert contents(lake) == undisturbed


@pytest.mark.slow
def test_decoders_that_crash_hang_and_raise_cost_one_row_each(tmp_path: Path) -> None:
    folder = tmp_path / "media"
    folder.mkdir()
    names = ["crash", "hang", "raise", "fine1", "fine2"]
    for seed, name in enumerate(names):
        write_video(folder / f"{name}.mp4", seed)
    lake = new_lake(tmp_path / "lake", folder)
    poison = ("--decoder", "tests.flows.poison_decoder:decode", "--timeout-s", "15")
    finish(driver(lake.folder, *poison))
    failed = {Path(row["uri"]).stem: row["error_class"] for row in lake.read(ATTEMPTS).to_pylist()}
    assert failed == {"crash": "DecoderCrashed", "hang": "DecodeTimeout", "raise": "ZeroDivisionError"}
    assert len(lake.read(SCANS)) == 2
    assert len(lake.read(CLIPS)) == 4
    assert finish(driver(lake.folder, *poison)) == "nothing to do, 3 given up"
    assert len(lake.read(ATTEMPTS)) == 3
    finish(driver(lake.folder))  # what one decoder cannot read another may
    assert len(lake.read(SCANS)) == len(names)
    assert finish(driver(lake.folder)) == "nothing to do, 0 given up"


def test_killed_worker_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "media"
    folder.mkdir()
    for seed, name in enumerate(["killworker", "fine1", "fine2", "fine3"]):
        write_video(folder / f"{name}.mp4", seed)
    lake = new_lake(tmp_path / "lake", folder)
    finish(driver(lake.folder, "--decoder", "tests.flows.poison_decoder:decode"))
    assert (folder / "killworker.killed").exists()
    assert len(lake.read(MEDIA)) == len(lake.read(SCANS)) == 4
    assert len(lake.read(ATTEMPTS)) == 0
    assert_each_key_once(lake)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_broken_decoder_does_not_look_like_a_clean_run(tmp_path: Path) -> None:
    folder = tmp_path / "media"
    folder.mkdir()
    for seed, name in enumerate(["raise1", "raise2", "raise3", "fine"]):
        write_video(folder / f"{name}.mp4", seed)
    lake = new_lake(tmp_path / "lake", folder)
    command = [sys.executable, "-m", "jobs.cli", "scan", "--lake", str(lake.folder), "--set", "failures.min_failed=3"]
    broken = ["--set", "decoder=tests.flows.poison_decoder:decode"]
    for expected in ("3 of 4 items of scan failed", "3 of 4 media failed"):  # a second look makes nothing better
        done = subprocess.run(
            [*command, *broken], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 1, done.stderr
        assert expected in done.stderr
        assert "3 ZeroDivisionError. What succeeded is kept" in done.stderr
    (run,) = [row for row in lake.read(RUNS).to_pylist() if (row["job"], row["status"]) == ("scan", "failed")]
    assert json.loads(run["outcome"])["failed_by_reason"] == {"ZeroDivisionError": 3}
    assert len(lake.read(SCANS)) == 1
