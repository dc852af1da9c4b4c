"""Samples keep the shape of the picture and are never larger than it."""

import numpy as np
import pytest

from pipeline.samples import shrunk, shrunk_size
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


def test_a_small_picture_is_the_same_picture() -> None:
    picture = texture(1, 64, 48)
    assert np.shares_memory(shrunk(picture, (64, 48)), picture)
