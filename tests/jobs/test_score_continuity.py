"""Scenes cut in two: across a flash one goes on, across a true cut none does. A scan that joins leaves clips as they were."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from jobs.scan import ScanWorker, _left_out
from jobs.score_continuity import ContinuityConfig, score_continuity
from pipeline.detect_scenes import Joined, SegmentationConfig
from pipeline.read_frames import moments, read_frames
from pipeline.scan_medium import ScanConfig, scan_medium
from schemas.catalog import Lake
from schemas.clips import CLIPS
from schemas.embeddings import EMBEDDINGS
from schemas.errors import ConfigError, RowError
from schemas.runs import ATTEMPTS
from schemas.scores import CONTINUITY
from tests.jobs.test_score_semantic import embed
from tests.pipeline.made_media import Image, write_video

FPS, NUM_FRAMES = 10, 3
APART = ScanConfig(families=())
MEDIUM = "0" * 16


def todo(medium: str = MEDIUM) -> pa.Table:
    return pa.table({"media_id": [medium], "kind": ["video"]})


def scene(seed: int, count: int) -> list[Image]:
    """A picture that the camera moves over slowly."""
    rng = np.random.default_rng(seed)
    wide = cv2.resize(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), (240, 120), interpolation=cv2.INTER_CUBIC)
    return [np.ascontiguousarray(wide[:, index // 2 : index // 2 + 160]) for index in range(count)]


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scene with a flash at frame 25, and another one from frame 50 on."""
    frames = scene(0, 50) + scene(1, 25)
    for index in (25, 26):
        frames[index] = np.full_like(frames[index], 255)
    return write_video(tmp_path_factory.mktemp("film") / "a.mp4", frames, FPS)


def small_pictures(path: Path, start_ms: int, end_ms: int) -> NDArray[np.float64]:
    """A double of the embedder: frames as the scorer reads them, as vectors of their pixels at 8x8 less their mean."""
    frames = read_frames(path, start_ms, end_ms, num_frames=NUM_FRAMES, size=(8, 8)).reshape(NUM_FRAMES, -1)
    return frames - frames.mean(axis=1, keepdims=True) + 1e-3


def scanned(lake: Lake, path: Path, config: ScanConfig, left_out: list[int]) -> list[dict[str, object]]:
    result = scan_medium(path, MEDIUM, "video", config, left_out)
    lake.append(CLIPS, result.clips, "r")
    return result.clips


def test_a_flash_is_joined_and_a_cut_is_not(film: Path, tmp_path: Path) -> None:
    lake = Lake(tmp_path / "lake")
    before = scanned(lake, film, APART, [])
    assert [clip["start_frame"] for clip in before] == [0, 25, 50]
    for clip in before:
        start_ms, end_ms = int(str(clip["start_ms"])), int(str(clip["end_ms"]))
        vectors = small_pictures(film, start_ms, end_ms)
        rows = zip(moments(start_ms / 1000, end_ms / 1000, None, NUM_FRAMES), vectors, strict=True)
        lake.append(
            EMBEDDINGS,
            [
                {"clip_id": clip["clip_id"], "frame_ms": round(1000 * moment), "model_id": "m", "dim": len(vector)}
                | {"embedding": (vector / np.linalg.norm(vector)).astype("<f2").tobytes()}
                for moment, vector in rows
            ],
            "r",
        )
    report = score_continuity(lake, ContinuityConfig())
    assert (report.num_clips, report.num_without, report.num_new) == (3, 0, 3)
    rows = lake.read(CONTINUITY).sort_by("clip_id").to_pylist()
    ids = [str(clip["clip_id"]) for clip in before]
    assert [row["continues"] for row in rows] == [None, ids[0], ids[1]]
    first, flash, cut = (row["continuity"] for row in rows)
    assert (first, flash > 0.8, cut < 0.5) == (-1, True, True)

    joined = Joined(scorer=report.scorer_id, low=0.8)
    together = APART.model_copy(update={"segmentation": SegmentationConfig(joined=joined)})
    assert together.segmentation_id != APART.segmentation_id
    left_out = _left_out(lake, together, todo()).to_pylist()[0]
    assert left_out == [25]
    after = scanned(lake, film, together, left_out)
    assert [(clip["start_frame"], clip["end_frame"]) for clip in after] == [(0, 50), (50, 75)]
    assert after[1]["clip_id"] == before[2]["clip_id"]  # its scores hold for both
    kept = {(row["clip_id"], row["segmentation_id"]) for row in lake.read(CLIPS).to_pylist()}
    assert {(clip["clip_id"], APART.segmentation_id) for clip in before} <= kept

    divided = together.model_copy(update={"segmentation": SegmentationConfig(joined=joined, max_scene_s=2.0)})
    parts = scan_medium(film, MEDIUM, "video", divided, left_out).clips
    assert [clip["start_frame"] for clip in parts] == [0, 17, 34, 50, 63]  # equal parts of what was joined


def cut_in_three(lake: Lake, medium: str = MEDIUM) -> list[str]:
    rows = [
        {"clip_id": f"{medium}-{index}", "segmentation_id": APART.segmentation_id, "media_id": medium, "kind": "video"}
        | {"start_ms": 9 * index, "end_ms": 9 * index + 9, "start_frame": 9 * index, "end_frame": 9 * index + 9}
        for index in range(3)
    ]
    lake.append(CLIPS, rows, "r")
    return [str(row["clip_id"]) for row in rows]


