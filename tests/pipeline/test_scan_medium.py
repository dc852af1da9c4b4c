"""One pass gives the rows of the tables: every frame decoded once, every clip scored, every fault named."""

import json
import pickle
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from pipeline.clip_scorers import ClipScorers
from pipeline.decode import Frame, Image
from pipeline.detect_scenes import FrameNumbers
from pipeline.samples import SampleSpec
from pipeline.sandbox import Sandbox
from pipeline.scan_medium import ScanConfig, ScanLimits, ScanResult, scan_medium
from pipeline.score_motion import MotionConfig
from pipeline.score_text import TextConfig
from schemas.clips import CLIPS, SCANS
from schemas.errors import ConfigError, RowError
from schemas.scores import FAMILIES
from schemas.table import Table
from tests.pipeline.made_media import MILLISECOND, shared_media, shot, write_video

MEDIA_ID = "0123456789abcdef"
STAMPS = {"run_id", "written_at"}
decoded: list[int] = []


class Watched(Frame):
    """A frame whose end can be seen."""

    __slots__ = ("__weakref__",)


def counted(path: Path) -> Iterator[tuple[float, Image]]:
    """A decoder that counts the frames it is asked for."""
    for index, image in enumerate([*shot(1, 60), *shot(2, 40)]):
        decoded.append(index)
        yield index / 25, image


def columns(table: Table) -> set[str]:
    return {column.name for column in table.columns} - STAMPS


def assert_rows(result: ScanResult) -> None:
    """Rows have exactly the columns of their tables, and each clip has one row in each score table."""
    assert all(set(row) == columns(CLIPS) for row in result.clips)
    assert set(result.scan) == columns(SCANS)
    assert result.scan["num_clips"] == len(result.clips)
    ids = [clip["clip_id"] for clip in result.clips]
    assert len(set(ids)) == len(ids)
    assert set(result.scores) == {table.name for table in FAMILIES}
    for table in FAMILIES:
        rows = result.scores[table.name]
        assert [row["clip_id"] for row in rows] == ids
        assert all(set(row) == columns(table) for row in rows)
        assert all(row.get("num_samples", 1) >= 1 for row in rows)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("scan") / "a.mp4", [*shot(1, 60), *shot(2, 40, step_px=4)])


def test_a_video(video: Path) -> None:
    result = scan_medium(video, MEDIA_ID, "video", ScanConfig())
    assert_rows(result)
    assert [(clip["start_frame"], clip["end_frame"]) for clip in result.clips] == [(0, 60), (60, 100)]
    assert [(clip["start_ms"], clip["end_ms"]) for clip in result.clips] == [(0, 2400), (2400, 4000)]
    assert [clip["fps"] for clip in result.clips] == [25.0, 25.0]
    assert result.clips[1]["clip_id"] == f"{MEDIA_ID}-000002400-000004000"
    assert (result.scan["cuts"], result.scan["num_frames"], result.scan["decoder"]) == ([60], 100, "pyav")
    resolution = result.scores["score_resolution"][1]
    assert (resolution["short_edge_px"], resolution["long_edge_px"], resolution["duration_s"]) == (180, 320, 1.6)
    slow, fast = (row["motion"] for row in result.scores["score_motion"])
    assert slow == pytest.approx(12.5 / 180, rel=0.1)
    assert fast == pytest.approx(50 / 180, rel=0.1)


def test_an_image(tmp_path: Path) -> None:
    Pillow.fromarray(shot(1, 1)[0]).save(tmp_path / "a.png")
    result = scan_medium(tmp_path / "a.png", MEDIA_ID, "image", ScanConfig())
    assert_rows(result)
    clip = result.clips[0]
    assert (clip["start_ms"], clip["end_ms"], clip["start_frame"], clip["end_frame"], clip["fps"]) == (0, 0, 0, 1, None)
    assert result.scores["score_motion"][0]["motion"] is None
    assert result.scores["score_resolution"][0]["duration_s"] is None
    assert result.scores["score_text"][0]["text_coverage_max"] == 0.0


def test_every_frame_is_decoded_once(tmp_path: Path) -> None:
    decoded.clear()
    config = ScanConfig(decoder=f"{__name__}:counted")
    result = scan_medium(tmp_path / "any", MEDIA_ID, "video", config)
    assert decoded == list(range(100))
    assert result.scan["cuts"] == [60]


@pytest.mark.parametrize("decoder", ["opencv", "decord"])
def test_every_decoder_gives_the_same_rows(video: Path, decoder: str) -> None:
    one, other = (scan_medium(video, MEDIA_ID, "video", ScanConfig(decoder=name)) for name in ("pyav", decoder))
    assert other.scan["decoder"] == decoder
    assert one.clips == other.clips
    assert one.scores == other.scores


