"""Technical values mean what they say on pictures whose truth is known."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline.decode import open_video
from pipeline.read_image import read_image
from pipeline.samples import Image, shrunk, shrunk_size
from pipeline.score_technical import TechnicalConfig, TechnicalScorer, TechnicalValues, summarise
from tests.pipeline.made_media import shared_media, texture


def measure(image: Image) -> TechnicalValues:
    return TechnicalScorer(TechnicalConfig()).measure(image)


def test_flat_pictures() -> None:
    black, white = (measure(np.full((64, 96, 3), level, np.uint8)) for level in (0, 255))
    assert (black.luma_mean, black.luma_std, black.sharpness, black.colourfulness) == (0, 0, 0, 0)
    assert (black.clipped_ratio, black.monochrome_ratio) == (1, 1)
    assert (white.luma_mean, white.clipped_ratio) == (1, 1)
    assert black.letterbox_ratio == white.letterbox_ratio == 0


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (30, 24)])
def test_tiny_pictures(size: tuple[int, int]) -> None:
    values = measure(np.full((size[1], size[0], 3), (200, 30, 30), np.uint8))
    assert (values.monochrome_ratio, values.sharpness, values.letterbox_ratio) == (0.0, 0.0, 0.0)


def test_half_black_half_white() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, 32:] = 255
    values = measure(image)
    assert (values.luma_mean, values.luma_std) == (pytest.approx(0.5), pytest.approx(0.5))


def test_blur_lowers_sharpness() -> None:
    sharp = np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    values = [measure(np.asarray(cv2.GaussianBlur(sharp, (0, 0), blur))).sharpness for blur in (0.5, 1, 2, 4)]
    assert values == sorted(values, reverse=True)
    assert measure(sharp).sharpness > values[0]


def test_colourfulness_by_the_definition_of_its_authors() -> None:
    image = texture(1, 200, 100)
    blue, green, red = (image[..., channel].astype(float) for channel in range(3))
    red_green, yellow_blue = red - green, 0.5 * (red + green) - blue
    expected = np.sqrt(red_green.var() + yellow_blue.var()) + 0.3 * np.sqrt(
        red_green.mean() ** 2 + yellow_blue.mean() ** 2
    )
    assert measure(image).colourfulness == pytest.approx(expected, rel=1e-5)


def test_share_without_colour() -> None:
    image = np.repeat(texture(2, 100, 100)[..., :1], 3, axis=2)
    assert measure(image).monochrome_ratio == 1.0
    image[:25] = (200, 30, 30)
    assert measure(image).monochrome_ratio == pytest.approx(0.75)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.6])
def test_bars_of_known_share(axis: int, share: float) -> None:
    image = texture(4, 200, 200, low=90, high=200)
    bar = round(share * 200 / 2)
    noise = np.random.default_rng(0).integers(14, 19, (bar, 200, 3), dtype=np.uint8)
    image[:bar] = image[-bar:] = noise
    turned = np.ascontiguousarray(np.rot90(image, axis))
    assert measure(turned).letterbox_ratio == pytest.approx(share, abs=0.006)


def test_a_dark_floor_is_no_bar() -> None:
    image = texture(4, 200, 200, low=90, high=200)
    image[150:] = 10
    assert measure(image).letterbox_ratio == 0.0


def test_medians_over_samples() -> None:
    values = [TechnicalValues(*([float(level)] * 7)) for level in (1, 9, 2)]
    row = summarise(values)
    assert row["sharpness"] == row["letterbox_ratio"] == 2.0
    assert row["num_samples"] == 3
    assert summarise([])["luma_mean"] is None


def real(file: str, index: int = 0) -> TechnicalValues:
    path = shared_media() / file
    image = read_image(path).bgr if file.startswith("image") else frame_at(path, index)
    return measure(shrunk(image, shrunk_size(image.shape[1], image.shape[0], 256)))


def frame_at(path: Path, index: int) -> Image:
    with open_video(path) as reader:
        for frame in reader:
            if frame.index == index:
                return frame.bgr()
    raise AssertionError(f"{path.name} has no frame {index}")


def test_real_letterbox() -> None:
    assert real("derived/cockatoo_letterbox.mp4", 20).letterbox_ratio == pytest.approx(184 / 720, abs=0.012)
    assert real("video/cockatoo.mp4", 20).letterbox_ratio == 0.0
    assert real("video/sintel_trailer_30s.mp4", 300).letterbox_ratio > 0.2


def test_real_monochrome() -> None:
    expected = json.loads((shared_media() / "expected.json").read_text())
    for file in expected["monochrome"]:
        assert real(file, 5).monochrome_ratio > 0.99, file
    for file in ("video/mdn_rabbit.mp4", "video/mdn_flower.mp4", "image/cliff_rgb.png", "image/flower_q85_444.jpg"):
        assert real(file, 5).monochrome_ratio < 0.8, file


def test_real_quality() -> None:
    expected = json.loads((shared_media() / "expected.json").read_text())
    for better, worse in expected["quality_pairs_better_first"]:
        assert (
            real(better, 30 * ("video" in better or "derived" in better)).sharpness
            > real(worse, 30 * ("video" in worse or "derived" in worse)).sharpness
        ), (better, worse)
