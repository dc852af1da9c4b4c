"""Frames of a clip, read from the original file by seeking. No clip file is ever cut for it."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.decode import MICROSECOND, Frame, Image, VideoReader, open_video
from pipeline.probe_media import sniff
from pipeline.read_image import read_image
from schemas.errors import RowError

Size = tuple[int, int]
SizeRule = Callable[[int, int], Size]
ROUNDING_S = 0.00075  # spans are stored in whole milliseconds


def read_frames(
    path: Path,
    start_ms: int,
    end_ms: int,
    *,
    fps: float | None = None,
    num_frames: int | None = None,
    decoder: str = "pyav",
    size: Size | SizeRule | None = None,
    max_pixels: int | None = None,
    on_frame: Callable[[Frame], None] | None = None,
) -> NDArray[np.uint8]:
    """A span of a medium -> uint8 [time, height, width, 3], red first, as shown.

    With `fps`, the frames shown at start, start + 1/fps and so on, before the end. With `num_frames`, that many spread
    evenly from the first frame of the span to its last. With neither, every frame. A frame is given again where frames
    are fewer than asked for. An image gives its one frame, whatever was asked. `size` is (height, width) in pixels, or
    a rule that makes it of the native (height, width). Where that changes midway, all frames have the size of the first.
    `on_frame` sees every frame of the span up to the last one given, which is the whole span where it is spread over two
    frames or more: nothing is leapt over for it.

    Raises: RowError with DecodeFailed if no frame lies in the span, or as the decoders say; ValueError if both fps and
        num_frames are given.
    """
    if fps is not None and num_frames is not None:
        raise ValueError("give fps or num_frames, not both")
    if sniff(path) == "image":
        picture = read_image(path, max_pixels).bgr
        if on_frame is not None:
            on_frame(Frame(0, 0, MICROSECOND, lambda: picture))
        return np.stack([_finished(picture, size)])
    start_s, end_s = start_ms / 1000, end_ms / 1000
    with open_video(path, decoder, max_pixels=max_pixels) as reader:
        seen = reader if on_frame is None else _Watched(reader, on_frame, start_s, end_s)
        if fps is None and num_frames is None:
            found = frames_within(seen, start_s, end_s)
        else:
            found = frames_at(seen, moments(start_s, end_s, fps, num_frames), start_s, end_s)
        frames: list[NDArray[np.uint8]] = []
        for frame in found:
            frames.append(_finished(frame.bgr(), frames[0].shape[:2] if frames else size))
    if not frames:
        raise RowError("DecodeFailed", f"{path.name}: no frame between {start_ms} and {end_ms} ms")
    return np.stack(frames)


def frames_within(reader: VideoReader, start_s: float, end_s: float) -> Iterator[Frame]:
    """Frames whose presentation begins inside the span, to the rounding of its edges."""
    reader.seek(start_s)
    for frame in reader:
        if frame.seconds >= end_s - ROUNDING_S:
            return
        if frame.seconds >= start_s - ROUNDING_S:
            yield frame


def moments(start_s: float, end_s: float, fps: float | None, num_frames: int | None) -> list[float]:
    """The seconds, in order, whose pictures are read of a span. An even spread ends at the span's very end: its last frame."""
    if fps is not None:
        count = max(1, int(np.ceil((end_s - start_s - ROUNDING_S) * fps)))
        return [start_s + index / fps for index in range(count)]
    if num_frames == 1:
        return [(start_s + end_s) / 2]
    return [float(moment) for moment in np.linspace(start_s, end_s, num_frames or 0)]


class _Watched(VideoReader):
    """A reader of a span whose frames are all shown to somebody on the way."""

    def __init__(self, reader: VideoReader, on_frame: Callable[[Frame], None], start_s: float, end_s: float) -> None:
        self._reader, self._on_frame = reader, on_frame
        self._first_s, self._end_s = start_s - ROUNDING_S, end_s - ROUNDING_S
        self.fps = reader.fps

    def __iter__(self) -> Iterator[Frame]:
        for frame in self._reader:
            if self._first_s <= frame.seconds < self._end_s:
                self._on_frame(frame)
            yield frame

    def seek(self, seconds: float) -> None:
        """As the reader does."""
        self._reader.seek(seconds)

    def close(self) -> None:
        """As the reader does."""
        self._reader.close()


def frames_at(reader: VideoReader, targets: Sequence[float], start_s: float, end_s: float) -> Iterator[Frame]:
    """Seconds in order, of a span -> for each the frame shown then: the last one begun by it, or the first of the span.

    Reads in one pass from the start of the span, and leaps over what lies between two targets where the decoder knows that
    to be cheaper. Gives fewer frames where the span begins behind the end of the video.
    """
    reader.seek(start_s)
    frames = iter(reader)
    ahead = next(frames, None)
    shown: Frame | None = None
    for target in targets:
        if ahead is not None and ahead.seconds < target and reader.leaps(min(target, end_s - ROUNDING_S)):
            frames = iter(reader)
            ahead = next(frames, None) or ahead
        while (
            ahead is not None
            and ahead.seconds < end_s - ROUNDING_S
            and (shown is None or ahead.seconds <= target + ROUNDING_S)
        ):
            shown, ahead = ahead, next(frames, None)
        if shown is None or (ahead is None and shown.seconds < start_s - 1 / float(reader.fps) - ROUNDING_S):
            return
        yield shown


def _finished(bgr: Image, size: Size | SizeRule | None) -> NDArray[np.uint8]:
    """BGR as shown -> RGB of the size asked for: area mean to shrink, bicubic to grow."""
    import cv2

    if size is not None:
        height, width = size(*bgr.shape[:2]) if callable(size) else size
        shrinks = height * width < bgr.shape[0] * bgr.shape[1]
        if (height, width) != bgr.shape[:2]:
            bgr = cv2.resize(bgr, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)  # type: ignore[assignment]  # uint8 in, uint8 out
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)  # type: ignore[return-value]  # uint8 in, uint8 out
