"""Regions hold what changed, lie inside the picture, and have sides that a network takes."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.changed_region import STRIDE_PX, Region

SIDES = st.integers(1, 600)


def test_around_what_changed() -> None:
    changed = np.zeros((20, 30), bool)
    assert Region.around(changed) is None
    changed[3, 5] = changed[7, 9] = True
    assert Region.around(changed) == Region(40, 24, 80, 64)


@given(width=SIDES, height=SIDES, left=st.integers(-16, 590), top=st.integers(-16, 590), size=st.integers(40, 300))
def test_on_strides(width: int, height: int, left: int, top: int, size: int) -> None:
    region = Region(min(left, width - 1), min(top, height - 1), left + size, top + size)
    grown = region.on_strides(width, height)
    assert 0 <= grown.left < grown.right <= width
    assert 0 <= grown.top < grown.bottom <= height
    assert grown.left <= max(0, region.left)
    assert grown.right >= min(width, region.right)
    for length, side in ((grown.right - grown.left, width), (grown.bottom - grown.top, height)):
        assert length == side or length % STRIDE_PX == 0


def test_polygons() -> None:
    region = Region(32, 32, 64, 64)
    polygon = np.array([[60, 60], [90, 62], [90, 70], [60, 68]], np.float32)
    assert region.touches(polygon)
    assert not region.touches(polygon + 8)
    assert region.including(polygon) == Region(32, 32, 91, 71)


def test_blocks_of_a_region() -> None:
    blocks = np.zeros((32, 56, 3), np.uint8)
    assert Region(32, 16, 64, 48).of_blocks(blocks).shape == (4, 4, 3)
    assert Region(0, 0, 455, 256).of_blocks(blocks).shape == (32, 56, 3)
