"""Samples keep the shape of the picture and are never larger than it."""

import cv2
import numpy as np
import pytest

from pipeline.samples import middle, shrunk, shrunk_size, take_sample
from tests.pipeline.made_media import texture


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1920, 1080), (455, 256)), ((1080, 1920), (256, 455)), ((200, 100), (200, 100)), ((300, 256), (300, 256))],
)
def test_the_short_edge_is_what_was_asked_for(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert shrunk_size(*size, 256) == expected


def test_shrinking_keeps_the_mean() -> None:
    picture = texture(1, 640, 480)
    small = shrunk(picture, shrunk_size(640, 480, 120))
    assert small.shape == (120, 160, 3)
    assert small.mean() == pytest.approx(picture.mean(), abs=0.5)


@pytest.mark.parametrize("size", [(1920, 1080), (1280, 720), (1278, 719), (640, 360), (2160, 3840)])
def test_shrinking_by_halves_is_near_the_mean_over_areas(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture = cv2.GaussianBlur(noise, (0, 0), size[0] / 455)
    target = shrunk_size(*size, 256)
    direct = cv2.resize(picture, target, interpolation=cv2.INTER_AREA)
    halved = shrunk(np.asarray(picture, np.uint8), target)
    assert cv2.absdiff(halved, direct).mean() < 1  # rounding, once a halving


def test_the_middle_lies_on_whole_blocks() -> None:
    image = np.zeros((1080, 1920, 3), np.uint8)
    image[336:720, 768:1152] = 1
    taken = take_sample(image, (455, 256), 0.5)
    assert taken.detail.shape == (384, 384, 3)
    assert taken.detail.all()
    assert not np.shares_memory(taken.detail, image)
    assert middle(image[:100, :50]).shape == (100, 50, 3)


def test_a_small_picture_is_the_same_picture() -> None:
    picture = texture(1, 64, 48)
    assert np.shares_memory(shrunk(picture, (64, 48)), picture)
