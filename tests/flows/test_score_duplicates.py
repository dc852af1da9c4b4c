"""Duplicates by the command line: a copy goes, its original stays, what cannot be read is a row, a rerun has nothing to do."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jobs.curate import curate, read_set
from pipeline.rules import CurateRecipe, Likeness
from schemas.catalog import Lake
from schemas.clips import CLIPS
from schemas.fingerprints import FINGERPRINTS
from schemas.identity import clip_id, file_digest, media_id
from schemas.media import LOCATIONS, MEDIA
from schemas.runs import ATTEMPTS
from schemas.scores import DUPLICATE
from tests.flows.small_media import write_image


def put(lake: Lake, path: Path, side_px: int) -> str:
    """An image as ingest and scan would leave it -> its clip."""
    digest = file_digest(path)
    medium = media_id(digest)
    lake.append(
        MEDIA,
        [
            {"media_id": medium, "digest": digest, "kind": "image", "num_bytes": path.stat().st_size}
            | {"container": "x", "codec": "x", "width_px": side_px, "height_px": side_px}
            | {"rotation_deg": 0, "has_audio": False}
        ],
        "r",
    )
    lake.append(LOCATIONS, [{"location_id": medium, "media_id": medium, "uri": str(path)}], "r")
    clip = {"clip_id": clip_id(medium, 0, 0), "segmentation_id": "s", "media_id": medium, "kind": "image"}
    lake.append(CLIPS, [clip | {"start_ms": 0, "end_ms": 0, "start_frame": 0, "end_frame": 1}], "r")
    return clip["clip_id"]


def score(lake: Lake, root: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "jobs.cli", "score", "duplicate", "--lake", str(lake.folder), "--json"]
    done = subprocess.run(command, cwd=root, env=dict(os.environ), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.mark.slow
def test_copies_are_scored_and_a_recipe_keeps_the_best(tmp_path: Path, checkout: Path) -> None:
    lake = Lake.open(tmp_path / "lake")
    for seed in range(3):
        write_image(tmp_path / f"{seed}.png", seed, side_px=192)
    clips = [put(lake, tmp_path / f"{seed}.png", 192) for seed in range(3)]
    Image.open(tmp_path / "0.png").resize((128, 128)).save(tmp_path / "copy.jpg", quality=80)
    copy = put(lake, tmp_path / "copy.jpg", 128)
    (tmp_path / "broken.png").write_bytes((tmp_path / "2.png").read_bytes()[:200])
    broken = put(lake, tmp_path / "broken.png", 192)

    first = score(lake, checkout)
    assert (first["num_clips"], first["num_new"], first["outcome"]["num_failed"]) == (4, 4, 1)
    rows = {row["clip_id"]: row for row in lake.read(DUPLICATE).to_pylist()}
    assert set(rows) == {*clips, copy}
    assert rows[copy]["duplicate_of"] == clips[0]
    assert rows[copy]["near"] > 0.9
    assert all(rows[clip]["near"] < 0.8 for clip in clips)
    assert [row["item_id"] for row in lake.read(ATTEMPTS).to_pylist()] == [broken]

    recipe = CurateRecipe(coverage=0.75, duplicate=Likeness(high=0.9))
    curate(lake, recipe, "unique")
    assert set(read_set(lake, "unique")["clip_id"].to_pylist()) == set(clips)

    again = score(lake, checkout)
    assert (again["scorer_id"], again["num_new"], again["outcome"]) == (first["scorer_id"], 0, None)
    assert len(lake.read(DUPLICATE)) == 4

    write_image(tmp_path / "3.png", 3)
    fourth = put(lake, tmp_path / "3.png", 96)
    more = score(lake, checkout)
    assert more["scorer_id"] != first["scorer_id"]  # other clips were compared
    assert (more["outcome"]["num_done"], more["num_new"], len(lake.read(FINGERPRINTS))) == (1, 5, 5)
    after = curate(lake, recipe, "more")
    assert after.recipe.scorers.duplicate == more["scorer_id"]  # without being named
    assert set(read_set(lake, "more")["clip_id"].to_pylist()) == {*clips, fourth}
    assert set(read_set(lake, "unique")["clip_id"].to_pylist()) == set(clips)
