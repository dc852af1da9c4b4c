"""A folder of hostile files: each ends with a reason that fits, and the good ones beside it come out as if they were alone."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from schemas.catalog import Lake
from schemas.clips import CLIPS, SCANS
from schemas.media import LOCATIONS, MEDIA
from schemas.runs import ATTEMPTS, RUNS
from schemas.scores import FAMILIES
from schemas.table import Table
from tests.conftest import CHECKOUT
from tests.flows.hostile_media import BEYOND, BROKEN, write_good, write_hostile

SEED = 5
MEMORY_MB = 1024
ALLOW_FAILURES = ("--set", "failures.max_ratio=1.0")  # nearly everything fails here, as it should
INGEST = (*ALLOW_FAILURES, "--set", "limits.max_duration_s=36000", "--set", f"memory_mb={MEMORY_MB}")
SCAN = (*ALLOW_FAILURES, "--set", "limits.max_frames=1000", "--set", f"limits.memory_mb={MEMORY_MB}")


# A process counts as its own what its parent held when it was forked, and tests hold much: a small one stands in between.
MEASURED = """
import resource, subprocess, sys
ended = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10)
sys.exit(ended)
"""


def outback(lake: Path, *arguments: str) -> tuple[dict[str, Any], int]:
    """Runs the program -> its answer, and the most memory that it or a process it started has held, in MB."""
    program = [sys.executable, "-m", "jobs.cli", *arguments, "--lake", str(lake), "--json"]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, "-c", MEASURED, *program]
    process = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr
    *_, answer, most_mb = process.stdout.splitlines()
    return json.loads(answer), int(most_mb)


def reasons(lake: Lake, root: Path, stage: str) -> dict[str, str]:
    """Reason by path below `root`."""
    rows = [row for row in lake.read(ATTEMPTS).to_pylist() if row["stage"] == stage]
    place = {row["media_id"]: row["uri"] for row in lake.read(LOCATIONS).to_pylist()}
    return {place.get(row["item_id"], row["item_id"]).removeprefix(f"{root}/"): row["error_class"] for row in rows}


def measured(lake: Lake, table: Table, key: str, ids: set[str]) -> list[str]:
    """Rows of those media or clips as text, without what tells of the run."""
    names = [column.name for column in table.columns if not column.provenance and column.name != "run_id"]
    return sorted(repr(row) for row in lake.read(table, names).to_pylist() if row[key] in ids)


@pytest.fixture
def nobody() -> Iterator[socket.socket]:
    """A port of this machine at which nobody may knock."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_hostile_folder(tmp_path: Path, nobody: socket.socket) -> None:
    good = tmp_path / "good"
    num_good = len(write_good(good))
    alone = Lake.open(tmp_path / "alone")
    report, _ = outback(alone.folder, "ingest", str(good), *INGEST)
    assert report["media_files"] == report["offered"] == num_good
    report, _ = outback(alone.folder, "scan", *SCAN)
    assert report["outcome"]["num_done"] == num_good

    hostile = write_hostile(tmp_path / "hostile", SEED, nobody.getsockname()[1])
    lake = Lake.open(tmp_path / "lake")
    report, most_mb = outback(lake.folder, "ingest", str(good), str(hostile.folder), *INGEST)
    assert most_mb < MEMORY_MB
    named = [report[part] for part in ("media_files", "text_files", "sidecars", "manifests")]
    refused = {**report["rejected"], **report["failed"]}
    assert report["offered"] == sum(named) + sum(refused.values()) == num_good + len(hostile.reasons)
    (run,) = [row for row in lake.read(RUNS).to_pylist() if row["status"] == "done"]
    assert json.loads(run["outcome"])["rejected"] == report["rejected"]

    ended = reasons(lake, hostile.folder, "ingest")
    readable = hostile.reasons.keys() - ended.keys()
    odd = {name: ended.get(name) for name, allowed in hostile.reasons.items() if ended.get(name) not in allowed}
    assert not odd.keys() - hostile.only_in_scan, odd
    assert ended.keys() <= hostile.reasons.keys()
    assert report["media_files"] == num_good + len(readable - {"rows/manifest.jsonl"})

    with (hostile.folder / "grows.mp4").open("ab") as file:
        file.write(bytes(1000))
    (hostile.folder / "vanishes.mp4").unlink()
    report, _ = outback(lake.folder, "scan", *SCAN)
    ended = reasons(lake, hostile.folder, "scan")
    assert report["outcome"]["num_done"] + len(ended) == report["num_media"]
    for name, reason in ended.items():
        assert reason in hostile.reasons[name] | BROKEN | BEYOND, (name, reason)
    assert {name: ended.get(name) for name in hostile.only_in_scan} == {
        name: next(iter(hostile.reasons[name])) for name in hostile.only_in_scan
    }

    media = set(alone.read(MEDIA)["media_id"].to_pylist())
    clips = set(alone.read(CLIPS)["clip_id"].to_pylist())
    assert len(media) == num_good
    for table, key, ids in [
        (MEDIA, "media_id", media),
        (CLIPS, "media_id", media),
        *[(f, "clip_id", clips) for f in FAMILIES],
    ]:
        assert measured(lake, table, key, ids) == measured(alone, table, key, ids), table.name
    scanned = {
        row["media_id"]: (row["num_frames"], row["num_clips"], row["cuts"]) for row in lake.read(SCANS).to_pylist()
    }
    for row in alone.read(SCANS).to_pylist():
        assert scanned[row["media_id"]] == (row["num_frames"], row["num_clips"], row["cuts"])
    with pytest.raises(BlockingIOError):
        nobody.accept()
    assert not (tmp_path / "outside.png").exists()
    assert not (tmp_path.parent / "outside.png").exists()