def test_the_likest_of_the_two_nearest_frames_counts(tmp_path: Path) -> None:
    lake, rng = Lake(tmp_path / "lake"), np.random.default_rng(0)
    one, two, three = cut_in_three(lake)
    frames = rng.normal(size=(3, 3, 32))
    frames[1, 2] = frames[0, 0]  # two frames from the cut on one side, three on the other
    frames[2, 1] = frames[1, 1] + 0.1 * frames[0, 0]
    for clip, found in zip((one, two, three), frames, strict=True):
        embed(lake, clip, found)
    other = cut_in_three(lake, "1" * 16)
    embed(lake, other[0], frames[2])  # what the clip before it in the table shows, but of another medium
    score_continuity(lake, ContinuityConfig())
    found = {row["clip_id"]: row["continuity"] for row in lake.read(CONTINUITY).to_pylist()}
    units = frames / np.linalg.norm(frames, axis=2, keepdims=True)
    expected = [-1.0, *((units[index][1:] @ units[index + 1][:2].T).max() for index in range(2))]
    np.testing.assert_allclose([found[clip] for clip in (one, two, three)], expected, atol=2e-3)
    assert (expected[1] < 0.7, expected[2] > 0.9) == (True, True)
    assert found[other[0]] == -1


def test_clips_beside_one_without_embedding_wait(tmp_path: Path) -> None:
    lake, frame = Lake(tmp_path / "lake"), np.random.default_rng(1).normal(size=(1, 32))
    one, two, three = cut_in_three(lake)
    with pytest.raises(ConfigError, match=r"none of 3 clips has an embedding.*outback score aesthetic"):
        score_continuity(lake, ContinuityConfig())
    embed(lake, one, frame)
    embed(lake, three, frame)
    first = score_continuity(lake, ContinuityConfig())
    assert (first.num_without, first.num_new) == (2, 1)
    config = ScanConfig(segmentation=SegmentationConfig(joined=Joined(scorer=first.scorer_id, low=0.9)))
    with pytest.raises(ConfigError, match=r"no row for 2 of 3 clips.*outback score continuity"):
        _left_out(lake, config, todo())
    embed(lake, two, frame)
    again = score_continuity(lake, ContinuityConfig())
    assert (again.num_without, again.num_new, again.scorer_id) == (0, 2, first.scorer_id)
    assert _left_out(lake, config, todo()).to_pylist() == [[9, 18]]  # one frame a clip stands for both of the nearest
    with pytest.raises(ConfigError, match=r"1 videos were not cut yet"):
        _left_out(lake, config, todo("f" * 16))
    assert score_continuity(lake, ContinuityConfig()).num_new == 0


def test_a_score_at_the_bound_is_joined(tmp_path: Path) -> None:
    lake = Lake(tmp_path / "lake")
    scores = zip(cut_in_three(lake), (-1.0, 0.9, 0.8999), strict=True)
    lake.append(CONTINUITY, [{"clip_id": clip, "scorer_id": "c", "continuity": found} for clip, found in scores], "r")
    config = ScanConfig(segmentation=SegmentationConfig(joined=Joined(scorer="c", low=0.9)))
    assert _left_out(lake, config, todo()).to_pylist() == [[9]]


def test_a_video_that_can_be_read_again_is_not_joined_uncut(film: Path, tmp_path: Path) -> None:
    lake = Lake(tmp_path / "lake")
    config = ScanConfig(families=(), segmentation=SegmentationConfig(joined=Joined(scorer="c", low=0.9)))
    row = {"stage": "scan", "stage_id": "s", "item_id": MEDIUM, "uri": None, "attempt": 1, "error_class": "Moved"}
    row |= {"message": "", "terminal": False, "host": "h"}
    lake.append(ATTEMPTS, [row], "r")
    assert _left_out(lake, config, todo()).to_pylist() == [None]
    item = {"media_id": MEDIUM, "uris": [str(film)], "num_bytes": film.stat().st_size, "kind": "video"}
    with pytest.raises(RowError, match=r"^NotCut: .*without segmentation.joined"):
        ScanWorker(config).process({**item, "left_out": None})


def test_embeddings_that_are_added_meanwhile_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lake, rng = Lake(tmp_path / "lake"), np.random.default_rng(3)
    clips = cut_in_three(lake)
    frames = rng.normal(size=(3, 2, 32))
    for clip, found in zip(clips, frames, strict=True):
        embed(lake, clip, found[:1])
    read = Lake.iter_batches

    def read_later(self: Lake, *arguments: Any, **options: Any) -> Iterator[pa.RecordBatch]:
        for clip, found in zip(clips, frames, strict=True):
            row = {"clip_id": clip, "frame_ms": 5, "model_id": "m", "dim": 32}
            lake.append(EMBEDDINGS, [row | {"embedding": found[1].astype("<f2").tobytes()}], "r")
        return read(self, *arguments, **options)

    monkeypatch.setattr(Lake, "iter_batches", read_later)
    score_continuity(lake, ContinuityConfig())
    found = lake.read(CONTINUITY).sort_by("clip_id")["continuity"].to_pylist()
    units = frames[:, 0] / np.linalg.norm(frames[:, 0], axis=1, keepdims=True)
    np.testing.assert_allclose(found, [-1, units[0] @ units[1], units[1] @ units[2]], atol=2e-3)
