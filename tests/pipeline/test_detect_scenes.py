"""The cuts are those of PySceneDetect's own manager, on made and on real videos, and the spans keep true times."""

import csv
import warnings
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenedetect import AdaptiveDetector, ContentDetector, SceneManager, ThresholdDetector
from scenedetect import open_video as open_stream
from scenedetect.common import FrameTimecode, Timecode
from scenedetect.detector import FlashFilter

from pipeline.decode import open_video
from pipeline.detect_scenes import AdaptiveConfig, FrameNumbers, SceneCutter, SegmentationConfig, Span
from pipeline.frame_meter import FrameMeter
from tests.pipeline.made_media import SHARED_MEDIA, faded, shared_media, shot, write_video

NEAR_THRESHOLD = 0.02  # a frame whose score is this close to the threshold may fall on either side
FAST_MEGAPIXELS = 15  # the rest is for the slow run
HDR = ("video/hevc10_bracelet.mp4", "video/hevc_hdr10_1080p.mp4", "video/av1_hdr_valley.mp4")  # tone mapping is slow


class Scored(SceneCutter):
    """A cutter that remembers the score of every frame, to judge differences by."""

    def __init__(self, config: SegmentationConfig, fps: Fraction) -> None:
        super().__init__(config, fps)
        self.scores: list[float] = []

    def see(self, numbers: FrameNumbers, pts: int, time_base: Fraction) -> None:
        super().see(numbers, pts, time_base)
        self.scores.append(numbers.score or 0.0)


def ours(path: Path, config: SegmentationConfig) -> tuple[Scored, list[Span]]:
    with open_video(path) as reader:
        cutter, meter = Scored(config, reader.fps), FrameMeter(config)
        for frame in reader:
            cutter.see(meter.measure(frame), frame.pts, frame.time_base)
        return cutter, cutter.spans(reader.end_s)


def theirs(path: Path, config: SegmentationConfig) -> tuple[list[int], list[float]]:
    """Frame numbers and start times of the scenes after the first, by PySceneDetect's documented API."""
    capture = cv2.VideoCapture(str(path))
    backend = "opencv" if capture.read()[0] else "pyav"  # OpenCV's wheel has no AV1 on CPU
    capture.release()
    manager = SceneManager()
    if (adaptive := config.adaptive) is None:
        manager.add_detector(ContentDetector(config.content_threshold, config.min_scene_len_frames))
    else:
        least = config.min_scene_len_frames
        manager.add_detector(AdaptiveDetector(adaptive.ratio, least, adaptive.window_frames, adaptive.least_score))
    manager.add_detector(ThresholdDetector(config.fade_threshold, config.min_scene_len_frames))
    manager.detect_scenes(open_stream(str(path), backend=backend))
    starts = [start for start, _ in manager.get_scene_list(start_in_scene=True)][1:]
    return [start.frame_num for start in starts], [start.seconds for start in starts]


def assert_equal(path: Path, config: SegmentationConfig | None = None) -> list[Span]:
    config = config or SegmentationConfig()
    cutter, spans = ours(path, config)
    numbers, seconds = theirs(path, config)
    found = [cut.frame_num for cut in cutter.timecodes()]
    for number in sorted(set(found) ^ set(numbers)):
        score = cutter.scores[min(number, len(cutter.scores) - 1)]
        warnings.warn(f"{path.name}: cut at {number} differs, score {score:.3f}", stacklevel=2)
        assert abs(score - config.content_threshold) <= NEAR_THRESHOLD * config.content_threshold, (found, numbers)
    if found == numbers:
        frame_s = float(1 / cutter._fps)
        times = [span.start_ms / 1000 for span in spans[1:]]
        assert times == pytest.approx(seconds, abs=frame_s / 2 + 1e-3)
    assert_whole(spans, cutter.num_frames)
    return spans


