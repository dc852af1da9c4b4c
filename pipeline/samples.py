"""The few small frames that a scorer looks at, declared by each scorer and served by the one pass over a medium."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from schemas.recipe import Config

Image = NDArray[np.uint8]


class SampleSpec(Config):
    """Which frames a scorer wants. Paper: Emu3 report, appendix on video data: 2 frames a second, short edge 256."""

    fps: float = Field(2.0, gt=0)
    short_edge_px: int = Field(256, ge=8)


@dataclass(frozen=True)
class Sample:
    """One small frame: BGR uint8 [height, width, 3] and the time it is shown, in seconds."""

    image: Image
    seconds: float


def shrunk_size(width: int, height: int, short_edge_px: int) -> tuple[int, int]:
    """The size of a picture whose short edge becomes `short_edge_px`; a smaller picture keeps its size."""
    short = min(width, height)
    if short <= short_edge_px:
        return width, height
    factor = short_edge_px / short
    return max(1, round(width * factor)), max(1, round(height * factor))


def shrunk(image: Image, size: tuple[int, int]) -> Image:
    """A picture -> the same in (width, height) pixels, by area mean, so that fine text does not break up."""
    import cv2

    height, width = image.shape[:2]
    if (width, height) == size:
        return image
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)  # type: ignore[return-value]  # uint8 in, uint8 out
