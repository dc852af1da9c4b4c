"""Technical values mean what they say on pictures whose truth is known."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from pipeline.decode import open_video
from pipeline.detect_scenes import SegmentationConfig
from pipeline.frame_meter import FrameMeter
from pipeline.read_image import read_image
from pipeline.samples import Image, shrunk_size, take_sample
from pipeline.score_technical import (
    TechnicalConfig,
    TechnicalScorer,
    TechnicalValues,
    is_repeat,
    repeat_lines,
    repeated_ratio,
    summarise,
)
from tests.pipeline.made_media import shared_media, texture


def detailed(seed: int, width: int, height: int) -> Image:
    """A picture with detail of every size and clear edges, as photographs have."""
    rng = np.random.default_rng(seed)
    picture = texture(seed, width, height, low=60, high=200).astype(np.float32)
    for blur, strength in ((1.5, 60), (4, 90), (10, 120)):
        noise = cv2.GaussianBlur(rng.normal(0, 1, (height, width, 3)).astype(np.float32), (0, 0), blur)
        picture += strength * noise * (rng.random() + 0.5)
    for _ in range(12):
        left, top, size = rng.integers(0, width), rng.integers(0, height), rng.integers(5, 60)
        colour = tuple(map(int, rng.integers(40, 220, 3)))
        cv2.circle(picture, (int(left), int(top)), int(size), colour, -1, cv2.LINE_AA)
    return np.clip(cv2.GaussianBlur(picture, (0, 0), 0.7), 0, 255).astype(np.uint8)


def measure(image: Image, before: Image | None = None) -> TechnicalValues:
    """At the samples' size, as the scan does."""
    taken = [
        None if one is None else take_sample(one, shrunk_size(one.shape[1], one.shape[0], 256), 0.0)
        for one in (image, before)
    ]
    return TechnicalScorer(TechnicalConfig()).measure(*taken)


def test_flat_pictures() -> None:
    black, white = (measure(np.full((64, 96, 3), level, np.uint8)) for level in (0, 255))
    assert (black.luma_mean, black.luma_std, black.sharpness, black.colourfulness) == (0, 0, 0, 0)
    assert (black.clipped_ratio, black.monochrome_ratio, black.single_tone_ratio) == (1, 1, 1)
    assert (white.luma_mean, white.clipped_ratio) == (1, 1)
    assert black.letterbox_ratio == white.letterbox_ratio == 0


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (30, 24)])
def test_tiny_pictures(size: tuple[int, int]) -> None:
    values = measure(np.full((size[1], size[0], 3), (200, 30, 30), np.uint8))
    assert (values.monochrome_ratio, values.sharpness, values.letterbox_ratio) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("light", [0.1, 0.3, 0.5, 0.8, 0.95])
def test_exposure_is_the_light(light: float) -> None:
    picture = np.clip(texture(0, 300, 200, low=110, high=140) + (255 * light - 125), 0, 255).astype(np.uint8)
    assert measure(picture).luma_mean == pytest.approx(light, abs=0.03)


def test_exposure_ramps() -> None:
    picture = detailed(1, 400, 300).astype(float)
    brighter = [measure(np.clip(picture * gain, 0, 255).astype(np.uint8)) for gain in (0.1, 0.4, 1, 2, 4, 12)]
    means = [values.luma_mean for values in brighter]
    assert means == sorted(means)
    clipped = [values.clipped_ratio for values in brighter]
    assert clipped[2] < clipped[3] < clipped[4] < clipped[5]
    flatter = [measure((128 + (picture - 128) * gain).astype(np.uint8)).luma_std for gain in (1, 0.5, 0.2, 0)]
    assert flatter == sorted(flatter, reverse=True)


def test_half_black_half_white() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, 32:] = 255
    values = measure(image)
    assert (values.luma_mean, values.luma_std) == (pytest.approx(0.5), pytest.approx(0.5))


