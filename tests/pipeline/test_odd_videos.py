"""Videos that change midway, or whose headers mislead: spans are presentation times, and read back they are the same frames."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from pipeline.decode import BUILT_IN, open_video
from pipeline.read_frames import read_frames
from pipeline.scan_medium import ScanConfig, ScanLimits, scan_medium
from tests.pipeline.made_media import MILLISECOND, Image, shot, write_video

SHOT_FRAMES = 30
CONFIG = ScanConfig(families=("motion", "technical"), limits=ScanLimits(segment_workers=1))


def spans(path: Path) -> list[tuple[int, int]]:
    return [(clip["start_ms"], clip["end_ms"]) for clip in scan_medium(path, "0123456789abcdef", "video", CONFIG).clips]


def assert_reads_back(path: Path) -> None:
    """First and last frame of each span are those whose times lie in it, of one pass."""
    with open_video(path) as reader:
        whole = [(frame.seconds, frame.bgr()) for frame in reader]
    for start_ms, end_ms in spans(path):
        shown = [image for seconds, image in whole if start_ms <= round(seconds * 1000) < end_ms]
        frames = read_frames(path, start_ms, end_ms)
        assert len(frames) == len(shown)
        ends = read_frames(path, start_ms, end_ms, num_frames=2)
        for found in (frames, ends):
            assert np.array_equal(found[0], shown[0][..., ::-1])
            if shown[-1].shape == shown[0].shape:
                assert np.array_equal(found[-1], shown[-1][..., ::-1])


def joined(path: Path, folder: Path, parts: list[tuple[list[Image], str]]) -> Path:
    """Streams of different sizes or formats, one behind the other, at 25 frames a second; packets say no duration."""
    (folder / "whole.h264").write_bytes(
        b"".join(
            write_video(folder / f"{place}.h264", frames, pix_fmt=pix_fmt, options={"bf": "0"}).read_bytes()
            for place, (frames, pix_fmt) in enumerate(parts)
        )
    )
    with av.open(str(folder / "whole.h264")) as source, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for index, packet in enumerate(packet for packet in source.demux(video=0) if packet.size):
            packet.stream, packet.time_base = stream, MILLISECOND
            packet.pts = packet.dts = 40 * index
            packet.duration = 0
            container.mux(packet)
    return path


@pytest.mark.parametrize("suffix", [".mkv", ".ts"])
@pytest.mark.parametrize("decoder", BUILT_IN)
def test_the_size_changes_midway(tmp_path: Path, suffix: str, decoder: str) -> None:
    large, small = shot(1, SHOT_FRAMES), shot(2, SHOT_FRAMES, width=200, height=160)
    path = joined(tmp_path / f"a{suffix}", tmp_path, [(large, "yuv420p"), (small, "yuv420p")])
    frames = read_frames(path, 0, 80 * SHOT_FRAMES, decoder=decoder)
    assert frames.shape == (2 * SHOT_FRAMES, 180, 320, 3)
    assert np.abs(frames[-1][90, 100:220].astype(int).mean() - small[-1][80, 60:140].mean()) < 8
    late = read_frames(path, 60 * SHOT_FRAMES, 80 * SHOT_FRAMES, num_frames=2, decoder="pyav")
    assert late.shape == (2, 160, 200, 3)


@pytest.mark.parametrize("suffix", [".mkv", ".ts"])
def test_the_format_of_pixels_changes_midway(tmp_path: Path, suffix: str) -> None:
    parts = [(shot(1, SHOT_FRAMES), "yuv420p"), (shot(2, SHOT_FRAMES), "yuv444p")]
    path = joined(tmp_path / f"a{suffix}", tmp_path, parts)
    assert spans(path) == [(0, 40 * SHOT_FRAMES), (40 * SHOT_FRAMES, 80 * SHOT_FRAMES)]
    assert_reads_back(path)


@pytest.mark.parametrize("field_order", ["tff", "bff"])
def test_interlaced(tmp_path: Path, field_order: str) -> None:
    fields = shot(1, 2 * SHOT_FRAMES, step_px=3) + shot(2, 2 * SHOT_FRAMES, step_px=3)
    woven = [first.copy() for first in fields[::2]]
    for frame, second in zip(woven, fields[1::2], strict=True):
        frame[1::2] = second[1::2]
    path = write_video(tmp_path / "a.mkv", woven, options={"x264-params": f"{field_order}=1"})
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).interlaced_frame
    assert spans(path) == [(0, 40 * SHOT_FRAMES), (40 * SHOT_FRAMES, 80 * SHOT_FRAMES)]
    assert_reads_back(path)


def retimed(path: Path, change: Callable[[bytearray], None]) -> Path:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    return path


def wrong_rate(data: bytearray) -> None:
    """Matroska's default duration of a frame, in nanoseconds: 40 ms -> 10 ms."""
    stated, wrong = ((b"\x23\xe3\x83\x84" + ns.to_bytes(4, "big")) for ns in (40_000_000, 10_000_000))
    assert stated in data
    data[:] = data.replace(stated, wrong)


