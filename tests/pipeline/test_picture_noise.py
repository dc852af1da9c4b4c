"""Blocks and noise are found in the amount in which they were planted, at any size and on any ground."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline.picture_noise import blockiness, noise_deviation
from tests.pipeline.made_media import texture, write_video
from tests.pipeline.test_score_technical import detailed, frame_at


def grey(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    coded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR))


@pytest.mark.parametrize("size", [(160, 120), (384, 384), (384, 200)])
@pytest.mark.parametrize("seed", [0, 1])
def test_jpeg_blocks(size: tuple[int, int], seed: int) -> None:
    picture = detailed(seed, *size)
    values = [blockiness(grey(jpeg(picture, quality))) for quality in (95, 60, 30, 15, 6)]
    assert values == sorted(values)
    assert values[0] < 1.6 < 2.0 < values[-1]


def test_no_blocks() -> None:
    for seed in range(3):
        picture = detailed(seed, 384, 300)
        noise = np.random.default_rng(seed).normal(0, 6, picture.shape)
        noisy = np.clip(picture + noise, 0, 255).astype(np.uint8)
        for clean in (picture, noisy, cv2.GaussianBlur(picture, (0, 0), 2)):
            assert blockiness(grey(clean)) < 1.2


def test_a_grid_of_any_phase_and_step() -> None:
    picture = grey(detailed(0, 384, 384)).astype(int)
    steps = np.random.default_rng(0).integers(-1, 2, (48, 48)).repeat(8, 0).repeat(8, 1)
    values = []
    for strength in (0, 2, 4, 8):
        stepped = np.clip(picture + strength * np.roll(steps, (3, 5), (0, 1)), 0, 255).astype(np.uint8)
        values.append(blockiness(stepped))
    assert values == sorted(values)
    assert values[-1] > values[0] + 0.5


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_blocks_of_video_coders(codec: str, tmp_path: Path) -> None:
    frames = [np.roll(detailed(0, 384, 256), index, axis=1) for index in range(10)]
    values = []
    for index, quantiser in enumerate((3, 12, 31) if codec == "mpeg4" else (20, 36, 48)):
        options = {"qmin": str(quantiser), "qmax": str(quantiser)} if codec == "mpeg4" else {"crf": str(quantiser)}
        options["g"] = "1"
        path = write_video(tmp_path / f"{index}.mkv", frames, codec=codec, options=options)
        values.append(blockiness(grey(frame_at(path, 9))))
    assert values == sorted(values)
    assert values[-1] > values[0] + 0.3


@pytest.mark.parametrize("deviation", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("size", [(384, 384), (160, 90)])
def test_noise_of_known_deviation(deviation: float, size: tuple[int, int]) -> None:
    ground = grey(texture(3, *size)).astype(float)
    noisy = np.clip(ground + np.random.default_rng(0).normal(0, deviation, ground.shape), 0, 255).astype(np.uint8)
    assert noise_deviation(noisy) == pytest.approx(deviation, rel=0.3)


def test_texture_is_little_noise_and_more_noise_is_more() -> None:
    picture = grey(detailed(1, 384, 384))
    values = [noise_deviation(picture)]
    for deviation in (2, 5, 10, 20):
        noise = np.random.default_rng(0).normal(0, deviation, picture.shape)
        values.append(noise_deviation(np.clip(picture + noise, 0, 255).astype(np.uint8)))
    assert values == sorted(values)
    assert values[0] < 2


@pytest.mark.parametrize("size", [(1, 1), (9, 300), (15, 15), (17, 40)])
def test_tiny_and_flat_pictures(size: tuple[int, int]) -> None:
    for level in (0, 120, 255):
        flat = np.full(size, level, np.uint8)
        assert (blockiness(flat), noise_deviation(flat)) == (1.0, 0.0)