@pytest.mark.parametrize("height", [128, 256, 1080])
def test_blur_lowers_sharpness_at_any_size(height: int) -> None:
    sharp = detailed(0, height * 4 // 3, height)
    unit = height / 256
    values = [measure(np.asarray(cv2.GaussianBlur(sharp, (0, 0), blur * unit))).sharpness for blur in (0.5, 1, 2, 4)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 4 * values[-1]


def test_the_size_of_the_medium_changes_little() -> None:
    large = cv2.GaussianBlur(detailed(0, 1920, 1080), (0, 0), 2)
    half = cv2.resize(large, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    for name in ("sharpness", "luma_mean", "luma_std", "colourfulness", "monochrome_ratio", "single_tone_ratio"):
        assert getattr(measure(half), name) == pytest.approx(getattr(measure(large), name), rel=0.15, abs=0.01), name


def test_colourfulness_by_the_definition_of_its_authors() -> None:
    image = texture(1, 200, 100)
    blue, green, red = (image[..., channel].astype(float) for channel in range(3))
    red_green, yellow_blue = red - green, 0.5 * (red + green) - blue
    expected = np.sqrt(red_green.var() + yellow_blue.var()) + 0.3 * np.sqrt(
        red_green.mean() ** 2 + yellow_blue.mean() ** 2
    )
    assert measure(image).colourfulness == pytest.approx(expected, rel=1e-5)


def test_less_colour_is_less_colourful() -> None:
    picture = detailed(2, 300, 200).astype(float)
    grey = picture.mean(axis=2, keepdims=True)
    values = [measure((grey + (picture - grey) * gain).astype(np.uint8)).colourfulness for gain in (1, 0.6, 0.3, 0)]
    assert values == sorted(values, reverse=True)
    assert values[-1] == 0


def test_share_without_colour() -> None:
    image = np.repeat(texture(2, 100, 100)[..., :1], 3, axis=2)
    assert measure(image).monochrome_ratio == measure(image).single_tone_ratio == 1.0
    image[:25] = (200, 30, 30)
    assert measure(image).monochrome_ratio == pytest.approx(0.75)
    assert measure(image).single_tone_ratio == pytest.approx(0.75, abs=0.02)


SEPIA = np.array(
    [[0.272, 0.349, 0.393], [0.534, 0.686, 0.769], [0.131, 0.168, 0.189]]
)  # BGR from RGB, the usual matrix


def test_one_tone() -> None:
    picture = detailed(3, 400, 300)
    grey = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)[..., np.newaxis] / 255
    sepia = np.clip(picture[..., ::-1] @ SEPIA, 0, 255).astype(np.uint8)
    cyan = (grey * (250, 220, 120)).astype(np.uint8)
    duotone = ((1 - grey) * (90, 30, 20) + grey * (120, 230, 250)).astype(np.uint8)
    for toned in (sepia, cyan, duotone):
        values = measure(toned)
        assert values.single_tone_ratio > 0.98
        assert values.monochrome_ratio < 0.5
    assert measure(picture).single_tone_ratio < 0.6
    half = np.concatenate([sepia[:, :200], picture[:, 200:]], axis=1)
    assert measure(half).single_tone_ratio < 0.85


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("share", [0.03, 0.1, 0.25, 0.6])
@pytest.mark.parametrize("level", [0, 16, 20])
def test_bars_of_known_share(axis: int, share: float, level: int) -> None:
    image = texture(4, 200, 200, low=90, high=200)
    bar = round(share * 200 / 2)
    noise = np.random.default_rng(0).integers(max(0, level - 2), level + 3, (bar, 200, 3), dtype=np.uint8)
    image[:bar] = image[-bar:] = noise
    values = measure(np.ascontiguousarray(np.rot90(image, axis)))
    assert values.letterbox_ratio == pytest.approx(share, abs=0.006)
    low, high = (values.active_left, values.active_right) if axis else (values.active_top, values.active_bottom)
    assert (low, high) == (pytest.approx(bar / 200, abs=0.005), pytest.approx(1 - bar / 200, abs=0.005))


@pytest.mark.parametrize("size", [(640, 360), (1920, 1080)])
def test_a_portrait_in_a_landscape(size: tuple[int, int]) -> None:
    width, height = size
    image = np.full((height, width, 3), 5, np.uint8)
    shown = round(height * 9 / 16)
    left = (width - shown) // 2
    image[:, left : left + shown] = detailed(1, shown, height)
    values = measure(image)
    assert values.letterbox_ratio == pytest.approx(1 - shown / width, abs=0.012)
    assert (values.active_left, values.active_right) == (
        pytest.approx(left / width, abs=0.006),
        pytest.approx((left + shown) / width, abs=0.006),
    )


def test_bars_do_not_darken_what_they_frame() -> None:
    picture = detailed(1, 400, 256)
    framed = cv2.copyMakeBorder(picture, 0, 0, 100, 100, cv2.BORDER_CONSTANT, value=(0, 0, 0))
    for name in ("luma_mean", "luma_std", "clipped_ratio", "colourfulness", "monochrome_ratio", "single_tone_ratio"):
        assert getattr(measure(framed), name) == pytest.approx(getattr(measure(picture), name), rel=0.02, abs=0.01), (
            name
        )


def test_what_is_no_bar() -> None:
    image = texture(4, 200, 200, low=90, high=200)
    floor, night = image.copy(), (image // 12).astype(np.uint8)
    floor[150:] = 10
    for picture in (floor, night, image):
        values = measure(picture)
        assert values.letterbox_ratio == 0.0
        assert (values.active_left, values.active_top, values.active_right, values.active_bottom) == (0, 0, 1, 1)


def test_dark_edges_of_a_dark_picture_are_no_bars_and_bars_of_a_dim_one_are() -> None:
    dark, dim = (texture(4, 200, 200, low=low, high=high) for low, high in ((12, 30), (12, 70)))
    for picture, share in ((dark, 0.0), (dim, 0.4)):
        picture[:40] = picture[-40:] = 3
        assert measure(picture).letterbox_ratio == pytest.approx(share, abs=0.006)


def test_frozen_pictures() -> None:
    picture = detailed(0, 320, 256)
    coded = np.clip(picture + np.random.default_rng(0).normal(0, 1.5, picture.shape), 0, 255).astype(np.uint8)
    moved = picture.copy()
    moved[100:116, 100:116] = 255 - moved[100:116, 100:116]
    assert measure(picture).frozen is None
    assert measure(picture, picture).frozen == measure(coded, picture).frozen == 1.0
    assert measure(moved, picture).frozen == measure(np.roll(picture, 2, axis=1), picture).frozen == 0.0


@pytest.mark.parametrize("size", [(128, 72), (320, 180), (1280, 720)])
def test_repeated_frames(size: tuple[int, int]) -> None:
    lines = [repeat_lines(np.roll(detailed(0, *size), index // 4 * 3, axis=1)) for index in range(24)]
    repeats = [False, *(is_repeat(before, after) for before, after in pairwise(lines))]
    assert repeated_ratio(repeats) == pytest.approx(18 / 23)
    assert repeated_ratio(repeats[:4]) == 1.0
    assert repeated_ratio(repeats[3:5]) == 0.0
    assert repeated_ratio(repeats[:1]) is None


def test_clip_scores() -> None:
    names = TechnicalValues.__dataclass_fields__
    values = [
        TechnicalValues(**{**dict.fromkeys(names, float(level)), "frozen": frozen})
        for level, frozen in ((1, 1.0), (9, 0.0), (2, 1.0))
    ]
    row = summarise(values)
    assert row["sharpness"] == row["letterbox_ratio"] == 2.0
    assert row["frozen_ratio"] == 0.5  # the first says how it differs from the clip before
    assert row["num_samples"] == 3
    assert summarise(values[:1])["frozen_ratio"] is None
    assert summarise([])["luma_mean"] is None


def real(file: str, index: int = 0) -> TechnicalValues:
    path = shared_media() / file
    return measure(read_image(path).bgr if file.startswith("image") else frame_at(path, index))


def frame_at(path: Path, index: int) -> Image:
    with open_video(path) as reader:
        for frame in reader:
            if frame.index == index:
                return frame.bgr()
    raise AssertionError(f"{path.name} has no frame {index}")


def test_real_letterbox() -> None:
    values = real("derived/cockatoo_letterbox.mp4", 20)
    left, top, width, height = json.loads((shared_media() / "expected.json").read_text())["derived"][
        "derived/cockatoo_letterbox.mp4"
    ]["active_area_xywh"]
    assert (values.active_left, values.active_right) == (left / 1280, (left + width) / 1280)
    assert values.active_top == pytest.approx(top / 720, abs=0.006)
    assert values.active_bottom == pytest.approx((top + height) / 720, abs=0.006)
    assert values.letterbox_ratio == pytest.approx(184 / 720, abs=0.012)
    assert real("video/cockatoo.mp4", 20).letterbox_ratio == 0.0
    assert real("video/sintel_trailer_30s.mp4", 300).letterbox_ratio > 0.2


def test_real_monochrome() -> None:
    expected = json.loads((shared_media() / "expected.json").read_text())
    for file in expected["monochrome"]:
        assert real(file, 5).monochrome_ratio > 0.99, file
        assert real(file, 5).single_tone_ratio > 0.99, file
    for file in ("video/mdn_rabbit.mp4", "video/mdn_flower.mp4", "image/cliff_rgb.png", "image/flower_q85_444.jpg"):
        assert real(file, 5).monochrome_ratio < 0.8, file
        assert real(file, 5).single_tone_ratio < 0.95, file


def clip_scores(file: str) -> dict[str, Any]:
    """Scores of a whole file, sampled at about 2 fps."""
    path = shared_media() / file
    if file.startswith("image"):
        return summarise([real(file)])
    with open_video(path) as reader:
        return summarise([measure(frame.bgr()) for index, frame in enumerate(reader) if index % 12 == 0])


def test_real_quality() -> None:
    expected = json.loads((shared_media() / "expected.json").read_text())
    for better, worse in expected["quality_pairs_better_first"]:
        one, other = clip_scores(better), clip_scores(worse)
        assert one["sharpness"] > other["sharpness"], (better, worse)
        if "quality" in worse:
            assert one["blockiness"] < other["blockiness"] - 0.2, (better, worse)


def test_real_repeats() -> None:
    for file, low, high in (
        ("rabbit_slow4x_repeat", 0.6, 0.8),
        ("rabbit_frozen", 0.95, 1.0),
        ("real_shift_3_1", 0, 0.05),
    ):
        meter = FrameMeter(SegmentationConfig())
        with open_video(shared_media() / "derived" / f"{file}.mp4") as reader:
            found = repeated_ratio([meter.measure(frame).repeats for frame in reader][:50])
        assert found is not None
        assert low <= found <= high, file
