"""Samples come when they are due, belong to the clip they lie in, and every clip has at least one."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.clip_scorers import ClipScorers, Measured, Pick, Picker
from pipeline.decode import MICROSECOND, Frame, Image
from pipeline.detect_scenes import FrameNumbers, SceneCutter, SegmentationConfig, Span
from pipeline.frame_meter import FrameMeter
from pipeline.samples import SampleSpec, take_sample
from pipeline.score_motion import MotionConfig
from pipeline.score_technical import TechnicalConfig
from pipeline.score_text import TextConfig
from tests.pipeline.made_media import shot, texture

FPS = Fraction(25)
TICK = Fraction(1, 1000)


STILL = FrameNumbers(0.0, 120.0)
CHANGED = FrameNumbers(60.0, 120.0, candidate=True)
DARK = FrameNumbers(0.0, 5.0, dark=True)
LEAST_CUT_S = 0.56  # 15 frames at 25 a second, less one


def frame_at(seconds: float, image: Image | None = None) -> Frame:
    picture = texture(1, 64, 48) if image is None else image
    return Frame(None, round(seconds * 1_000_000), MICROSECOND, lambda: picture)


def picks(
    times: Sequence[float], marks: Mapping[float, FrameNumbers] | None = None, fps: float = 2.0
) -> list[tuple[str, float]]:
    """Times of frames, and what some of them are -> kind and time of all samples, in the order in which they are known."""
    picker = Picker(SampleSpec(fps=fps), 64, 48, LEAST_CUT_S)
    found = []
    for index, seconds in enumerate(times):
        found += list(picker.see(index, frame_at(seconds), (marks or {}).get(seconds, STILL)))
    return [(pick.kind, pick.sample.seconds) for pick in [*found, *picker.finish()]]


def regular(times: Sequence[float]) -> list[float]:
    return [seconds for kind, seconds in picks(times) if kind == "regular"]


def test_the_grid_at_a_steady_rate() -> None:
    assert regular([index / 10 for index in range(21)]) == [0.0, 0.5, 1.0, 1.5, 2.0]


def test_fewer_frames_than_grid_points() -> None:
    assert regular([0.0, 1.0, 2.0, 3.0]) == [0.0, 1.0, 2.0, 3.0]


def test_frames_off_the_grid_do_not_shift_it() -> None:
    assert regular([0.0, 0.4, 0.6, 0.9, 1.1, 1.4, 1.6]) == [0.0, 0.6, 1.1, 1.6]


def test_a_possible_cut_does_not_move_the_grid() -> None:
    times = [index / 10 for index in range(16)]
    assert picks(times, {0.7: CHANGED}) == picks(times)


def test_what_may_be_a_clip_between_grid_points_is_measured() -> None:
    times = [2.0, 2.1, 2.2, 2.3, 2.4, 2.5]
    assert ("start", 2.1) in picks(times, {2.1: CHANGED, 2.4: CHANGED})
    assert ("start", 2.1) in picks(times, {2.1: CHANGED, 2.3: DARK})
    assert picks(times[:3], {2.1: CHANGED})[-1] == ("start", 2.1)  # the medium ends before the next grid point
    assert ("dark", 2.3) in picks(times, {2.2: DARK})
    assert ("dark", 2.2) in picks(times, {2.1: DARK, 2.2: DARK, 2.3: CHANGED})


def test_flicker_is_not_measured_frame_by_frame() -> None:
    times = [index / 25 for index in range(100)]
    found = picks(times, dict.fromkeys(times[20:80], CHANGED))
    assert len(found) <= 8 + 2 + 1


def test_values_that_count_where_there_is_no_regular_one() -> None:
    values: Measured[str] = Measured()
    sample = take_sample(texture(1, 64, 48), (64, 48), 0.0)
    for kind, frame in (("regular", 0), ("regular", 20), ("start", 10), ("dark", 5), ("dark", 12), ("start", 14)):
        values.put(Pick(kind, frame, sample), f"{kind}{frame}")  # type: ignore[arg-type]  # a kind, as a string
    assert values.within(0, 6) == ["regular0"]
    assert values.within(10, 20) == ["start10"]
    assert values.within(9, 20) == ["dark12"]  # a fade's cut: what may start at 14 is another clip
    assert values.within(4, 9) == ["dark5"]
    assert values.within(30, 40) == ["regular20"]


class Counting(ClipScorers):
    """Scorers that note which frames they measure instead of measuring them."""

    def __init__(self, size: tuple[int, int], least_cut_s: float = LEAST_CUT_S) -> None:
        super().__init__(MotionConfig(), TextConfig(), TechnicalConfig(), size, least_cut_s)
        self.regular: list[int] = []
        self.start: list[int] = []
        self.dark: list[int] = []

    def _measure(self, spec: SampleSpec, pick: Pick) -> None:
        getattr(self, pick.kind).append(pick.frame)


def scan(frames: Sequence[Image], times_ms: Sequence[int], least_frames: int = 15) -> tuple[list[Span], Counting]:
    config = SegmentationConfig(min_scene_len_frames=least_frames)
    cutter, meter = SceneCutter(config, FPS), FrameMeter(config)
    scorers = Counting((frames[0].shape[1], frames[0].shape[0]), max(0, least_frames - 1) / float(FPS))
    for index, (image, time_ms) in enumerate(zip(frames, times_ms, strict=True)):
        frame = Frame(index, time_ms, TICK, lambda image=image: image)  # type: ignore[misc]  # default binds the loop variable
        numbers = meter.measure(frame)
        cutter.see(numbers, time_ms, TICK)
        scorers.see(index, frame, numbers)
    scorers.finish()
    return cutter.spans((times_ms[-1] + 40) / 1000), scorers


PICTURES = [texture(seed, 64, 48) for seed in range(3)]
DARKS = [
    np.zeros((48, 64, 3), np.uint8),
    np.full((48, 64, 3), 9, np.uint8),
    (texture(7, 64, 48) // 12).astype(np.uint8),
]
RUNS = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 24)), min_size=1, max_size=14)


@settings(max_examples=100, deadline=None)
@given(
    runs=RUNS,
    step_ms=st.sampled_from([17, 40, 40, 90]),
    jitter=st.booleans(),
    least_frames=st.sampled_from([15, 15, 6, 0]),
)
def test_every_clip_has_a_sample(runs: list[tuple[int, int]], step_ms: int, jitter: bool, least_frames: int) -> None:
    """Runs of bright and dark pictures of any length: cuts, flicker, fades, cuts in the dark."""
    frames = [(PICTURES + DARKS)[which] for which, length in runs for _ in range(length)]
    steps = [step_ms + (index * 7 % 11 if jitter else 0) for index in range(len(frames))]
    times_ms = [0, *np.cumsum(steps)[:-1].tolist()]
    spans, scorers = scan(frames, times_ms, least_frames)
    for span in spans:
        inside = range(span.start_frame, span.end_frame)
        counting = [*scorers.regular, *scorers.dark, *(frame for frame in scorers.start if frame == span.start_frame)]
        assert any(frame in counting for frame in inside), (span, sorted(counting))


def test_one_second_has_about_two_samples() -> None:
    _, scorers = scan([PICTURES[0]] * 250, [40 * index for index in range(250)])
    assert len(scorers.regular) == 20
    assert scorers.start == scorers.dark == []


def motion(
    images: Sequence[tuple[float, Image]], start_at: int, clips: Sequence[tuple[int, int]]
) -> list[dict[str, Any]]:
    """Times and pictures, the frame that may start a clip, and clips -> their motion scores."""
    scorers = ClipScorers(MotionConfig(), TextConfig(), TechnicalConfig(), (64, 64), LEAST_CUT_S)
    for index, (seconds, image) in enumerate(images):
        scorers.see(index, frame_at(seconds, image), CHANGED if index == start_at else STILL)
    measured = scorers.finish()
    return [measured.scores(*clip, TextConfig())["score_motion"] for clip in clips]


def test_motion_across_a_cut_does_not_count() -> None:
    before, after = texture(2, 64, 64), texture(1, 64, 64)
    images = list(zip((0.0, 0.5, 1.0, 1.5), (before, before, after, after), strict=True))
    *parts, whole = motion(images, 2, [(0, 2), (2, 4), (0, 4)])
    for part in parts:
        assert (part["motion"], part["motion_max"], part["num_samples"]) == (0.0, 0.0, 2)
    assert whole["motion_max"] > 0


@pytest.mark.parametrize(("start_s", "num_samples"), [(0.2, 2), (0.4, 1)])
def test_a_clip_that_begins_off_the_grid_has_motion_from_its_beginning(start_s: float, num_samples: int) -> None:
    """Unless the grid comes so soon that the pair would be too short; and where no clip begins after all, it is no pair."""
    moving = shot(1, 3, step_px=4, width=64, height=64)
    images = [(0.0, np.full((64, 64, 3), 60, np.uint8)), (start_s, moving[0]), (0.5, moving[1]), (1.0, moving[1])]
    short, clip, whole = motion(images, 1, [(1, 3), (1, 4), (0, 4)])
    assert short["num_samples"] == num_samples
    assert clip["num_samples"] == num_samples + 1
    assert whole["num_samples"] == 3
    if num_samples == 2:
        assert short["motion"] == pytest.approx(4 / 64 * 0.5 / 0.3, rel=0.3)
        assert clip["motion"] == pytest.approx(short["motion"] / 2)
    else:
        assert short["motion"] is None
        assert clip["motion"] == 0.0


def test_declarations_that_differ_are_served_each() -> None:
    configs = (MotionConfig(samples=SampleSpec(fps=4.0)), TextConfig(samples=SampleSpec(fps=1.0)), TechnicalConfig())
    scorers = ClipScorers(*configs, (64, 64), LEAST_CUT_S)
    for index in range(50):
        scorers.see(index, frame_at(index / 25), STILL)
    scores = scorers.finish().scores(0, 50, TextConfig())
    counts = [scores[f"score_{family}"]["num_samples"] for family in ("motion", "text", "technical")]
    assert counts == [8, 2, 4]
