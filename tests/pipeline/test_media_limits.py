"""What asks for too much is refused by its header where that is true, and by what comes out where it is not."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.media_limits import MediaLimits
from pipeline.probe_media import probe
from pipeline.read_image import read_image
from pipeline.sandbox import Sandbox
from pipeline.scan_medium import ScanConfig, ScanLimits, scan_medium
from schemas.errors import RowError
from tests.flows.hostile_media import icon, png_bomb
from tests.pipeline.made_media import shot, write_video

LIMITS = MediaLimits()


def reason(path: Path, limits: MediaLimits = LIMITS) -> str:
    with pytest.raises(RowError) as caught:
        probe(path, limits)
    return caught.value.reason


def scan_reason(path: Path, limits: ScanLimits) -> str:
    with pytest.raises(RowError) as caught:
        scan_medium(path, "0" * 16, "video", ScanConfig(limits=limits))
    return caught.value.reason


def gif(path: Path, num_frames: int) -> Path:
    frames = [Image.new("L", (8, 8), shade % 256) for shade in range(num_frames)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=40, optimize=False)
    return path


def test_a_picture_that_unpacks_to_too_much_is_refused_before_it_does(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png_bomb(16_000, 16_000))
    with Sandbox(timeout_s=300, memory_mb=1000) as sandbox, pytest.raises(RowError) as caught:
        sandbox.run(probe, tmp_path / "bomb.png", LIMITS)
    assert caught.value.reason == "TooManyPixels"


def test_a_picture_inside_a_picture_has_the_same_limit(tmp_path: Path) -> None:
    (tmp_path / "bomb.ico").write_bytes(icon(png_bomb(2_000, 2_000)))
    assert reason(tmp_path / "bomb.ico", MediaLimits(max_pixels=3_999_999)) == "TooManyPixels"
    assert probe(tmp_path / "bomb.ico", MediaLimits(max_pixels=4_000_000)).width_px == 2_000


@pytest.mark.parametrize("name", ["many.tif", "many.webp", "many.png", "many.mpo"])
def test_a_file_of_too_many_pictures(tmp_path: Path, name: str) -> None:
    pictures = [Image.new("RGB", (16, 16), (shade, 0, 0)) for shade in (0, 90, 180, 250)]
    pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:])
    assert read_image(tmp_path / name, max_pictures=4).bgr.shape == (16, 16, 3)
    assert reason(tmp_path / name, MediaLimits(max_pictures=3)) == "TooManyFrames"


def test_a_gif_of_too_many_frames(tmp_path: Path) -> None:
    path = gif(tmp_path / "many.gif", 12)
    assert probe(path, MediaLimits(max_pictures=12)).kind == "video"
    assert reason(path, MediaLimits(max_pictures=11)) == "TooManyFrames"
    assert scan_reason(path, ScanLimits(max_pictures=11)) == "TooManyFrames"


def test_the_limit_of_pictures_is_none_of_videos(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", shot(1, 12))
    assert probe(path, MediaLimits(max_pictures=2)).kind == "video"
    result = scan_medium(path, "0" * 16, "video", ScanConfig(limits=ScanLimits(max_pictures=2)))
    assert result.scan["num_frames"] == 12


def test_a_header_that_tells_the_truth_is_enough(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", shot(1, 20), fps=10)
    assert reason(path, MediaLimits(max_frames=19)) == "TooManyFrames"
    assert reason(path, MediaLimits(max_duration_s=1.9)) == "TooLong"
    assert probe(path, MediaLimits(max_frames=20, max_duration_s=2.0)).duration_ms == 2000


def test_a_stream_that_outlasts_its_header_is_stopped(tmp_path: Path) -> None:
    """A raw stream states no length at all, and 12 frames of it are a minute when they are shown for 5 s each."""
    path = write_video(tmp_path / "a.h264", shot(1, 40))
    assert probe(path, MediaLimits(max_frames=10, max_duration_s=1.0)).duration_ms is None
    assert scan_reason(path, ScanLimits(max_frames=39)) == "TooManyFrames"
    slow = write_video(tmp_path / "slow.mkv", shot(1, 12), times_ms=[5000 * index for index in range(12)])
    assert scan_reason(slow, ScanLimits(max_duration_s=50.0)) == "TooLong"


def test_no_frame_beyond_the_limit_is_asked_for(tmp_path: Path) -> None:
    from pipeline.decode import open_video

    with open_video(write_video(tmp_path / "a.mp4", shot(1, 20))) as reader:
        asked = 0

        def frames() -> Iterator[object]:
            nonlocal asked
            for frame in reader:
                asked += 1
                yield frame

        with pytest.raises(RowError, match="max_frames=7"):
            for _ in MediaLimits(max_frames=7).bounded(frames(), tmp_path / "a.mp4"):  # type: ignore[arg-type]
                pass
    assert asked == 8


def test_limits_are_no_part_of_what_a_scan_is_but_of_what_failed() -> None:
    from jobs.scan import scan_stage

    wide, narrow = ScanConfig(), ScanConfig(limits=ScanLimits(max_frames=5))
    assert wide.scan_id == narrow.scan_id
    assert scan_stage(wide).stage_id != scan_stage(narrow).stage_id


def test_a_postscript_picture_is_a_program_and_not_run(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.eps")
    assert reason(tmp_path / "a.eps") == "Unreadable"
