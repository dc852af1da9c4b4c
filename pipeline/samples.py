"""The few small frames that a scorer looks at, declared by each scorer and served by the one pass over a medium."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from schemas.recipe import Config

Image = NDArray[np.uint8]

DETAIL_PX = 384
CODING_BLOCK_PX = 16  # the middle is cut on whole blocks, so that their grid keeps its phase
BLOCK_PX = 8


class SampleSpec(Config):
    """Which frames a scorer wants. Paper: Emu3 report, appendix on video data: 2 frames a second, short edge 256."""

    fps: float = Field(2.0, gt=0)
    short_edge_px: int = Field(256, ge=8)


@dataclass(frozen=True)
class Sample:
    """One small frame, BGR uint8 [height, width, 3], the time it is shown, in seconds, and the middle of the frame at
    full size, of at most 384 by 384 pixels, for what shrinking takes away; None where the small frame is all that was read.
    """

    image: Image
    seconds: float
    detail: Image | None = None


def take_sample(image: Image, size: tuple[int, int], seconds: float) -> Sample:
    """A frame at full size -> its sample of (width, height) pixels."""
    return Sample(shrunk(image, size), seconds, middle(image))


def middle(image: Image) -> Image:
    """A frame -> a copy of its middle: a view would keep the whole frame in memory."""
    top, left = (max(0, side - DETAIL_PX) // 2 // CODING_BLOCK_PX * CODING_BLOCK_PX for side in image.shape[:2])
    return image[top : top + DETAIL_PX, left : left + DETAIL_PX].copy()


def block_means(image: Image) -> Image:
    """A picture -> mean colours of its blocks of 8 by 8 pixels: sensor noise is averaged away, a new letter is not."""
    import cv2

    height, width = image.shape[:2]
    size = (max(1, width // BLOCK_PX), max(1, height // BLOCK_PX))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)  # type: ignore[return-value]  # uint8 in, uint8 out


def shrunk_size(width: int, height: int, short_edge_px: int) -> tuple[int, int]:
    """The size of a picture whose short edge becomes `short_edge_px`; a smaller picture keeps its size."""
    short = min(width, height)
    if short <= short_edge_px:
        return width, height
    factor = short_edge_px / short
    return max(1, round(width * factor)), max(1, round(height * factor))


def shrunk(image: Image, size: tuple[int, int]) -> Image:
    """A picture -> the same in (width, height) pixels, by area mean, so that fine text does not break up.

    Halved as long as that leaves enough: means over pairs of pixels are several times faster than over fractions of them.
    """
    import cv2

    while image.shape[1] >= 2 * size[0] and image.shape[0] >= 2 * size[1] and _is_even(image):
        image = cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)  # type: ignore[assignment]  # uint8
    if image.shape[1::-1] == size:
        return image
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)  # type: ignore[return-value]  # uint8 in, uint8 out


def _is_even(image: Image) -> bool:
    height, width = image.shape[:2]
    return not (height % 2 or width % 2)
