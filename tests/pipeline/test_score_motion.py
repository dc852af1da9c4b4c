"""Motion scores are the known displacements over the short edge, camera apart from objects, and the same bits every time."""

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline.camera_motion import PairMotion, fit_camera
from pipeline.decode import open_video
from pipeline.samples import Image, Sample, SampleSpec, shrunk_size, take_sample
from pipeline.score_motion import MotionConfig, MotionScorer, summarise
from tests.pipeline.made_media import shared_media, write_video

WIDTH, HEIGHT = 455, 256


def surface(blur: float) -> Image:
    """A large random surface to cut views from: the larger the blur, the coarser its detail."""
    noise = np.random.default_rng(0).integers(0, 256, (700, 1000, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), blur)
    return np.asarray(cv2.normalize(smooth, None, 0, 255, cv2.NORM_MINMAX), np.uint8)  # type: ignore[call-overload]


def view(surface: Image, right: int, down: int) -> Image:
    return np.ascontiguousarray(surface[200 - down : 200 - down + HEIGHT, 250 - right : 250 - right + WIDTH])


def turned_view(surface: Image, zoom: float, degrees: float) -> Image:
    """The middle view of a surface that was scaled and turned counter-clockwise about that view's middle."""
    middle = (250 + (WIDTH - 1) / 2, 200 + (HEIGHT - 1) / 2)
    matrix = cv2.getRotationMatrix2D(middle, degrees, zoom)
    return view(np.asarray(cv2.warpAffine(surface, matrix, (surface.shape[1], surface.shape[0])), np.uint8), 0, 0)


def noisy(picture: Image, seed: int, deviation: float = 2.0) -> Image:
    return np.clip(picture + np.random.default_rng(seed).normal(0, deviation, picture.shape), 0, 255).astype(np.uint8)


def taken(picture: Image, seconds: float) -> Sample:
    return take_sample(picture, (picture.shape[1], picture.shape[0]), seconds)


def measure(before: Image, after: Image, step_s: float = 0.5) -> PairMotion:
    return MotionScorer(MotionConfig()).pair(taken(before, 0.0), taken(after, step_s))


@pytest.mark.parametrize("blur", [1.0, 2.0, 4.0, 12.0])
@pytest.mark.parametrize("deviation", [0.0, 3.0])
@pytest.mark.parametrize(("right", "down"), [(1, 0), (2, 0), (0, -3), (4, 0), (5, 3), (8, -5), (0, 16), (16, 0)])
def test_a_known_shift(blur: float, deviation: float, right: int, down: int) -> None:
    picture = surface(blur)
    found = measure(noisy(view(picture, 0, 0), 1, deviation), noisy(view(picture, right, down), 2, deviation))
    expected = math.hypot(right, down) / HEIGHT
    assert found.motion == pytest.approx(expected, rel=0.05)
    assert found.camera_motion == pytest.approx(expected, rel=0.05)
    assert found.object_motion < (0.25 if deviation else 0.02) * expected  # noise on an even surface looks like life
    assert abs(found.zoom) < 0.003
    assert abs(found.rotation_deg) < 0.1


@pytest.mark.parametrize("blur", [2.0, 12.0])
@pytest.mark.parametrize(("right", "down"), [(20, 10), (40, 0), (80, 30), (-120, 0)])
def test_a_fast_pan(blur: float, right: int, down: int) -> None:
    picture = surface(blur)
    found = measure(view(picture, 0, 0), view(picture, right, down))
    expected = math.hypot(right, down) / HEIGHT
    # Of the fastest a quarter of the picture has nothing to be found in: the fit goes by what is left.
    assert found.motion == pytest.approx(expected, rel=0.1 if abs(right) > 100 else 0.03)
    assert found.camera_motion == pytest.approx(expected, rel=0.02)
    assert found.object_motion < 0.02 * expected


