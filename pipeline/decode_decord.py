"""Decoding with decord, for those who train with it and want the very frames it gives."""

import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import cv2
import decord
import numpy as np

from pipeline.decode import FALLBACK_FPS, MICROSECOND, Frame, Image, VideoReader, check_pixels
from schemas.errors import RowError

LOG_PLACE = re.compile(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ")  # a reason that names the time of day is another each time


class DecordReader(VideoReader):
    """Frames by index; times from decord's own table."""

    decoder = "decord"

    def __init__(self, path: Path, max_pixels: int | None, threads: int) -> None:
        decord.logging.set_level(decord.logging.FATAL)
        self._path = path
        try:
            self._reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=threads)
            self._num_frames = len(self._reader)
            first = self._reader[0].asnumpy() if self._num_frames else None
            spans = self._reader.get_frame_timestamp(range(self._num_frames)) if self._num_frames else None
        except (decord.DECORDError, RuntimeError, IndexError) as error:
            message = LOG_PLACE.sub("", str(error)).strip().partition("\n")[0] or type(error).__name__
            raise RowError("DecodeFailed", f"{path.name}: decord says {message}") from error
        if first is None or spans is None:
            raise RowError("DecodeFailed", f"{path.name}: decord finds no frame")
        if first.ndim != 3 or first.shape[2] != 3:  # of very small pictures
            raise RowError("DecodeFailed", f"{path.name}: decord gives a picture of shape {first.shape}")
        self.height_px, self.width_px = first.shape[:2]
        check_pixels(self.width_px, self.height_px, max_pixels)
        spans = np.asarray(spans, np.float64)
        if np.any(np.diff(spans[:, 0]) <= 0):
            raise RowError("DecodeFailed", f"{path.name}: decord gives several frames one time")
        self._starts_us = np.rint((spans[:, 0] - spans[0, 0]) * 1e6).astype(np.int64)
        self._end_us = round((spans[-1, 1] - spans[0, 0]) * 1e6)
        fps = self._reader.get_avg_fps()
        self.fps = Fraction(fps).limit_denominator(10_000) if fps > 0 else FALLBACK_FPS
        self._next = 0

    def __iter__(self) -> Iterator[Frame]:
        while self._next < self._num_frames:
            index = self._next
            self._next += 1
            end = self._starts_us[self._next] if self._next < self._num_frames else self._end_us
            self.end_s = float(end) / 1e6
            yield Frame(index, int(self._starts_us[index]), MICROSECOND, lambda index=index: self._bgr(index))  # type: ignore[misc]  # default binds the loop variable

    def _bgr(self, index: int) -> Image:
        try:
            rgb: Image = self._reader[index].asnumpy()
        except (decord.DECORDError, RuntimeError) as error:
            raise RowError("DecodeFailed", f"{self._path.name}: decord cannot decode frame {index}") from error
        return cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR)  # type: ignore[return-value]  # uint8 in, uint8 out

    def seek(self, seconds: float) -> None:
        """To the frame shown at `seconds`."""
        self._next = max(0, int(np.searchsorted(self._starts_us, round(seconds * 1e6), side="right")) - 1)

    def close(self) -> None:
        """Gives the reader back."""
        self._reader = None
