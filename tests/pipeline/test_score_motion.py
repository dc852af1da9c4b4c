"""The motion score is the known displacement over the short edge, and the same bits every time."""

import math
from itertools import pairwise

import cv2
import numpy as np
import pytest

from pipeline.decode import open_video
from pipeline.samples import Image, Sample, shrunk, shrunk_size
from pipeline.score_motion import MotionConfig, MotionScorer, Preset, summarise
from tests.pipeline.made_media import shared_media

WIDTH, HEIGHT = 455, 256


def surface(blur: float) -> Image:
    """A large random surface to cut views from: the larger the blur, the coarser its detail."""
    noise = np.random.default_rng(0).integers(0, 256, (700, 1000, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), blur)
    return np.asarray(cv2.normalize(smooth, None, 0, 255, cv2.NORM_MINMAX), np.uint8)  # type: ignore[call-overload]


def view(surface: Image, right: int, down: int) -> Image:
    return np.ascontiguousarray(surface[200 - down : 200 - down + HEIGHT, 250 - right : 250 - right + WIDTH])


def measure(before: Image, after: Image, step_s: float = 0.5, preset: Preset = "fast") -> float:
    return MotionScorer(MotionConfig(preset=preset)).pair(Sample(before, 0.0), Sample(after, step_s))


@pytest.mark.parametrize("preset", ["fast", "medium"])
@pytest.mark.parametrize("blur", [2.0, 12.0])
@pytest.mark.parametrize(("right", "down"), [(1, 0), (3, 1), (8, -5), (20, 10), (40, 0), (80, 30), (-120, 0)])
def test_a_known_shift(preset: Preset, blur: float, right: int, down: int) -> None:
    picture = surface(blur)
    expected = math.hypot(right, down) / HEIGHT
    tolerance = 0.03
    if abs(right) > 100:
        tolerance = 0.1  # a quarter of the picture has nothing to be found in
    if abs(right) == 1 and preset == "fast":
        tolerance = 0.15
    found = measure(view(picture, 0, 0), view(picture, right, down), preset=preset)
    assert found == pytest.approx(expected, rel=tolerance)


def test_a_moving_part_counts_by_its_area() -> None:
    background, thing = surface(2.0), surface(6.0)[:128, :128]
    before, after = view(background, 0, 0), view(background, 0, 0)
    before[60:188, 100:228] = thing
    after[60:188, 108:236] = thing
    expected = 8 * 128 * 128 / (WIDTH * HEIGHT) / HEIGHT
    assert measure(before, after) == pytest.approx(expected, rel=0.35)


def test_nothing_moves() -> None:
    picture = view(surface(2.0), 0, 0)
    assert measure(picture, picture.copy()) == 0.0
    noise = np.random.default_rng(1).normal(0, 2, picture.shape)
    noisy = np.clip(picture + noise, 0, 255).astype(np.uint8)
    assert measure(picture, noisy) < 0.001


@pytest.mark.parametrize("step_s", [0.25, 1.0, 2.0])
def test_motion_counts_per_sampling_step(step_s: float) -> None:
    picture = surface(4.0)
    moved = round(20 * step_s)
    assert measure(view(picture, 0, 0), view(picture, moved, 0), step_s) == pytest.approx(10 / HEIGHT, rel=0.05)


@pytest.mark.parametrize("size", [(1, 1), (30, 24), (9, 300)])
def test_tiny_pictures(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(2)
    before, after = (rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8) for _ in range(2))
    assert measure(before, after) >= 0


def test_the_same_bits_whatever_came_before_and_on_any_number_of_threads() -> None:
    picture = surface(3.0)
    views = [Sample(view(picture, right, 0), index * 0.5) for index, right in enumerate((0, 3, 60, 61, 150, 150))]
    expected = [MotionScorer(MotionConfig()).pair(before, after) for before, after in pairwise(views)]
    before_threads = cv2.getNumThreads()
    try:
        for threads in (1, 2, 4):
            cv2.setNumThreads(threads)
            scorer = MotionScorer(MotionConfig())
            found = [scorer.pair(before, after) for before, after in pairwise(views)]
            assert found == expected
    finally:
        cv2.setNumThreads(before_threads)


def test_clip_scores() -> None:
    scores = summarise([0.1, 0.3], 3)
    assert (scores.motion, scores.motion_max, scores.num_samples) == (pytest.approx(0.2), 0.3, 3)
    assert summarise([], 1).motion is None


def test_the_id_names_the_settings() -> None:
    assert MotionConfig().scorer_id == MotionConfig().scorer_id
    assert MotionConfig().scorer_id != MotionConfig(preset="medium").scorer_id


@pytest.mark.parametrize(
    ("file", "px_per_frame"),
    [
        ("real_shift_0_0.mp4", 0.0),
        ("real_shift_3_1.mp4", math.hypot(3, 1)),
        ("real_shift_3_1_smooth.mp4", math.hypot(3, 1)),
        ("real_shift_12_0.mp4", 12.0),
        ("rabbit_frozen.mp4", 0.0),
    ],
)
def test_real_shifts(file: str, px_per_frame: float) -> None:
    scorer = MotionScorer(MotionConfig())
    samples: list[Sample] = []
    with open_video(shared_media() / "derived" / file) as reader:
        for frame in reader:
            if frame.seconds >= len(samples) * 0.5 - 1e-6:
                image = frame.bgr()
                height, width = image.shape[:2]
                samples.append(Sample(shrunk(image, shrunk_size(width, height, 256)), frame.seconds))
    pairs = [scorer.pair(before, after) for before, after in pairwise(samples)]
    expected = px_per_frame * 25 / 2 / height  # 25 frames a second, half a second apart
    assert np.mean(pairs) == pytest.approx(expected, rel=0.02, abs=0.001)
