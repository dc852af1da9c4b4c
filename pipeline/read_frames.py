"""Frames of a clip, read from the original file by seeking. No clip file is ever cut for it."""

from collections.abc import Callable, Iterable, Iterator
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
    a rule that makes it of the native (height, width). `on_frame` sees every frame of the span that is read, up to the last
    one given: that is the whole span where it is spread over two frames or more.

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
        reader.seek(start_s)
        seen = reader if on_frame is None else _shown_to(on_frame, reader, start_s, end_s)
        if fps is None and num_frames is None:
            frames = [_finished(frame.bgr(), size) for frame in _within(seen, start_s, end_s)]
        else:
            targets = moments(start_s, end_s, fps, num_frames)
            frames = list(_frames_at(seen, float(reader.fps), targets, start_s, end_s, size))
    if not frames:
        raise RowError("DecodeFailed", f"{path.name}: no frame between {start_ms} and {end_ms} ms")
    return np.stack(frames)


def frames_within(reader: VideoReader, start_s: float, end_s: float) -> Iterator[Frame]:
    """Frames whose presentation begins inside the span, to the rounding of its edges."""
    reader.seek(start_s)
    yield from _within(reader, start_s, end_s)


def _within(frames: Iterable[Frame], start_s: float, end_s: float) -> Iterator[Frame]:
    for frame in frames:
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


def _shown_to(
    on_frame: Callable[[Frame], None], frames: Iterable[Frame], start_s: float, end_s: float
) -> Iterator[Frame]:
    """The frames, of which those of the span are shown on the way."""
    for frame in frames:
        if start_s - ROUNDING_S <= frame.seconds < end_s - ROUNDING_S:
            on_frame(frame)
        yield frame


def _frames_at(
    frames: Iterable[Frame],
    fps: float,
    targets: list[float],
    start_s: float,
    end_s: float,
    size: Size | SizeRule | None,
) -> Iterator[NDArray[np.uint8]]:
    """The picture shown at each target: that of the last frame begun by then."""
    waiting = iter(targets)
    target = next(waiting, None)
    shown: Frame | None = None
    for frame in frames:
        over = frame.seconds >= end_s - ROUNDING_S
        while target is not None and shown is not None and (over or frame.seconds > target + ROUNDING_S):
            yield _finished(shown.bgr(), size)
            target = next(waiting, None)
        if over or target is None:
            return
        shown = frame
    while target is not None and shown is not None and shown.seconds >= start_s - 1 / fps - ROUNDING_S:
        yield _finished(shown.bgr(), size)
        target = next(waiting, None)


def _finished(bgr: Image, size: Size | SizeRule | None) -> NDArray[np.uint8]:
    """BGR as shown -> RGB of the size asked for: area mean to shrink, bicubic to grow."""
    import cv2

    if size is not None:
        height, width = size(*bgr.shape[:2]) if callable(size) else size
        shrinks = height * width < bgr.shape[0] * bgr.shape[1]
        if (height, width) != bgr.shape[:2]:
            bgr = cv2.resize(bgr, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)  # type: ignore[assignment]  # uint8 in, uint8 out
    return np.ascontiguousarray(bgr[..., ::-1])