@pytest.mark.parametrize(
    ("zoom", "degrees"), [(1.02, 0), (1.1, 0), (0.95, 0), (0.9, 0), (1, 1), (1, -2), (1, 8), (1.05, 3)]
)
def test_zoom_and_rotation(zoom: float, degrees: float) -> None:
    picture = surface(2.0)
    found = measure(view(picture, 0, 0), turned_view(picture, zoom, degrees))
    assert found.zoom == pytest.approx(zoom - 1, rel=0.05, abs=0.001)
    assert found.rotation_deg == pytest.approx(degrees, rel=0.05, abs=0.05)
    assert found.camera_motion == pytest.approx(found.motion, rel=0.03)
    assert found.object_motion < 0.02 * found.motion


@pytest.mark.parametrize(("camera", "thing"), [(0, 8), (10, 18), (10, 2), (-12, 6)])
def test_an_object_is_told_from_the_camera(camera: int, thing: int) -> None:
    """A seventh of the picture moves by itself; what covers and uncovers ground blurs its outline."""
    ground, patch = surface(2.0), surface(4.0)[:128, :128]
    before, after = view(ground, 0, 0), view(ground, camera, 0)
    before[60:188, 160:288] = patch
    after[60:188, 160 + thing : 288 + thing] = patch
    found = measure(before, after)
    share = 128 * 128 / (WIDTH * HEIGHT)
    assert found.camera_motion == pytest.approx(abs(camera) / HEIGHT, rel=0.03, abs=0.0005)
    assert found.object_motion == pytest.approx(share * abs(thing - camera) / HEIGHT, rel=0.35)
    if camera == 0:
        assert found.static_ratio == pytest.approx(1 - share, abs=0.04)
    else:
        assert found.static_ratio < 0.05


def test_nothing_moves() -> None:
    picture = view(surface(2.0), 0, 0)
    still = measure(picture, picture.copy())
    assert (still.motion, still.camera_motion, still.object_motion, still.static_ratio) == (0.0, 0.0, 0.0, 1.0)
    for blur in (1.0, 2.0, 4.0, 12.0):
        picture = view(surface(blur), 0, 0)
        found = measure(noisy(picture, 1), noisy(picture, 2))
        assert found.motion < 0.001
        assert found.camera_motion < 0.0005
        assert found.object_motion < 0.0001
        assert found.static_ratio > 0.98


@pytest.mark.parametrize("step_s", [0.25, 1.0, 2.0])
def test_motion_counts_per_sampling_step(step_s: float) -> None:
    picture = surface(4.0)
    found = measure(view(picture, 0, 0), view(picture, round(20 * step_s), 0), step_s)
    assert found.motion == pytest.approx(10 / HEIGHT, rel=0.05)
    assert found.camera_motion == pytest.approx(10 / HEIGHT, rel=0.05)


@pytest.mark.parametrize("size", [(1, 1), (30, 24), (9, 300)])
def test_tiny_pictures(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(2)
    before, after = (rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8) for _ in range(2))
    found = measure(before, after)
    assert found.motion >= 0
    assert all(math.isfinite(value) for value in vars(found).values())