def assert_whole(spans: list[Span], num_frames: int) -> None:
    """No gap, no overlap, nothing empty."""
    assert spans[0].start_frame == 0
    assert spans[0].start_ms == 0
    assert spans[-1].end_frame == num_frames
    for before, after in pairwise(spans):
        assert before.end_frame == after.start_frame
        assert before.end_ms == after.start_ms
    assert all(span.start_frame < span.end_frame for span in spans)
    assert all(span.start_ms <= span.end_ms for span in spans)


def cuts(spans: list[Span]) -> list[int]:
    return [span.start_frame for span in spans[1:]]


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([1, 1, 2, 3, 90]),
            st.sampled_from([True, False, False]),
            st.sampled_from([True, *[False] * 9]),  # what turns dark or light is shown in any case
        ),
        min_size=1,
        max_size=150,
    ),
    st.integers(0, 20),
)
def test_detectors_need_not_see_every_frame(frames: list[tuple[int, bool, bool]], least: int) -> None:
    config, fps, base, pts = SegmentationConfig(min_scene_len_frames=least), Fraction(25), Fraction(1, 50), 0
    cutter, cuts = SceneCutter(config, fps), []
    content = FlashFilter(FlashFilter.Mode.MERGE, least)
    fade = ThresholdDetector(config.fade_threshold, min_scene_len=least)
    for step, candidate, dark in frames:
        mean = 0.0 if dark else 100.0
        cutter.see(FrameNumbers(50.0 * candidate, mean, candidate, dark), pts, base)
        position = FrameTimecode(Timecode(pts, base), fps=fps)
        cuts += [*content.filter(position, candidate), *fade.process_frame(position, np.array([mean]))]
        pts += step
    assert cutter.timecodes() == sorted(set(cuts))