def test_a_header_that_states_another_rate(tmp_path: Path) -> None:
    path = retimed(write_video(tmp_path / "a.mkv", [*shot(1, SHOT_FRAMES), *shot(2, SHOT_FRAMES)]), wrong_rate)
    with open_video(path) as reader:
        assert reader.fps == 100
    (first, cut), (again, end) = spans(path)
    assert (first, cut, again) == (0, 40 * SHOT_FRAMES, 40 * SHOT_FRAMES)
    assert 40 * (2 * SHOT_FRAMES - 1) < end <= 80 * SHOT_FRAMES
    assert_reads_back(path)


def test_a_late_start_at_a_variable_rate(tmp_path: Path) -> None:
    steps = np.random.default_rng(3).choice([20, 40, 120], 2 * SHOT_FRAMES - 1)
    times = [2500, *(2500 + np.cumsum(steps)).tolist()]
    path = write_video(tmp_path / "a.mkv", [*shot(1, SHOT_FRAMES), *shot(2, SHOT_FRAMES)], times_ms=times)
    assert [start for start, _ in spans(path)] == [0, times[SHOT_FRAMES] - 2500]
    assert_reads_back(path)


def test_durations_that_contradict_the_times(tmp_path: Path) -> None:
    """The last frame of such a stream would be shown for a minute."""
    frames = shot(1, SHOT_FRAMES)
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"bf": "0", "preset": "ultrafast"})
        stream.height, stream.width = frames[0].shape[:2]
        packets = [p for image in frames for p in stream.encode(av.VideoFrame.from_ndarray(image, format="bgr24"))]
        for packet in [*packets, *stream.encode()]:
            packet.duration = 1500 * (packet.duration or 1)
            container.mux(packet)
    assert spans(tmp_path / "a.mkv") == [(0, 40 * SHOT_FRAMES)]
    for decoder in BUILT_IN:
        with open_video(tmp_path / "a.mkv", decoder) as reader:
            assert [frame.seconds for frame in reader] == pytest.approx([index / 25 for index in range(SHOT_FRAMES)])


@pytest.mark.parametrize("decoder", ["opencv", "decord"])
def test_the_row_says_which_decoder_served(tmp_path: Path, decoder: str) -> None:
    frames = shot(1, SHOT_FRAMES)
    config = CONFIG.model_copy(update={"decoder": decoder})
    for name, codec, options, served in (
        ("a.mp4", "libx264", {}, decoder),
        ("b.mp4", "libsvtav1", {"preset": "12"}, "pyav"),
    ):
        path = write_video(tmp_path / name, frames, codec=codec, options=options)
        assert scan_medium(path, "0123456789abcdef", "video", config).scan["decoder"] == served


@pytest.mark.parametrize("suffix", [".h264", ".ts", ".mkv", ".flv"])
def test_no_count_of_frames(tmp_path: Path, suffix: str) -> None:
    path = write_video(tmp_path / f"a{suffix}", [*shot(1, SHOT_FRAMES), *shot(2, SHOT_FRAMES)], options={"bf": "2"})
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 0
    assert [round(start / 40) for start, _ in spans(path)] == [0, SHOT_FRAMES]
    assert_reads_back(path)


@pytest.mark.parametrize("degrees", [90, 180, 270])
@pytest.mark.parametrize("decoder", ["pyav", "opencv"])
def test_rotation_of_the_container(tmp_path: Path, degrees: int, decoder: str) -> None:
    plain = write_video(tmp_path / "plain.mp4", [*shot(1, SHOT_FRAMES), *shot(2, SHOT_FRAMES)])
    unity = b"".join(value.to_bytes(4, "big", signed=True) for value in (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30))
    cos, sin = round(np.cos(np.radians(degrees))), round(np.sin(np.radians(degrees)))
    parts = (cos << 16, sin << 16, 0, -sin << 16, cos << 16, 0, 0, 0, 1 << 30)
    turned = b"".join(value.to_bytes(4, "big", signed=True) for value in parts)
    data = plain.read_bytes()
    track = data.index(b"tkhd")
    assert unity in data[track:]
    path = tmp_path / "turned.mp4"
    path.write_bytes(data[:track] + data[track:].replace(unity, turned, 1))
    if decoder == "pyav":
        assert spans(path) == spans(plain)
        assert_reads_back(path)
    upright = read_frames(plain, 0, 400, num_frames=2)
    # The matrix turns clockwise.
    expected = np.rot90(upright, -degrees // 90, axes=(1, 2))
    found = read_frames(path, 0, 400, num_frames=2, decoder=decoder)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).mean() < 3


def test_the_nominal_rate_of_ntsc_does_not_drift(tmp_path: Path) -> None:
    frames = [*shot(1, 100, width=96, height=64), *shot(2, 100, width=96, height=64)]
    path = write_video(tmp_path / "a.mp4", frames, fps=Fraction(30000, 1001))
    assert spans(path) == [(0, round(100 * 1001 / 30)), (round(100 * 1001 / 30), round(200 * 1001 / 30))]
    assert_reads_back(path)
