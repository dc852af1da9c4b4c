"""Part of a picture, found by the blocks that changed."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from pipeline.samples import BLOCK_PX, Image

STRIDE_PX = 32  # sides that a network takes are multiples of this


@dataclass(frozen=True)
class Region:
    """Columns [left, right) and rows [top, bottom) of a picture, in pixels."""

    left: int
    top: int
    right: int
    bottom: int

    @classmethod
    def around(cls, changed: NDArray[np.bool_]) -> Self | None:
        """Which blocks changed -> the smallest region that holds them; None if there is none."""
        rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        if not rows.size:
            return None
        edges = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        return cls(*(int(edge) * BLOCK_PX for edge in edges))

    @property
    def num_pixels(self) -> int:
        """Its area."""
        return (self.right - self.left) * (self.bottom - self.top)

    def with_margin(self, margin_px: int) -> "Region":
        """The region and what surrounds it, which may lie outside the picture."""
        return Region(self.left - margin_px, self.top - margin_px, self.right + margin_px, self.bottom + margin_px)

    def touches(self, corners: NDArray[np.float32]) -> bool:
        """Whether a polygon's upright box shares a pixel with the region."""
        (left, top), (right, bottom) = corners.min(axis=0), corners.max(axis=0)
        return bool(left < self.right and right >= self.left and top < self.bottom and bottom >= self.top)

    def including(self, corners: NDArray[np.float32]) -> "Region":
        """The smallest region that holds this one and a polygon."""
        (left, top), (right, bottom) = np.floor(corners.min(axis=0)), np.ceil(corners.max(axis=0)) + 1
        return Region(
            min(self.left, int(left)),
            min(self.top, int(top)),
            max(self.right, int(right)),
            max(self.bottom, int(bottom)),
        )

    def on_strides(self, width: int, height: int) -> "Region":
        """The region inside a picture, grown so that its sides are multiples of the network's stride, or all of the side."""
        left, right = _grown(self.left, self.right, width)
        top, bottom = _grown(self.top, self.bottom, height)
        return Region(left, top, right, bottom)

    def of(self, image: Image) -> Image:
        """A picture -> that part of it."""
        return image[self.top : self.bottom, self.left : self.right]

    def of_blocks(self, blocks: Image) -> Image:
        """Values of a picture's blocks -> those of the blocks that begin in the region."""
        top, left = -(-self.top // BLOCK_PX), -(-self.left // BLOCK_PX)
        return blocks[top : -(-self.bottom // BLOCK_PX), left : -(-self.right // BLOCK_PX)]


def _grown(low: int, high: int, side: int) -> tuple[int, int]:
    low, high = max(0, low), min(side, high)
    length = -(-(high - low) // STRIDE_PX) * STRIDE_PX
    if length >= side:
        return 0, side
    low = min(low, side - length)
    return low, low + length
