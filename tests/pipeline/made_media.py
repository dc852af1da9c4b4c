"""Media made on the spot, with known shots, times and faults."""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from jobs.doctor import usual_priority

Image = NDArray[np.uint8]
SHARED_MEDIA = Path(__file__).parents[3] / "shared" / "media"
MILLISECOND = Fraction(1, 1000)


def shared_media() -> Path:
    """The folder of real media beside the checkout; skips the test where there is none."""
    if not SHARED_MEDIA.is_dir():
        pytest.skip("no shared media beside the checkout")
    return SHARED_MEDIA


def texture(seed: int, width: int = 320, height: int = 180, low: int = 40, high: int = 220) -> Image:
    """A smooth random picture, BGR, between the given levels."""
    rng = np.random.default_rng(seed)
    small = rng.integers(low, high, (6, 10, 3), dtype=np.uint8)
    return np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)


def shot(seed: int, num_frames: int, step_px: int = 1, width: int = 320, height: int = 180) -> list[Image]:
    """A texture that slides sideways by `step_px` a frame."""
    wide = texture(seed, width + step_px * num_frames, height)
    return [np.ascontiguousarray(wide[:, index * step_px : index * step_px + width]) for index in range(num_frames)]


def faded(frames: Sequence[Image], *, fade_in: int = 0, fade_out: int = 0) -> list[Image]:
    """Frames whose first `fade_in` rise from black and whose last `fade_out` sink to it."""
    last = len(frames) - 1
    result = []
    for index, frame in enumerate(frames):
        light = min(1.0, index / fade_in if fade_in else 1.0, (last - index) / fade_out if fade_out else 1.0)
        result.append((frame * light).astype(np.uint8))
    return result


def write_video(
    path: Path,
    frames: Iterable[Image],
    fps: Fraction | int = 25,
    codec: str = "libx264",
    times_ms: Sequence[int] | None = None,
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
) -> Path:
    """BGR frames -> a video file, at a constant rate or at the given times."""
    with usual_priority(), av.open(str(path), "w") as container:
        stream = None
        for index, frame in enumerate(frames):
            if stream is None:
                quick = {"preset": "ultrafast"} if codec == "libx264" else {}
                stream = container.add_stream(codec, rate=Fraction(fps), options=quick | (options or {}))
                stream.height, stream.width = frame.shape[:2]
                stream.pix_fmt = pix_fmt
                if times_ms is not None:
                    stream.time_base = MILLISECOND
                    stream.codec_context.time_base = MILLISECOND
            picture = av.VideoFrame.from_ndarray(frame, format="bgr24")
            if times_ms is not None:
                picture.pts, picture.time_base = times_ms[index], MILLISECOND
            container.mux(stream.encode(picture))
        if stream is not None:
            container.mux(stream.encode())
    return path
