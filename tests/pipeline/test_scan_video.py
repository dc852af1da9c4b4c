"""A long video in segments gives every number of one pass, and one that cannot be entered in its middle is not cut up."""

from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.decode_pyav import PacketTimes, packet_times
from pipeline.samples import SampleSpec
from pipeline.sandbox import SandboxPool
from pipeline.scan_medium import ScanConfig, ScanLimits, scan_medium
from pipeline.scan_video import joined_parts, plan_segments
from pipeline.score_technical import TechnicalConfig
from pipeline.score_text import TextConfig
from pipeline.video_part import Part, Segment, scan_part
from schemas.errors import RowError
from tests.pipeline.made_media import Image, faded, shot, write_video

CONFIG = ScanConfig(
    text=TextConfig(samples=SampleSpec(fps=0.3, short_edge_px=32)),
    technical=TechnicalConfig(samples=SampleSpec(fps=1.0)),
    limits=ScanLimits(segment_workers=2),
)
FPS = 4
MEDIA_ID = "0123456789abcdef"
SECONDS = 390


def greys(path: Path) -> Iterator[tuple[float, Image]]:
    """A user's decoder, which has no random access."""
    for index in range(20):
        yield index / 25, np.full((48, 64, 3), 100, np.uint8)


@cache
def film() -> tuple[Image, ...]:
    """Shots of all lengths, still and moving, with fades and a flicker, among them some at the edges of segments."""
    frames: list[Image] = []
    rng = np.random.default_rng(0)
    while len(frames) < SECONDS * FPS:
        length = int(rng.choice([3, 17, 29, 60, 90]))
        pictures = shot(len(frames), length, step_px=int(rng.choice([0, 1, 4])), width=96, height=64)
        frames += faded(pictures, fade_in=length // 3, fade_out=length // 3) if rng.random() < 0.3 else pictures
    for edge in (120 * FPS, 180 * FPS, 240 * FPS):
        frames[edge - 2 : edge + 2] = [shot(edge + index, 1, width=96, height=64)[0] for index in range(4)]
    return tuple(frames[: SECONDS * FPS])


def in_segments(path: Path, num_most: int = 3) -> Part | None:
    times = packet_times(path, 0.0)
    assert times is not None
    segments = plan_segments(times, CONFIG, num_most)
    assert len(segments) == num_most
    return joined_parts((scan_part(path, CONFIG, segment) for segment in segments), times.pts)


def assert_as_one_pass(whole: Part | None, once: Part) -> None:
    assert whole is not None
    assert (whole.pts, whole.numbers, whole.end_s) == (once.pts, once.numbers, once.end_s)
    spans = once.spans(CONFIG.segmentation)
    assert len(spans) > 10
    assert whole.spans(CONFIG.segmentation) == spans
    for span in spans:
        edges = span.start_frame, span.end_frame
        assert whole.measurements.scores(*edges, CONFIG.text) == once.measurements.scores(*edges, CONFIG.text)


B_FRAMES = {"bf": "3", "b-pyramid": "normal", "g": "40", "preset": "veryfast"}
WRITERS: dict[str, tuple[str, str, dict[str, str]]] = {
    "B-frames": (".mp4", "libx264", B_FRAMES),
    "open groups of pictures": (".mp4", "libx264", {**B_FRAMES, "x264-params": "open-gop=1:keyint=40:scenecut=0"}),
    "transport stream": (".ts", "libx264", B_FRAMES),
    "MPEG-4 in AVI": (".avi", "mpeg4", {"g": "40"}),
    "VP9": (".webm", "libvpx-vp9", {"g": "40", "deadline": "realtime", "cpu-used": "8"}),
}


@pytest.mark.parametrize(
    "name", [name if name == "transport stream" else pytest.param(name, marks=pytest.mark.slow) for name in WRITERS]
)
def test_segments_are_as_one_pass(tmp_path: Path, name: str) -> None:
    suffix, codec, options = WRITERS[name]
    path = write_video(tmp_path / f"a{suffix}", film(), fps=FPS, codec=codec, options=options)
    assert_as_one_pass(in_segments(path), scan_part(path, CONFIG))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("first_ms", [0, 1500])
def test_variable_rate_and_a_late_start(tmp_path: Path, first_ms: int) -> None:
    steps = np.random.default_rng(1).choice([40, 170, 250, 380, 2900], SECONDS * FPS, p=[0.2, 0.3, 0.3, 0.19, 0.01])
    times = (first_ms + np.concatenate([[0], np.cumsum(steps)[:-1]])).tolist()
    path = write_video(tmp_path / "a.mkv", film(), fps=FPS, times_ms=times, options=B_FRAMES)
    assert_as_one_pass(in_segments(path), scan_part(path, CONFIG))


def test_segments_cover_every_frame_once() -> None:
    pts = np.cumsum(np.random.default_rng(2).integers(1, 900, 2000)).tolist()
    pts = [stamp - pts[0] for stamp in pts]
    segments = plan_segments(PacketTimes(pts, pts[::40], Fraction(1, 1000), 0), CONFIG, 6)
    assert len(segments) == 6
    assert (segments[0].lead_in, segments[0].num_lead_in, segments[-1].end) == (0, 0, None)
    for before, after in pairwise(segments):
        assert pts.index(before.end) - pts.index(after.lead_in) == after.num_lead_in > 0
        assert before.end is not None
        assert before.end // 60_000 > pts[pts.index(before.end) - 1] // 60_000  # begins with a minute of the medium


def spoiled(part: Part) -> Part:
    """A part that was decoded wrong from its beginning, as after a seek into the middle of a group of pictures."""
    part.lead_in[-1] = part.numbers[0]
    return part


def shorter(part: Part) -> Part:
    part.pts.pop()
    part.numbers.pop()
    return part


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("change", [spoiled, shorter])
def test_parts_that_do_not_fit_are_not_joined(tmp_path: Path, change: Callable[[Part], Part]) -> None:
    path = write_video(tmp_path / "a.mp4", film(), fps=FPS, options=B_FRAMES)
    times = packet_times(path, 0.0)
    assert times is not None
    parts = [scan_part(path, CONFIG, segment) for segment in plan_segments(times, CONFIG, 3)]
    assert joined_parts([parts[0], change(parts[1]), parts[2]], times.pts) is None


def test_a_video_of_one_group_of_pictures_is_not_cut_up(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", [*shot(1, 1)] * 1200, fps=FPS, options={"g": "9999", "sc_threshold": "0"})
    times = packet_times(path, 0.0)
    assert times is not None
    assert plan_segments(times, CONFIG, 2) == []


def test_a_reader_that_starts_over_is_no_way_into_a_segment(tmp_path: Path) -> None:
    with pytest.raises(RowError) as caught:
        scan_part(tmp_path / "any", ScanConfig(decoder=f"{__name__}:greys"), Segment(200_000, 1, None))
    assert caught.value.reason == "NotSeekable"


def test_short_videos_and_odd_packets_are_not_cut_up(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", shot(1, 50))
    assert packet_times(path, 240.0) is None
    assert packet_times(path, 1.0) is not None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_processes_give_the_rows_of_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", film(), fps=FPS, options=B_FRAMES)
    alone = CONFIG.model_copy(update={"limits": ScanLimits(segment_workers=1)})
    expected = scan_medium(path, MEDIA_ID, "video", alone)
    calls = []
    run = SandboxPool.run

    def counted(self: SandboxPool, *args: Any) -> Any:
        calls.append(args)
        return run(self, *args)

    monkeypatch.setattr(SandboxPool, "run", counted)
    shared = scan_medium(path, MEDIA_ID, "video", CONFIG)
    assert (shared.clips, shared.scores) == (expected.clips, expected.scores)
    assert len(calls) == 3
