"""The whole road at its smallest size: finished, found finished, and killed anywhere and resumed."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.lineage import trace
from schemas.catalog import Lake
from schemas.generations import GENERATIONS
from tests.conftest import Demo, contents
from tests.flows.test_scan_failures import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
NUM_KILLS = 5


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jobs.cli", "demo", "--size", "smoke", "--folder", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # A session of its own, so that a kill can take the driver alone or everything it started.
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True)  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, out[-4000:]
    return out


@pytest.fixture(scope="module")
def undisturbed(smoke_demo: Demo) -> dict[str, Any]:
    place = smoke_demo.folder
    first = contents(place)
    again = finish(start(place))
    lake = Lake.open(place / "lake")
    generation = lake.read(GENERATIONS, ["generation_id"])["generation_id"][0].as_py()
    lineage = trace(lake, generation)
    second = contents(place)
    return {"out": smoke_demo.out, "again": again, "first": first, "second": second, "lineage": lineage}


def test_everything_planted_is_found(undisturbed: dict[str, Any]) -> None:
    found, planted = re.search(r"(\d+) of (\d+) planted cuts and defects as planted", undisturbed["out"]).groups()  # type: ignore[union-attr]
    assert found == planted
    assert int(planted) > 40


def test_every_generation_parses(undisturbed: dict[str, Any]) -> None:
    parsed, drawn = re.search(r"(\d+) of (\d+) generated documents parse", undisturbed["out"]).groups()  # type: ignore[union-attr]
    assert parsed == drawn


def test_the_second_run_finds_nothing_to_do(undisturbed: dict[str, Any]) -> None:
    # Scan, captions that came along, captioner, captions by it, tokenizer, tokenize, pack, language model.
    assert undisturbed["again"].count("nothing to do") == 8
    assert undisturbed["first"] == undisturbed["second"]


def test_lineage_reaches_the_media(undisturbed: dict[str, Any]) -> None:
    lineage = undisturbed["lineage"]
    assert not lineage.missing
    captioners = {one.captioner["captioner_id"]: one for one in lineage.training.captioners}
    assert set(captioners) <= {caption["captioner_id"] for caption in lineage.training.data.captions}
    assert captioners
    places = [place["uri"] for medium in lineage.training.data.media for place in medium["locations"]]
    assert any("/corpus/shapes/" in uri for uri in places)
    assert lineage.tokenizer_training.runs
    assert json.dumps(lineage.training.checkpoint, default=str)


@pytest.fixture
def place(undisturbed: dict[str, Any], smoke_demo: Demo) -> Iterator[Path]:
    """Where the other demo was made: URIs are content. It comes back afterwards."""
    kept = smoke_demo.folder.with_name("kept")
    smoke_demo.folder.rename(kept)
    yield smoke_demo.folder
    shutil.rmtree(smoke_demo.folder)
    kept.rename(smoke_demo.folder)


def test_killed_anywhere_and_resumed_it_ends_the_same(place: Path, smoke_demo: Demo) -> None:
    rng = random.Random(os.environ.get("OUTBACK_TEST_SEED", "7"))
    for _ in range(NUM_KILLS):
        process = start(place)
        time.sleep(rng.uniform(2.0, 60.0))
        if rng.random() < 0.5:
            process.kill()  # the driver alone: its workers find out by themselves
        else:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    finish(start(place))
    assert contents(place) == smoke_demo.contents