def test_hard_cuts(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", [*shot(1, 40), *shot(2, 30), *shot(3, 50)])
    spans = assert_equal(path)
    assert cuts(spans) == [40, 70]
    assert [span.start_ms for span in spans] == [0, 1600, 2800]
    assert spans[-1].end_ms == 4800


def test_a_fade_is_cut_in_its_middle(tmp_path: Path) -> None:
    black = [np.zeros((180, 320, 3), np.uint8)] * 10
    frames = [*faded(shot(1, 80), fade_out=40), *black, *faded(shot(2, 80), fade_in=40)]
    spans = assert_equal(write_video(tmp_path / "a.mp4", frames))
    assert any(79 <= cut <= 91 for cut in cuts(spans))


def test_a_pan_is_no_cut(tmp_path: Path) -> None:
    assert cuts(assert_equal(write_video(tmp_path / "a.mp4", shot(5, 80, step_px=6)))) == []


def test_cuts_in_quick_succession_are_merged_as_theirs_are(tmp_path: Path) -> None:
    frames = [frame for seed in range(8) for frame in shot(seed, 7)] + shot(9, 40)
    path = write_video(tmp_path / "a.mp4", [*shot(20, 30), *frames])
    assert len(assert_equal(path)) >= 2


def test_flashes(tmp_path: Path) -> None:
    frames = shot(1, 90)
    for index in (30, 31, 60):
        frames[index] = np.full_like(frames[index], 255)
    assert_equal(write_video(tmp_path / "a.mp4", frames))


@pytest.mark.parametrize("size", [(1280, 720), (200, 120), (180, 400), (257, 145), (640, 64)])
def test_every_size_is_reduced_as_they_reduce_it(tmp_path: Path, size: tuple[int, int]) -> None:
    frames = [*shot(1, 25, width=size[0], height=size[1]), *shot(2, 25, width=size[0], height=size[1])]
    path = write_video(tmp_path / "a.mp4", frames, pix_fmt="yuv444p")
    assert cuts(assert_equal(path)) == [25]


@pytest.mark.parametrize("fps", [Fraction(24000, 1001), 10, 60])
def test_frame_rates(tmp_path: Path, fps: Fraction | int) -> None:
    path = write_video(tmp_path / "a.mp4", [*shot(1, 30), *shot(2, 30)], fps=fps)
    spans = assert_equal(path)
    assert cuts(spans) == [30]
    assert spans[1].start_ms == round(30_000 / fps)


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_variable_rate_keeps_true_frames_and_times(tmp_path: Path, suffix: str) -> None:
    steps = np.random.default_rng(3).choice([20, 40, 60, 120], 120)
    times = [0, *np.cumsum(steps)[:-1].tolist()]
    path = write_video(tmp_path / f"a{suffix}", [*shot(1, 50), *shot(2, 70)], times_ms=times)
    spans = assert_equal(path)
    assert cuts(spans) == [50]
    assert spans[1].start_ms == times[50]


@pytest.mark.parametrize(
    "config",
    [
        SegmentationConfig(content_threshold=8.0),
        SegmentationConfig(fade_threshold=60, min_scene_len_frames=4),
        SegmentationConfig(min_scene_len_frames=0),
        SegmentationConfig(adaptive=AdaptiveConfig()),
        SegmentationConfig(
            adaptive=AdaptiveConfig(ratio=1.5, window_frames=4, least_score=4.0), min_scene_len_frames=5
        ),
    ],
    ids=lambda config: config.canonical_json(),
)
def test_other_settings(tmp_path: Path, config: SegmentationConfig) -> None:
    frames = [*faded(shot(1, 40), fade_out=10), *faded(shot(2, 40), fade_in=10), *shot(3, 6), *shot(4, 30)]
    assert_equal(write_video(tmp_path / "a.mp4", frames), config)


def test_the_adaptive_detector_does_not_cut_where_a_camera_sweeps(tmp_path: Path) -> None:
    sweep = shot(1, 20, step_px=60)
    frames = [*[sweep[0]] * 40, *sweep, *[sweep[-1]] * 40, *shot(2, 30)]
    path = write_video(tmp_path / "a.mp4", frames, options={"crf": "18"})
    by_content = cuts(assert_equal(path, SegmentationConfig(content_threshold=5.0)))
    assert len(by_content) > 1
    assert cuts(assert_equal(path, SegmentationConfig(adaptive=AdaptiveConfig(least_score=5.0)))) == [100]


def test_long_scenes_are_divided_evenly(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", [*shot(1, 125), *shot(2, 50), *shot(3, 100)])
    _, whole = ours(path, SegmentationConfig())
    _, parts = ours(path, SegmentationConfig(max_scene_s=2.0))
    assert cuts(whole) == [125, 175]
    assert cuts(parts) == [42, 84, 125, 175, 225]  # of 5 s, 2 s and 4 s
    assert_whole(parts, 275)


def test_the_id_names_the_settings() -> None:
    assert SegmentationConfig().segmentation_id == SegmentationConfig().segmentation_id
    assert SegmentationConfig().segmentation_id != SegmentationConfig(content_threshold=28.0).segmentation_id
    assert SegmentationConfig().segmentation_id != SegmentationConfig(max_scene_s=5.0).segmentation_id
    assert SegmentationConfig().segmentation_id != SegmentationConfig(adaptive=AdaptiveConfig()).segmentation_id


def shared_videos() -> list[Any]:
    manifest = SHARED_MEDIA / "MANIFEST.csv"
    if not manifest.is_file():
        return []
    cases = []
    for row in csv.DictReader(manifest.read_text().splitlines()):
        if row["kind"] == "video" and row["probe"] == "ok":
            megapixels = int(row["frames"]) * int(row["width"]) * int(row["height"]) / 1e6
            is_slow = megapixels > FAST_MEGAPIXELS or row["file"] in HDR
            marks = [pytest.mark.slow] if is_slow else []
            cases.append(pytest.param(row["file"], marks=marks, id=row["file"]))
    return cases


@pytest.mark.parametrize("file", shared_videos())
def test_real_videos(file: str) -> None:
    assert_equal(shared_media() / file)


@pytest.mark.slow
def test_real_videos_by_the_adaptive_detector() -> None:
    config = SegmentationConfig(adaptive=AdaptiveConfig())
    fast = [case.values[0] for case in shared_videos() if not case.marks][::4]
    for file in fast:
        assert_equal(shared_media() / file, config)
    if not fast:
        pytest.skip("no shared media beside the checkout")