@pytest.mark.parametrize("size", [(4, 400), (16, 400), (16, 16384), (31, 9000), (16384, 16), (30, 30)])
def test_narrow_pictures(size: tuple[int, int]) -> None:
    """Pixels of (height, width) that move two to the right, where flow finds hardly a patch; another picture came before."""
    height, width = size
    noise = np.random.default_rng(0).integers(0, 255, (height, width // 4, 3), dtype=np.uint8)
    before = cv2.resize(noise, (width, height))
    scorer = MotionScorer(MotionConfig())
    scorer.pair(Sample(before[:3, :3].copy(), 0.0), Sample(before[:3, 1:4].copy(), 0.5))
    motion = scorer.pair(Sample(before, 0.0), Sample(np.roll(before, 2, axis=1), 0.5)).motion
    assert motion == pytest.approx(2 / min(size), rel=0.05)


def test_flat_pictures() -> None:
    found = measure(np.full((64, 64, 3), 60, np.uint8), np.full((64, 64, 3), 200, np.uint8))
    assert all(math.isfinite(value) for value in vars(found).values())


def test_a_fit_outvotes_a_third_that_moves_otherwise() -> None:
    rng = np.random.default_rng(0)
    places = rng.uniform(-200, 200, 600) + 1j * rng.uniform(-100, 100, 600)
    vectors = (0.03 - 0.02j) * places + (5 - 2j) + rng.normal(0, 0.05, 600)
    vectors[:200] += 9 + 4j
    scale, shift = fit_camera(places, vectors)
    assert scale == pytest.approx(0.03 - 0.02j, abs=0.001)
    assert shift == pytest.approx(5 - 2j, abs=0.05)


def test_the_same_bits_whatever_came_before_and_on_any_number_of_threads() -> None:
    picture = surface(3.0)
    views = [taken(view(picture, right, 0), index * 0.5) for index, right in enumerate((0, 3, 60, 61, 150, 150))]
    expected = [MotionScorer(MotionConfig()).pair(before, after) for before, after in pairwise(views)]
    before_threads = cv2.getNumThreads()
    try:
        for threads in (1, 2, 3, 4):
            cv2.setNumThreads(threads)
            scorer = MotionScorer(MotionConfig())
            found = [scorer.pair(before, after) for before, after in pairwise(views)]
            assert found == expected
    finally:
        cv2.setNumThreads(before_threads)


def test_clip_scores() -> None:
    slow, fast = PairMotion(0.1, 0.1, 0.0, 0.02, -1.0, 0.5), PairMotion(0.3, 0.1, 0.2, -0.02, -2.0, 0.0)
    scores = summarise([slow, fast], 3)
    assert (scores.motion, scores.motion_max, scores.num_samples) == (pytest.approx(0.2), 0.3, 3)
    assert (scores.camera_motion, scores.object_motion) == (pytest.approx(0.1), pytest.approx(0.1))
    assert (scores.zoom, scores.rotation_deg, scores.static_ratio) == (0.0, -1.5, 0.25)
    assert summarise([], 1).motion is summarise([], 1).camera_motion is None


def test_the_id_names_the_settings() -> None:
    assert MotionConfig().scorer_id == MotionConfig().scorer_id
    assert MotionConfig().scorer_id != MotionConfig(samples=SampleSpec(fps=4)).scorer_id


def pairs_of(path: Path, threads: int = 1) -> Iterator[PairMotion]:
    """Samples of a video at 2 fps -> their pairs."""
    scorer, last, due = MotionScorer(MotionConfig()), None, 0.0
    with open_video(path, threads=threads) as reader:
        size = shrunk_size(reader.width_px, reader.height_px, 256)
        for frame in reader:
            if frame.seconds < due - 1e-6:
                continue
            sample = take_sample(frame.bgr(), size, frame.seconds)
            if last is not None:
                yield scorer.pair(last, sample)
            last, due = sample, due + 0.5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_runs_on_one_to_four_decoder_threads(tmp_path: Path) -> None:
    picture = surface(3.0)
    frames = [view(picture, 2 * index, index // 2) for index in range(75)]
    path = write_video(tmp_path / "pan.mp4", [frame[:, :454] for frame in frames], options={"bf": "2"})
    runs = [list(pairs_of(path, threads)) for threads in (1, 2, 3, 4) for _ in range(5)]
    assert len(runs[0]) == 5
    assert all(run == runs[0] for run in runs)


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
    path = shared_media() / "derived" / file
    with open_video(path) as reader:
        height = reader.height_px
    scores = summarise(list(pairs_of(path)), 0)
    expected = px_per_frame * 25 / 2 / height  # 25 frames a second, half a second apart
    assert scores.motion == pytest.approx(expected, rel=0.02, abs=0.0005)
    assert scores.camera_motion == pytest.approx(expected, rel=0.02, abs=0.0005)
    assert scores.object_motion == pytest.approx(0, abs=0.02 * expected + 0.0002)
