"""Decoding with OpenCV's own FFmpeg. It turns pictures and maps HDR as PyAV's reader does; it has no AV1 on CPU."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import cv2

from pipeline.decode import MICROSECOND, Frame, Image, VideoReader, check_pixels
from schemas.errors import RowError

MAX_CONSECUTIVE_FAILURES = 5


class OpencvReader(VideoReader):
    """One pass of `cv2.VideoCapture`."""

    decoder = "opencv"

    def __init__(self, path: Path, max_pixels: int | None, threads: int) -> None:
        self._path = path
        self._threads = threads
        self._open()
        self.width_px = int(self._capture.get(cv2.CAP_PROP_FRAME_WIDTH))
        self.height_px = int(self._capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
        check_pixels(self.width_px, self.height_px, max_pixels)
        self.fps = self._nominal_fps()
        if not self._capture.grab():
            self.close()
            raise RowError("DecodeFailed", f"{path.name}: no frame decodes")
        self._grabbed = True

    def _open(self) -> None:
        self._capture = cv2.VideoCapture(str(self._path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, self._threads])
        if not self._capture.isOpened():
            raise RowError("DecodeFailed", f"{self._path.name} cannot be opened")
        self._grabbed = False
        self._index: int | None = 0

    def _nominal_fps(self) -> Fraction:
        from scenedetect.common import framerate_to_fraction

        fps = self._capture.get(cv2.CAP_PROP_FPS)
        if not fps > 0:
            self.close()
            raise RowError("DecodeFailed", f"{self._path.name}: no frame rate")
        rate: Fraction = framerate_to_fraction(fps)
        return rate

    def __iter__(self) -> Iterator[Frame]:
        last = -1
        step = round(1 / (self.fps * MICROSECOND))
        while self._grab():
            stated = round(self._capture.get(cv2.CAP_PROP_POS_MSEC) * 1000)
            if self._index == 0:
                stated = max(0, stated)
            pts = stated if stated > last else last + step
            if last >= 0 and stated > last:
                step = stated - last
            last = pts
            self.end_s = float((pts + step) * MICROSECOND)
            image = self._retrieve()  # at once: the next grab overwrites it
            yield Frame(self._index, pts, MICROSECOND, lambda image=image: image)  # type: ignore[misc]  # default binds the loop variable
            if self._index is not None:
                self._index += 1

    def _grab(self) -> bool:
        if self._grabbed:
            self._grabbed = False
            return True
        return any(self._capture.grab() for _ in range(MAX_CONSECUTIVE_FAILURES))

    def _retrieve(self) -> Image:
        ok, image = self._capture.retrieve()
        if not ok:
            raise RowError("DecodeFailed", f"{self._path.name}: a frame was grabbed but cannot be retrieved")
        return image  # type: ignore[return-value]  # OpenCV's stubs say any integer or float

    def seek(self, seconds: float) -> None:
        """To a little before `seconds`, or to the first frame where OpenCV cannot seek."""
        self._grabbed = False
        self._index = None
        target_ms = max(0.0, seconds * 1000 - 2000 / float(self.fps))
        if target_ms > 0 and self._capture.set(cv2.CAP_PROP_POS_MSEC, target_ms) and self._capture.grab():
            self._grabbed = True
            if self._capture.get(cv2.CAP_PROP_POS_MSEC) <= seconds * 1000:
                return
        self.close()
        self._open()

    def close(self) -> None:
        """Closes the file."""
        self._capture.release()
