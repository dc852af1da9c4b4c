"""Semantic duplicates from kept embeddings: planted groups through the lake and a recipe, and what is said without them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from jobs.curate import curate, read_set
from jobs.score_semantic import SemanticConfig, score_semantic
from pipeline.fingerprint_clips import fingerprint_id
from pipeline.rules import CurateRecipe, Likeness
from schemas.catalog import Lake
from schemas.clips import CLIPS
from schemas.embeddings import EMBEDDINGS
from schemas.errors import ConfigError
from schemas.fingerprints import FINGERPRINTS
from schemas.identity import clip_id
from schemas.media import MEDIA
from schemas.scores import SEMANTIC
from tests.jobs.test_cli import call

DIM = 32
ANY = SemanticConfig()


def put(lake: Lake, number: int, side_px: int, kind: str = "video") -> str:
    medium = f"{number:016x}"
    row = {"media_id": medium, "digest": medium, "kind": kind, "num_bytes": 1, "container": "x", "codec": "x"}
    row |= {"width_px": side_px, "height_px": side_px, "rotation_deg": 0, "has_audio": False}
    lake.append(MEDIA, [row], "r")
    clip = {"clip_id": clip_id(medium, 0, 9), "segmentation_id": "s", "media_id": medium, "kind": kind}
    lake.append(CLIPS, [clip | {"start_ms": 0, "end_ms": 9, "start_frame": 0, "end_frame": 9}], "r")
    return clip["clip_id"]


def embed(lake: Lake, clip: str, frames: NDArray[np.floating], model: str = "m") -> None:
    frames = frames / np.linalg.norm(frames, axis=1, keepdims=True)
    rows = [
        {
            "clip_id": clip,
            "frame_ms": index,
            "model_id": model,
            "dim": len(one),
            "embedding": one.astype("<f2").tobytes(),
        }
        for index, one in enumerate(frames)
    ]
    lake.append(EMBEDDINGS, rows, "r")


def test_of_clips_that_show_the_same_the_best_stays(tmp_path: Path) -> None:
    rng, lake = np.random.default_rng(0), Lake(tmp_path / "lake")
    scenes = rng.normal(size=(2, 3, DIM))
    small, large, other = put(lake, 0, 100), put(lake, 1, 200), put(lake, 2, 300)
    image = put(lake, 3, 400, "image")
    lacking = put(lake, 4, 500)
    embed(lake, small, scenes[0])
    embed(lake, large, scenes[0] + 0.2 * rng.normal(size=(3, DIM)))
    embed(lake, other, scenes[1])
    embed(lake, image, scenes[0].mean(axis=0)[np.newaxis])  # what the videos show, but a picture
    report = score_semantic(lake, None, ANY)
    assert (report.num_clips, report.num_without, report.num_new) == (4, 1, 4)
    rows = {row["clip_id"]: row for row in lake.read(SEMANTIC).to_pylist()}
    assert lacking not in rows  # no embedding, no score
    assert rows[small]["duplicate_of"] == large
    assert 0.9 < rows[small]["semantic"] < 1
    assert (rows[image]["duplicate_of"], rows[image]["semantic"]) == (None, -1)
    assert rows[large]["semantic"] < 0.7

    recipe = CurateRecipe(coverage=0.8, semantic=Likeness(high=0.9))
    curate(lake, recipe, "x")
    assert set(read_set(lake, "x")["clip_id"].to_pylist()) == {large, other, image}
    assert score_semantic(lake, None, ANY).num_new == 0

    embed(lake, lacking, scenes[1])  # the largest of its group: the other one goes
    more = score_semantic(lake, None, ANY)
    assert (more.num_new, more.scorer_id != report.scorer_id) == (5, True)
    curate(lake, recipe.model_copy(update={"coverage": 1.0}), "more")
    assert set(read_set(lake, "more")["clip_id"].to_pylist()) == {large, lacking, image}


def test_of_as_many_pixels_the_sharper_is_better(tmp_path: Path) -> None:
    lake, scene = Lake(tmp_path / "lake"), np.random.default_rng(1).normal(size=(3, DIM))
    clips = [put(lake, number, 100) for number in range(3)]
    for clip, sharpness in zip(clips[1:], (5.0, 9.0), strict=True):  # the first was not fingerprinted
        row = {"clip_id": clip, "fingerprint_id": fingerprint_id(), "hashes": b"", "blank": 0, "pixels_sha256": clip}
        lake.append(FINGERPRINTS, [row | {"sharpness": sharpness}], "r")
    for clip in clips:
        embed(lake, clip, scene)
    score_semantic(lake, None, ANY)
    rank = {row["clip_id"]: row["rank"] for row in lake.read(SEMANTIC).to_pylist()}
    assert rank == {clips[2]: 0, clips[1]: 1, clips[0]: 2}


def test_the_score_is_the_cosine_of_mean_embeddings(tmp_path: Path) -> None:
    """Frames without number and order of storage: many clips in batches that cut through clips."""
    rng, lake = np.random.default_rng(2), Lake(tmp_path / "lake")
    frames = rng.normal(size=(30, 3, DIM)) + rng.normal(size=DIM)
    clips = [put(lake, number, 100) for number in range(30)]
    for clip, found in zip(clips, frames, strict=True):
        embed(lake, clip, found[:2])
    for clip, found in zip(clips, frames, strict=True):
        unit = found[2:] / np.linalg.norm(found[2:])
        row = {
            "clip_id": clip,
            "frame_ms": 2,
            "model_id": "m",
            "dim": DIM,
            "embedding": unit[0].astype("<f2").tobytes(),
        }
        lake.append(EMBEDDINGS, [row], "r")
    score_semantic(lake, None, ANY)
    units = (frames / np.linalg.norm(frames, axis=2, keepdims=True)).mean(axis=1)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    cosines = np.where(np.tri(30, k=-1, dtype=bool), units @ units.T, -1)
    rows = lake.read(SEMANTIC).sort_by("clip_id").to_pylist()
    np.testing.assert_allclose([row["semantic"] for row in rows], cosines.max(axis=1), atol=2e-3)


def test_what_is_missing_is_said_and_no_score_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lake = Lake(tmp_path / "lake")
    clip = put(lake, 0, 100)
    with pytest.raises(
        ConfigError, match=r"none of 1 clips has an embedding.*outback score aesthetic.*--set clip=PATH"
    ):
        score_semantic(lake, None, ANY)
    assert lake.snapshot_id(SEMANTIC) is None
    for model in ("one", "two"):
        embed(lake, clip, np.ones((1, DIM)), model)
    with pytest.raises(ConfigError, match=r"choose one with --set model=, of \['one', 'two'\]"):
        score_semantic(lake, None, ANY)
    with pytest.raises(ConfigError, match="no clip has an embedding of model 'three'"):
        score_semantic(lake, None, SemanticConfig(model="three"))
    assert not call(monkeypatch, "score", "semantic", "--set", "model=two", "--lake", str(lake.folder), "--json")
    assert json.loads(capsys.readouterr().out)["model_id"] == "two"


def test_embeddings_that_are_added_meanwhile_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lake, frames = Lake(tmp_path / "lake"), np.eye(DIM)
    for number in range(2):
        embed(lake, put(lake, number, 100), frames[:1])
    read = Lake.iter_batches

    def read_later(self: Lake, *arguments: Any, **options: Any) -> Iterator[pa.RecordBatch]:
        row = {"clip_id": clip_id(f"{0:016x}", 0, 9), "frame_ms": 5, "model_id": "m", "dim": DIM}
        lake.append(EMBEDDINGS, [row | {"embedding": frames[1].astype("<f2").tobytes()}], "r")
        return read(self, *arguments, **options)

    monkeypatch.setattr(Lake, "iter_batches", read_later)
    score_semantic(lake, None, ANY)
    assert sorted(lake.read(SEMANTIC)["semantic"].to_pylist()) == [-1, 1]
