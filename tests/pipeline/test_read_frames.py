"""Frames read back by seeking are the frames the scan saw."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image as Pillow

from pipeline import decode_pyav
from pipeline.decode import BUILT_IN, open_video
from pipeline.decode_pyav import PyavReader
from pipeline.detect_scenes import SceneCutter, SegmentationConfig, Span
from pipeline.frame_meter import FrameMeter
from pipeline.read_frames import read_frames
from schemas.errors import RowError
from tests.pipeline.made_media import Image, shared_media, shot, write_video


def scanned(path: Path) -> tuple[list[Image], list[float], list[Span]]:
    with open_video(path) as reader:
        cutter, meter = SceneCutter(SegmentationConfig(), reader.fps), FrameMeter(SegmentationConfig())
        images, times = [], []
        for frame in reader:
            images.append(frame.bgr())
            times.append(frame.seconds)
            cutter.see(meter.measure(frame), frame.pts, frame.time_base)
        return images, times, cutter.spans(reader.end_s)


def rgb(bgr: Image) -> Image:
    return np.ascontiguousarray(bgr[..., ::-1])


def assert_reads_back(path: Path, decoder: str = "pyav") -> None:
    images, _, spans = scanned(path)
    for span in spans:
        frames = read_frames(path, span.start_ms, span.end_ms, decoder=decoder)
        assert len(frames) == span.end_frame - span.start_frame
        assert np.array_equal(frames[0], rgb(images[span.start_frame]))
        assert np.array_equal(frames[-1], rgb(images[span.end_frame - 1]))
        ends = read_frames(path, span.start_ms, span.end_ms, num_frames=2, decoder=decoder)
        assert np.array_equal(ends[0], frames[0])
        assert np.array_equal(ends[1], frames[-1])


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    frames = [*shot(1, 35), *shot(2, 47), *shot(3, 61)]
    return write_video(tmp_path_factory.mktemp("read") / "a.mp4", frames, fps=30, options={"g": "20", "bf": "2"})


@pytest.mark.parametrize("decoder", BUILT_IN)
def test_every_clip_reads_back(video: Path, decoder: str) -> None:
    assert_reads_back(video, decoder)


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_variable_rate(tmp_path: Path, decoder: str) -> None:
    steps = np.random.default_rng(1).choice([20, 33, 50, 180], 90)
    path = write_video(
        tmp_path / "a.mkv", [*shot(1, 40), *shot(2, 50)], times_ms=[700, *(700 + np.cumsum(steps)[:-1]).tolist()]
    )
    assert_reads_back(path, decoder)


def test_frames_at_a_rate(video: Path) -> None:
    images, _, spans = scanned(video)
    span = spans[1]
    frames = read_frames(video, span.start_ms, span.end_ms, fps=10)
    expected = [span.start_frame + 3 * index for index in range(16)]
    assert len(frames) == 16
    for frame, index in zip(frames, expected, strict=True):
        assert np.array_equal(frame, rgb(images[index]))


def test_a_number_of_frames_spans_the_clip(video: Path) -> None:
    images, _, spans = scanned(video)
    span = spans[2]
    frames = read_frames(video, span.start_ms, span.end_ms, num_frames=5)
    found = [next(i for i, image in enumerate(images) if np.array_equal(frame, rgb(image))) for frame in frames]
    assert found[0] == span.start_frame
    assert found[-1] == span.end_frame - 1
    assert np.ptp(np.diff(found)) <= 1
    middle = read_frames(video, span.start_ms, span.end_ms, num_frames=1)
    assert np.array_equal(middle[0], rgb(images[(span.start_frame + span.end_frame) // 2]))


def test_more_frames_than_there_are(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", shot(1, 3), fps=2)
    assert read_frames(path, 0, 1500, num_frames=12).shape == (12, 180, 320, 3)
    assert len(read_frames(path, 0, 1500, fps=8)) == 12


def test_part_of_a_clip_from_between_two_frames(video: Path) -> None:
    images, times, _ = scanned(video)
    start_ms = round((times[50] + times[51]) / 2 * 1000)
    frames = read_frames(video, start_ms, start_ms + 300, fps=30)
    assert np.array_equal(frames[0], rgb(images[50]))
    assert len(frames) == 9


def test_sizes(video: Path) -> None:
    assert read_frames(video, 0, 500, num_frames=2, size=(90, 160)).shape == (2, 90, 160, 3)
    assert read_frames(video, 0, 500, num_frames=2, size=lambda h, w: (h // 4, w // 4)).shape == (2, 45, 80, 3)
    frames = read_frames(video, 0, 500, num_frames=1, size=(360, 640))
    assert frames.dtype == np.uint8
    assert np.abs(frames[0][::2, ::2].astype(int) - read_frames(video, 0, 500, num_frames=1)[0]).mean() < 3


def test_an_image(tmp_path: Path) -> None:
    picture = shot(1, 1)[0]
    Pillow.fromarray(picture).save(tmp_path / "a.png")
    assert np.array_equal(read_frames(tmp_path / "a.png", 0, 0, num_frames=8), picture[np.newaxis])


def test_wrong_spans(video: Path) -> None:
    with pytest.raises(RowError, match="no frame between 90000 and 91000"):
        read_frames(video, 90_000, 91_000)
    with pytest.raises(RowError, match="no frame between"):
        read_frames(video, 90_000, 91_000, num_frames=4)
    with pytest.raises(ValueError, match="not both"):
        read_frames(video, 0, 100, fps=2, num_frames=3)


@pytest.mark.parametrize(
    "file",
    [
        "video/bbb_2500ms.ts",
        "video/man_sample.flv",
        "video/gif_classroom.gif",
        "video/ios9.mov",
        "video/pyscenedetect_delayed_start.mp4",
        "video/asl_milk.mkv",
        "video/mdn_monster.webm",
        "derived/car_vfr.mp4",
        "derived/monster_av1.mp4",
    ],
)
def test_real_videos(file: str) -> None:
    assert_reads_back(shared_media() / file)


def test_the_end_of_a_long_video_is_read_without_its_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", shot(1, 500), options={"g": "25"})
    decoded, converted = [], []
    frames_of, picture_of = PyavReader._decoded, decode_pyav.shown

    def counted_frames(self: PyavReader) -> Iterator[Any]:
        for raw in frames_of(self):
            decoded.append(raw.pts)
            yield raw

    def counted_picture(raw: Any) -> Image:
        converted.append(raw.pts)
        return picture_of(raw)

    monkeypatch.setattr(PyavReader, "_decoded", counted_frames)
    monkeypatch.setattr(decode_pyav, "shown", counted_picture)
    read_frames(path, 19_000, 19_400, num_frames=3)
    assert len(converted) == 3
    assert len(decoded) <= 60


def test_smaller_frames_are_area_means(video: Path) -> None:
    native = read_frames(video, 0, 100, num_frames=1)[0]
    small = read_frames(video, 0, 100, num_frames=1, size=(60, 80))[0]
    assert np.array_equal(small, cv2.resize(native, (80, 60), interpolation=cv2.INTER_AREA))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
@pytest.mark.parametrize(
    "options", [{"g": "25"}, {"g": "25", "bf": "3"}, {"g": "25", "bf": "3", "x264-params": "open-gop=1"}]
)
def test_far_apart_frames_are_those_of_one_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, options: dict[str, str]
) -> None:
    path = write_video(tmp_path / f"a{suffix}", shot(1, 300, width=96, height=64), options=options)
    decoded, frames_of = [], PyavReader._decoded

    def counted(self: PyavReader) -> Iterator[Any]:
        for raw in frames_of(self):
            decoded.append(raw.pts)
            yield raw

    monkeypatch.setattr(PyavReader, "_decoded", counted)
    for start_ms, end_ms, count in ((0, 12_000, 4), (1_200, 10_000, 3), (2_000, 2_500, 5), (0, 12_000, 24)):
        decoded.clear()
        with monkeypatch.context() as plain:
            plain.setattr(PyavReader, "leaps", lambda self, seconds: False)
            expected = read_frames(path, start_ms, end_ms, num_frames=count)
        num_plain = len(decoded)
        assert np.array_equal(read_frames(path, start_ms, end_ms, num_frames=count), expected)
        num_leaping = len(decoded) - num_plain
        assert num_leaping <= num_plain * 1.1
        if suffix == ".mp4" and end_ms - start_ms > count * 2000:
            assert num_leaping < num_plain / 2


def test_leaps_that_lead_back_to_the_start_are_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", shot(1, 300, width=96, height=64), options={"g": "25"})
    expected = read_frames(path, 0, 12_000, num_frames=6)
    starts = []

    def lost(self: PyavReader, seconds: float) -> None:
        starts.append(seconds)
        self._rewind()

    monkeypatch.setattr(PyavReader, "seek", lost)
    assert np.array_equal(read_frames(path, 0, 12_000, num_frames=6), expected)
    assert len(starts) == 2  # of the span, and of one leap