def test_the_same_medium_gives_the_same_bits(video: Path) -> None:
    one, other = (scan_medium(video, MEDIA_ID, "video", ScanConfig()) for _ in range(2))
    assert (one.clips, one.scores) == (other.clips, other.scores)


def test_a_single_frame(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", shot(1, 1))
    result = scan_medium(path, MEDIA_ID, "video", ScanConfig())
    assert_rows(result)
    assert (len(result.clips), result.clips[0]["end_ms"]) == (1, 40)
    assert result.scores["score_motion"][0]["motion"] is None


def test_ids_change_with_what_they_name() -> None:
    plain = ScanConfig()
    assert plain.scan_id == ScanConfig(decoder="opencv", limits=ScanLimits(timeout_s=5)).scan_id
    flow = ScanConfig(motion=MotionConfig(samples=SampleSpec(fps=4.0)))
    assert flow.scan_id != plain.scan_id
    changed = {name for name, value in flow.scorer_ids.items() if value != plain.scorer_ids[name]}
    assert changed == {"score_motion"}


def test_families_left_out(video: Path) -> None:
    whole = scan_medium(video, MEDIA_ID, "video", ScanConfig())
    part = scan_medium(video, MEDIA_ID, "video", ScanConfig(families=("technical",)))
    assert part.clips == whole.clips
    assert part.scores == {table: whole.scores[table] for table in ("score_resolution", "score_technical")}
    assert part.scan["scan_id"] != whole.scan["scan_id"]


def test_faults(tmp_path: Path, video: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(RowError) as caught:
        scan_medium(tmp_path / "text.mp4", MEDIA_ID, "video", ScanConfig())
    assert caught.value.reason == "DecodeFailed"
    with pytest.raises(RowError) as caught:
        scan_medium(video, MEDIA_ID, "video", ScanConfig(limits=ScanLimits(max_pixels=100)))
    assert caught.value.reason == "TooManyPixels"
    with pytest.raises(ConfigError, match="nosuch"):
        scan_medium(video, MEDIA_ID, "video", ScanConfig(decoder="nosuch"))
    with pytest.raises(ConfigError, match="no_model"):
        scan_medium(video, MEDIA_ID, "video", ScanConfig(text=TextConfig(detector="no_model")))


def test_a_result_travels(video: Path) -> None:
    with Sandbox(timeout_s=120, memory_mb=4096) as sandbox:
        there = sandbox.run(scan_medium, video, MEDIA_ID, "video", ScanConfig())
    here = scan_medium(video, MEDIA_ID, "video", ScanConfig())
    assert (there.clips, there.scores) == (here.clips, here.scores)
    assert pickle.loads(pickle.dumps(there)) == there


def test_memory_does_not_grow_with_length() -> None:
    """Samples are numbers, and no frame lives longer than its successor: not even where every frame may begin a clip."""
    config = ScanConfig()
    scorers = ClipScorers(config.motion, config.text, config.technical, (64, 48), least_cut_s=0.56)
    image = np.full((48, 64, 3), 120, np.uint8)
    alive: weakref.WeakSet[Frame] = weakref.WeakSet()
    for index in range(3000):
        frame = Watched(index, index * 200, MILLISECOND, lambda: image)
        alive.add(frame)
        scorers.see(index, frame, FrameNumbers(30.0, 120.0, candidate=index % 3 == 0))
        assert len(alive) <= 2
    assert len(pickle.dumps(scorers.finish())) < 1_000_000


def shared_files() -> list[str]:
    from tests.pipeline.made_media import SHARED_MEDIA

    folders = ("video", "derived", "image")
    return [
        f"{folder}/{path.name}"
        for folder in folders
        if (SHARED_MEDIA / folder).is_dir()
        for path in sorted((SHARED_MEDIA / folder).iterdir())
        if path.suffix != ".json"
    ]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(timeout_s=600, memory_mb=4096) as sandbox:
        yield sandbox


@pytest.mark.slow
@pytest.mark.parametrize("file", shared_files())
def test_real_media(file: str, sandbox: Sandbox) -> None:
    expected = json.loads((shared_media() / "expected.json").read_text())
    kind = "image" if file.startswith("image") else "video"
    must_fail = {*expected["must_fail"], "image/giant_20000x14000.jpg"}  # more pixels than allowed
    if file in must_fail:
        with pytest.raises(RowError) as caught:
            sandbox.run(scan_medium, shared_media() / file, MEDIA_ID, kind, ScanConfig())
        assert caught.value.reason in ("DecodeFailed", "TooManyPixels")
        return
    assert_rows(sandbox.run(scan_medium, shared_media() / file, MEDIA_ID, kind, ScanConfig()))
