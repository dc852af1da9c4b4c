"""Pixels and sizes against the published processor's numbers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.vision_tokenizer.pixels import (
    MAX_PIXELS,
    MIN_PIXELS,
    grid_for_ratio,
    pixels_from_rgb,
    rgb_from_pixels,
    smart_resize,
)
from schemas.errors import RowError


def test_every_level_survives_the_round_trip() -> None:
    rgb = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    pixels = pixels_from_rgb(rgb)
    assert pixels.shape == (1, 3, 16, 16)
    assert (pixels.min().item(), pixels.max().item()) == (-1.0, 1.0)
    assert np.array_equal(rgb_from_pixels(pixels), rgb)


def test_pixels_out_of_range_are_clipped_and_between_levels_truncated() -> None:
    pixels = torch.tensor([-1.7, 1.7, 100.9 / 127.5 - 1]).view(3, 1, 1)
    assert rgb_from_pixels(pixels).ravel().tolist() == [0, 255, 100]


def test_anything_but_uint8_rgb_is_refused() -> None:
    with pytest.raises(RowError, match="float64"):
        pixels_from_rgb(np.zeros((4, 4, 3)))  # type: ignore[arg-type]
    with pytest.raises(RowError, match="uint8 RGB"):
        pixels_from_rgb(np.zeros((4, 4, 1), np.uint8))


@pytest.mark.parametrize(
    ("size", "expected"),
    [((480, 640), (480, 640)), ((1080, 1920), (768, 1360)), ((300, 1000), (304, 1000)), ((2000, 3000), (832, 1248))],
)
def test_smart_resize_is_the_published_table(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert smart_resize(*size) == expected


@given(st.integers(8, 4000), st.integers(8, 4000))
def test_smart_resize_keeps_area_and_shape(height: int, width: int) -> None:
    if max(height, width) / min(height, width) > 5:
        with pytest.raises(RowError, match="1 : 5"):
            smart_resize(height, width)
        return
    new_height, new_width = smart_resize(height, width)
    assert new_height % 8 == new_width % 8 == 0
    assert MIN_PIXELS <= new_height * new_width <= MAX_PIXELS
    # Rounding moves a side of at least 229 pixels by less than one code.
    assert abs(math.log(new_height / new_width) - math.log(height / width)) < 0.08


@pytest.mark.parametrize(
    ("ratio", "area", "grid"),
    [
        ("1:1", 518400, (90, 90)),
        ("16:9", 518400, (68, 120)),
        ("9:16", 518400, (120, 68)),
        ("4:3", 518400, (78, 104)),
        ("3:2", 518400, (73, 110)),
        ("1:1", 262144, (64, 64)),
        ("16:9", 262144, (48, 85)),
        ("4:3", 262144, (55, 74)),
    ],
)
def test_grid_for_ratio_is_the_published_table(ratio: str, area: int, grid: tuple[int, int]) -> None:
    assert grid_for_ratio(ratio, area) == grid


def test_a_ratio_that_is_none_is_refused() -> None:
    for ratio in ("16x9", "16:0", "a:b", "1:2:3"):
        with pytest.raises(RowError, match="16:9"):
            grid_for_ratio(ratio, 262144)
