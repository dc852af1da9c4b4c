"""A scan on clusters of no CPU to four: it refuses or completes, and what it writes is the same."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.ingest import IngestConfig, ingest
from schemas.catalog import Lake
from schemas.clips import CLIPS, SCANS
from schemas.scores import FAMILIES
from tests.conftest import CHECKOUT
from tests.flows.small_media import write_image, write_video

MOST_CPUS = 4


@pytest.fixture
def cluster(ray_apart: None) -> Iterator[Any]:
    """A node that has no CPU to give."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield made
    made.shutdown()


def scan(lake: Path, address: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", "scan", "--lake", str(lake)],
        cwd=CHECKOUT, env={**os.environ, "PYTHONPATH": str(CHECKOUT), "RAY_ADDRESS": address},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_scan_refuses_or_completes(tmp_path: Path, cluster: Any) -> None:
    media = tmp_path / "media"
    media.mkdir()
    for seed in range(2):
        write_video(media / f"video{seed}.mp4", seed)
        write_image(media / f"image{seed}.png", seed)
    ingested = tmp_path / "lake"
    ingest(Lake.open(ingested), [media], options=IngestConfig())
    shutil.move(ingested, tmp_path / "kept")
    found = set()
    for num_cpus in range(MOST_CPUS + 1):
        if num_cpus:
            cluster.add_node(num_cpus=1)
        shutil.copytree(tmp_path / "kept", ingested)  # a lake knows its files by their places
        done = scan(ingested, cluster.address)
        assert "Traceback" not in done.stderr, done.stderr
        if num_cpus == 0:
            assert done.returncode == 2, done.stderr
            assert "a worker of scan needs 1 CPUs, and no node has more than 0 CPUs" in done.stderr
        else:
            assert done.returncode == 0, done.stderr
            assert "4 scanned, 0 failed" in done.stdout
            lake = Lake.open(ingested)
            found.add(tuple(lake.content_sha256(table) for table in (CLIPS, *FAMILIES, SCANS)))
        shutil.rmtree(ingested)
    assert len(found) == 1


def test_nobody_at_the_address_is_said_at_once(tmp_path: Path) -> None:
    media = tmp_path / "media"
    media.mkdir()
    write_image(media / "image.png", 1)
    ingest(Lake.open(tmp_path / "lake"), [media], options=IngestConfig())
    done = scan(tmp_path / "lake", "127.0.0.1:1")
    assert done.returncode == 2
    assert "no Ray cluster answers at RAY_ADDRESS='127.0.0.1:1'" in done.stderr
