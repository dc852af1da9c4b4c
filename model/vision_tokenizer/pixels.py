"""Pictures as the network wants them: uint8 RGB to [-1, 1] and back, and the size to resize an image to.

Shapes: ... any leading dimensions, H W pixels, C channels.
"""

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from schemas.errors import RowError

MIN_PIXELS = 512 * 512  # limits of the published processor
MAX_PIXELS = 1024 * 1024
MAX_ASPECT_RATIO = 5


def pixels_from_rgb(rgb: npt.NDArray[np.uint8] | Tensor) -> Tensor:
    """uint8 RGB (..., H, W, 3) -> float32 pixels (..., 3, H, W) in [-1, 1].

    Raises: RowError if the array is anything else.
    """
    values = rgb if isinstance(rgb, Tensor) else torch.from_numpy(np.ascontiguousarray(rgb))
    if values.dtype != torch.uint8 or values.ndim < 3 or values.shape[-1] != 3:
        found = f"{values.dtype} of shape {tuple(values.shape)}"
        raise RowError("pixels_rgb", f"found {found}, expected uint8 RGB of shape (..., H, W, 3)")
    return (values.movedim(-1, -3).float() / 255 - 0.5) / 0.5


def rgb_from_pixels(pixels: Tensor) -> npt.NDArray[np.uint8]:
    """Pixels (..., 3, H, W) around [-1, 1] -> uint8 RGB (..., H, W, 3), clipped.

    Values between two levels go to the lower one, as in the published processor.
    """
    # Float64 and a hair's breadth, so that a level that came in as uint8 leaves as the same level.
    levels = (pixels.detach().double() * 0.5 + 0.5) * 255 + 1e-4
    rgb: npt.NDArray[np.uint8] = levels.clamp(0, 255).to(torch.uint8).movedim(-3, -1).contiguous().cpu().numpy()
    return rgb


def smart_resize(
    height: int, width: int, *, factor: int = 8, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """Height and width of an image -> the height and width to resize it to before encoding, in pixels.

    Both are multiples of `factor`, the area lies between the limits and the aspect ratio is nearly kept.

    Raises: RowError if a side is shorter than `factor` or the aspect ratio is above 5.
    """
    if min(height, width) < factor:
        raise RowError("image_small", f"found {height} x {width} pixels, expected sides of at least {factor}")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise RowError(
            "image_aspect", f"found {height} x {width} pixels, expected sides at most 1 : {MAX_ASPECT_RATIO}"
        )
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = math.floor(height / shrink / factor), math.floor(width / shrink / factor)
    elif rows * columns * factor**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = math.ceil(height * grow / factor), math.ceil(width * grow / factor)
    return rows * factor, columns * factor


def grid_for_ratio(ratio: str, area: int) -> tuple[int, int]:
    """A "W:H" ratio and an area in pixels -> rows and columns of codes.

    Raises: RowError if the ratio is not two positive numbers.
    """
    parts = ratio.split(":")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise RowError("image_ratio", f"found the ratio {ratio!r}, expected one like '16:9'")
    width, height = int(parts[0]), int(parts[1])
    scale = math.sqrt(area / (width * height))
    return round(height * scale / 8), round(width * scale / 8)
