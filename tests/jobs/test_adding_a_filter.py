"""docs/adding-a-filter.md, followed to the letter: its code, its commands and its recipe, on clips that are there."""

import json
import os
import re
import shlex
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from jobs.curate import read_set
from jobs.show import table_reports
from pipeline.clip_scorer import ScoreWorker
from schemas.catalog import Lake
from schemas.clips import CLIPS
from schemas.identity import clip_id
from schemas.media import LOCATIONS
from schemas.runs import ATTEMPTS
from tests.conftest import CHECKOUT

PAGE = (CHECKOUT / "docs" / "adding-a-filter.md").read_text(encoding="utf-8")
BLUE, RED = (20, 30, 220), (220, 30, 20)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def half_blue_video(path: Path) -> None:
    """Two seconds whose right half is blue all the time."""
    picture = np.full((64, 96, 3), RED, np.uint8)
    picture[:, 48:] = BLUE
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(10))
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for _ in range(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def add_clip(lake: Lake, path: Path, number: int, end_ms: int) -> str:
    """A whole medium as one clip, where a scan would have put it."""
    media = f"{number:016x}"
    clip = clip_id(media, 0, end_ms)
    kind = "video" if end_ms else "image"
    span = {"start_ms": 0, "end_ms": end_ms, "start_frame": 0, "end_frame": 20, "fps": 10.0 if end_ms else None}
    lake.append(CLIPS, [{"clip_id": clip, "segmentation_id": "s", "media_id": media, "kind": kind, **span}], "r")
    place = {"media_id": media, "uri": str(path), "location_id": media}
    lake.append(LOCATIONS, [place], "r")
    return clip


def outback(folder: Path, *arguments: str, expected: int = 0) -> str:
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, "-c", "from jobs.cli import main; main()", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == expected, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A blue image, a red one, a video that is half blue, and one that cannot be read; and the filter of the page."""
    made = tmp_path_factory.mktemp("filter")
    lake = Lake(made / "lake")
    for number, colour in enumerate((BLUE, RED)):
        Image.new("RGB", (80, 64), colour).save(made / f"{number}.png")
        add_clip(lake, made / f"{number}.png", number, 0)
    half_blue_video(made / "2.mp4")
    add_clip(lake, made / "2.mp4", 2, 2000)
    (made / "3.mp4").write_bytes((made / "2.mp4").read_bytes()[:100])
    add_clip(lake, made / "3.mp4", 3, 2000)
    (made / "blue_filter.py").write_text(blocks("python")[0])
    (made / "not_blue.toml").write_text(f"coverage = 0.5\n{blocks('toml')[0]}")
    return made


def test_a_whole_filter_is_less_than_30_lines() -> None:
    (code,) = blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) < 30


def test_its_scores_are_true(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    worker = ScoreWorker("blue_filter:BlueScorer", "{}", "s", str(folder))
    found = []
    for name, end_ms in (("0.png", 0), ("1.png", 0), ("2.mp4", 2000)):
        kind = "video" if end_ms else "image"
        item = {"clip_id": name, "uri": str(folder / name), "kind": kind, "start_ms": 0, "end_ms": end_ms}
        (row,) = worker.process(item)["score_blue"]
        found.append((round(float(str(row["blue_ratio"])), 1), row["num_samples"]))
    assert found == [(1.0, 1), (0.0, 1), (0.5, 4)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_page_as_it_stands(folder: Path) -> None:
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    before = Lake(folder / "lake").snapshot_ids(CLIPS)
    said = [outback(folder, *shlex.split(command)[1:]) for command in commands]
    lake = Lake(folder / "lake")
    assert "3 scored, 1 failed" in said[0]
    assert lake.snapshot_ids(CLIPS) == before
    (failed,) = lake.read(ATTEMPTS).to_pylist()
    assert (failed["stage"], failed["item_id"]) == ("score_blue", clip_id(f"{3:016x}", 0, 2000))

    (blue,) = [report for report in table_reports(lake) if report.name == "score_blue"]
    assert (blue.num_rows, blue.coverage) == (3, 0.75)
    assert blue.seconds_per_clip is not None
    assert blue.seconds_per_clip > 0
    assert re.search(r"score_blue.*75\.0%", said[1])
    kept = read_set(lake, "not-blue")["clip_id"].to_pylist()
    assert kept == [clip_id(f"{1:016x}", 0, 0), clip_id(f"{2:016x}", 0, 2000)]

    scores = json.loads(outback(folder, "sql", "--json", "select clip_id, blue_ratio, num_samples from score_blue"))
    found = {row["clip_id"][15]: (round(row["blue_ratio"], 1), row["num_samples"]) for row in scores}
    assert found == {"0": (1.0, 1), "1": (0.0, 1), "2": (0.5, 4)}

    state = {name: lake.snapshot_ids(table) for name, table in (("clips", CLIPS), ("attempts", ATTEMPTS))}
    again = outback(folder, "score", "blue_filter:BlueScorer")
    assert "nothing to do; 1 failed before" in again
    assert {name: lake.snapshot_ids(table) for name, table in (("clips", CLIPS), ("attempts", ATTEMPTS))} == state
    assert next(r for r in table_reports(lake) if r.name == "score_blue").num_snapshots == blue.num_snapshots
