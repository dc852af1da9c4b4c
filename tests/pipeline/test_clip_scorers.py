"""Samples come when they are due, belong to the clip they lie in, and every clip has at least one."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.clip_scorers import ClipScorers, Grid, Measured
from pipeline.detect_scenes import SceneCutter, SegmentationConfig, Span, Step
from pipeline.samples import Image, SampleSpec
from pipeline.score_motion import MotionConfig
from pipeline.score_technical import TechnicalConfig
from pipeline.score_text import TextConfig
from tests.pipeline.made_media import texture

FPS = Fraction(25)
TICK = Fraction(1, 1000)


def due(times: Sequence[float], fps: float = 2.0, restarts: Sequence[float] = ()) -> list[float]:
    grid = Grid(SampleSpec(fps=fps), 320, 180)
    return [seconds for seconds in times if grid.is_due(seconds, restart=seconds in restarts)]


def test_the_grid_at_a_steady_rate() -> None:
    assert due([index / 10 for index in range(21)]) == [0.0, 0.5, 1.0, 1.5, 2.0]


def test_fewer_frames_than_grid_points() -> None:
    assert due([0.0, 1.0, 2.0, 3.0]) == [0.0, 1.0, 2.0, 3.0]


def test_frames_off_the_grid_do_not_shift_it() -> None:
    assert due([0.0, 0.4, 0.6, 0.9, 1.1, 1.4, 1.6]) == [0.0, 0.6, 1.1, 1.6]


def test_the_grid_starts_anew_at_a_cut() -> None:
    times = [index / 10 for index in range(16)]
    assert due(times, restarts=[0.7]) == [0.0, 0.5, 0.7, 1.2]


def test_spare_values_count_only_where_there_is_no_other() -> None:
    values: Measured[str] = Measured()
    values.add(0, "a", spare=False)
    values.add(20, "d", spare=False)
    values.add(10, "c", spare=True)
    values.add(5, "b", spare=True)
    assert values.within(0, 6) == ["a"]
    assert values.within(4, 12) == ["b", "c"]
    assert values.within(30, 40) == []


class Counting(ClipScorers):
    """Scorers that note which frames they measure instead of measuring them."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__(MotionConfig(), TextConfig(), TechnicalConfig(), size)
        self.measured: set[int] = set()
        self.regular: set[int] = set()

    def _measure(self, frame: int, samples: object, *, spare: bool) -> None:
        self.measured.add(frame)
        if not spare:
            self.regular.add(frame)


def scan(frames: Sequence[Image], times_ms: Sequence[int]) -> tuple[list[Span], Counting]:
    cutter = SceneCutter(SegmentationConfig(), FPS)
    scorers = Counting((frames[0].shape[1], frames[0].shape[0]))
    for index, (frame, time_ms) in enumerate(zip(frames, times_ms, strict=True)):
        scorers.see(index, time_ms / 1000, frame, cutter.see(frame, time_ms, TICK))
    return cutter.spans((times_ms[-1] + 40) / 1000), scorers


PICTURES = [texture(seed, 64, 48) for seed in range(3)]
DARK = [np.zeros((48, 64, 3), np.uint8), np.full((48, 64, 3), 9, np.uint8), (texture(7, 64, 48) // 12).astype(np.uint8)]
RUNS = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 24)), min_size=1, max_size=14)


@settings(max_examples=100, deadline=None)
@given(runs=RUNS, step_ms=st.sampled_from([17, 40, 40, 90]), jitter=st.booleans())
def test_every_clip_has_a_sample(runs: list[tuple[int, int]], step_ms: int, jitter: bool) -> None:
    """Runs of bright and dark pictures of any length: cuts, flicker, fades, cuts in the dark."""
    frames = [(PICTURES + DARK)[which] for which, length in runs for _ in range(length)]
    steps = [step_ms + (index * 7 % 11 if jitter else 0) for index in range(len(frames))]
    times_ms = [0, *np.cumsum(steps)[:-1].tolist()]
    spans, scorers = scan(frames, times_ms)
    for span in spans:
        inside = range(span.start_frame, span.end_frame)
        assert any(frame in scorers.measured for frame in inside), (span, sorted(scorers.measured))


def test_one_second_has_about_two_samples() -> None:
    _, scorers = scan([PICTURES[0]] * 250, [40 * index for index in range(250)])
    assert len(scorers.measured) == 20


def test_motion_across_a_cut_does_not_count() -> None:
    before, after = texture(2, 64, 64), texture(1, 64, 64)
    scorers = ClipScorers(MotionConfig(), TextConfig(), TechnicalConfig(), (64, 64))
    for index, image in enumerate([before, before, after, after]):
        scorers.see(index, index * 0.5, image, Step(starts_clip=index == 2))
    for start, end in ((0, 2), (2, 4)):
        motion = scorers.scores(start, end)["score_motion"]
        assert (motion["motion"], motion["motion_max"], motion["num_samples"]) == (0.0, 0.0, 2)
    assert scorers.scores(0, 4)["score_motion"]["motion_max"] > 0


def test_declarations_that_differ_are_served_each() -> None:
    scorers = ClipScorers(
        MotionConfig(samples=SampleSpec(fps=4.0)), TextConfig(samples=SampleSpec(fps=1.0)), TechnicalConfig(), (64, 64)
    )
    image = texture(1, 64, 64)
    for index in range(50):
        scorers.see(index, index / 25, image, Step())
    scores = scorers.scores(0, 50)
    counts = [scores[f"score_{family}"]["num_samples"] for family in ("motion", "text", "technical")]
    assert counts == [pytest.approx(8), 2, 4]
