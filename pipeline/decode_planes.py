"""A rough small picture straight from the planes of a decoded frame: a tenth of what converting all of it costs."""

from functools import cache
from typing import Any

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

from pipeline.decode import Image, Size

PLANAR_BITS = {
    **dict.fromkeys(("yuv420p", "yuv422p", "yuv444p", "yuvj420p", "yuvj422p", "yuvj444p"), 8),
    **dict.fromkeys(("yuv420p10le", "yuv422p10le", "yuv444p10le"), 10),
}
WARPED_MOST_PX = 32_766
FULL_RANGE = 2  # AVCOL_RANGE_JPEG
# Weights of red and blue in luma by AVColorSpace; where a stream states none, swscale takes those of BT.601.
LUMA_WEIGHTS = {1: (0.2126, 0.0722), 4: (0.30, 0.11), 7: (0.212, 0.087), 9: (0.2627, 0.0593), 10: (0.2627, 0.0593)}
BT601_WEIGHTS = (0.299, 0.114)


def sketched(raw: VideoFrame, size: Size) -> Image | None:
    """A decoded frame of standard range -> BGR uint8 of (width, height), not turned; None where `sampled` gives none."""
    import cv2

    planes = sampled(raw, size)
    if planes is None:
        return None
    bits = PLANAR_BITS[raw.format.name]
    is_full = raw.format.name.startswith("yuvj") or int(raw.color_range) == FULL_RANGE
    bgr = cv2.transform(cv2.merge(planes), bgr_matrix(int(raw.colorspace), is_full, bits))
    return np.minimum(bgr, 255).astype(np.uint8, copy=False)


def small_frame(raw: VideoFrame, size: Size, reformatter: VideoReformatter) -> VideoFrame | None:
    """A large decoded frame of 10 bits -> a small one with all that is said of its colours and light, to be converted in
    its stead; None for other formats.
    """
    planes = sampled(raw, size)
    if planes is None or PLANAR_BITS[raw.format.name] != 10:
        return None
    width, height = size
    # For the sake of its side data, which can only be copied this way: its pixels are replaced.
    small = reformatter.reformat(raw, width, height, "yuv444p10le", interpolation=Interpolation.POINT, threads=1)
    for plane, values in zip(small.planes, planes, strict=True):
        rows = np.zeros((plane.height, plane.line_size // 2), "<u2")
        rows[:, : plane.width] = values
        plane.update(rows.tobytes())
    return small


def sampled(raw: VideoFrame, size: Size) -> list[NDArray[np.integer[Any]]] | None:
    """A decoded frame -> luma and both chroma, [height, width] each, not turned; None for formats other than planar YUV,
    and for sides that OpenCV does not warp.

    Each pixel is interpolated at the place at which `cv2.resize` to twice this size interpolates every other one of
    its pixels, so that fine patterns alias the same way here and there.
    """
    found = planes(raw)
    if found is None or max(raw.width, raw.height) > WARPED_MOST_PX:
        return None
    return [_sampled(plane, size) for plane in found]


def planes(raw: VideoFrame) -> list[NDArray[np.integer[Any]]] | None:
    """Views of luma and both chroma planes, without the padding at the ends of rows; None for formats other than planar
    YUV.
    """
    bits = PLANAR_BITS.get(raw.format.name)
    if bits is None:
        return None
    dtype: np.dtype[Any] = np.dtype(np.uint8 if bits == 8 else "<u2")
    return [
        np.frombuffer(memoryview(plane), dtype).reshape(plane.height, plane.line_size // dtype.itemsize)[
            :, : plane.width
        ]
        for plane in raw.planes
    ]


def _sampled(plane: NDArray[np.integer[Any]], size: Size) -> NDArray[np.integer[Any]]:
    import cv2

    width, height = size
    across, down = plane.shape[1] / width, plane.shape[0] / height
    places = np.array([[across, 0, across / 4 - 0.5], [0, down, down / 4 - 0.5]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(plane, places, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)  # type: ignore[return-value]  # as the plane


@cache
def bgr_matrix(colorspace: int, is_full: bool, bits: int) -> NDArray[np.float64]:
    """AVColorSpace, range and depth -> [3, 4]: YUV, and 1, to 8-bit BGR."""
    red, blue = LUMA_WEIGHTS.get(colorspace, BT601_WEIGHTS)
    green = 1 - red - blue
    top = 2**bits / 256
    black, luma_span, chroma_span = (0, 255, 255) if is_full else (16, 219, 224)
    y, c = 255 / (luma_span * top), 2 * 255 / (chroma_span * top)
    from_yuv = np.array(
        [
            [y, c * (1 - blue), 0],
            [y, -c * (1 - blue) * blue / green, -c * (1 - red) * red / green],
            [y, 0, c * (1 - red)],
        ]
    )
    offset = -from_yuv @ np.array([black * top, 128 * top, 128 * top])
    return np.column_stack([from_yuv, offset])
