"""Opening a video with one of several decoders, and the frames every one of them gives.

All decoders give the same thing: frames in presentation order, in the orientation a player shows, as BGR bytes, with
the time of the first frame as zero. A decoder that cannot open a file or decode its first frame hands over to the next,
and the reader says which one served.
"""

import hashlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from schemas.errors import ConfigError, RowError

Image = NDArray[np.uint8]
"""One picture: uint8 [height, width, 3], blue first as OpenCV has it."""

Size = tuple[int, int]
"""(width, height) in pixels."""

CustomDecoder = Callable[[Path], Iterable[tuple[float, Image]]]
"""A decoder of the user's own: a path -> (seconds, BGR image as shown) in presentation order."""

BUILT_IN = ("pyav", "opencv", "decord")
MICROSECOND = Fraction(1, 1_000_000)
FALLBACK_FPS = Fraction(25)  # nominal rate of a stream that states none and has a single frame


class Frame:
    """One frame of a video: its place, its time, and its picture on demand.

    `pts` counts `time_base` units from the first frame of the video. `index` counts frames in presentation order and is
    None after a seek, where it cannot be known. Pictures nobody asks for are not converted; one that was is kept.
    """

    __slots__ = ("_convert", "_image", "index", "pts", "time_base")

    def __init__(self, index: int | None, pts: int, time_base: Fraction, convert: Callable[[], Image]) -> None:
        self.index = index
        self.pts = pts
        self.time_base = time_base
        self._convert = convert
        self._image: Image | None = None

    @property
    def seconds(self) -> float:
        """Presentation time in seconds after the first frame of the video."""
        return self.pts * self.time_base.numerator / self.time_base.denominator

    @property
    def size(self) -> Size:
        """Of the picture as shown."""
        height, width = self.bgr().shape[:2]
        return width, height

    def bgr(self) -> Image:
        """The picture as shown: uint8 [height, width, 3], blue first."""
        if self._image is None:
            self._image = self._convert()
        return self._image

    def update_digest(self, digest: "hashlib._Hash") -> None:
        """Takes size and pixels of the picture, as they were decoded, into a hash."""
        digest.update(str(self.size).encode())
        digest.update(self.bgr().tobytes())

    def sketch(self, size: Size) -> Image | None:
        """A rough picture of this size, where the decoder has one for much less than `bgr` costs."""
        return None


class VideoReader(ABC):
    """An open video whose first frame is known to decode. Iterating gives the frames that are left.

    `decoder` names what serves, `fps` is the nominal rate of the header and may be wrong. `width_px` and `height_px`
    are those of the first frame as shown, `rotation_deg` the counter-clockwise turn that was applied to it (0 where a
    decoder does not say). `end_s` is the time at which the newest frame given so far stops being shown.
    """

    decoder: str
    fps: Fraction
    width_px: int
    height_px: int
    rotation_deg: int = 0
    end_s: float = 0.0

    @abstractmethod
    def __iter__(self) -> Iterator[Frame]:
        """Frames in presentation order, from the current place to the end.

        Raises: RowError if the stream breaks before its end.
        """

    @abstractmethod
    def seek(self, seconds: float) -> None:
        """Moves so that iteration starts at or before the frame shown at `seconds`."""

    def leaps(self, seconds: float) -> bool:
        """Seeks forward as `seek` does, where the decoder knows that this costs less than the frames between; whether it did.
        Iteration has to begin anew then.
        """
        return False

    @abstractmethod
    def close(self) -> None:
        """Gives back files and memory."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_video(path: Path, decoder: str = "pyav", *, max_pixels: int | None = None, threads: int = 1) -> VideoReader:
    """A file -> a reader served by `decoder`, or by the next built-in one that decodes the first frame.

    `decoder` is pyav, opencv, decord, or "module:function" for a decoder of the user's own. That one has no stand-in:
    whoever names it wants its frames or its error.

    Raises: RowError(DecodeFailed) if no decoder gives a frame, RowError(TooManyPixels) if frames are too large;
        ConfigError if there is no such decoder.
    """
    path = path.absolute()  # FFmpeg takes a leading dash for an option and `name:` for a protocol
    if ":" in decoder:
        return CustomReader(path, decoder, load_custom_decoder(decoder), max_pixels)
    check_decoder(decoder)
    failures = []
    for name in (decoder, *(other for other in BUILT_IN if other != decoder)):
        try:
            return _open_with(name, path, max_pixels, threads)
        except RowError as error:
            if error.reason in ("TooManyPixels", "Playlist"):
                raise
            failures.append(f"{name}: {error.message}")
    raise RowError("DecodeFailed", f"{path.name}: no decoder gives a first frame; " + "; ".join(failures))


def check_decoder(decoder: str) -> None:
    """Raises: ConfigError if `decoder` is neither a built-in name nor a function that can be imported."""
    if ":" in decoder:
        load_custom_decoder(decoder)
    elif decoder not in BUILT_IN:
        raise ConfigError(f"unknown decoder {decoder!r}: use one of {', '.join(BUILT_IN)}, or module:function")


def load_custom_decoder(decoder: str) -> CustomDecoder:
    """The name "module:function" -> the function. Raises: ConfigError if there is none."""
    module, _, function = decoder.partition(":")
    try:
        loaded: CustomDecoder = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"decoder {decoder!r} cannot be imported: {error}") from error
    return loaded


def check_pixels(width: int, height: int, max_pixels: int | None) -> None:
    """Raises: RowError(TooManyPixels) if a picture of this size is larger than allowed."""
    if max_pixels is not None and width * height > max_pixels:
        raise RowError("TooManyPixels", f"{width}x{height} is {width * height} pixels; the limit is {max_pixels}")


def turned(image: Image, rotation_deg: int) -> Image:
    """A stored picture and its counter-clockwise rotation, a multiple of 90 -> the picture as shown."""
    quarters = round(rotation_deg / 90) % 4
    return np.ascontiguousarray(np.rot90(image, quarters)) if quarters else image


def _open_with(name: str, path: Path, max_pixels: int | None, threads: int) -> VideoReader:
    if name == "pyav":
        from pipeline.decode_pyav import PyavReader

        return PyavReader(path, max_pixels, threads)
    if name == "opencv":
        from pipeline.decode_opencv import OpencvReader

        return OpencvReader(path, max_pixels, threads)
    from pipeline.decode_decord import DecordReader

    return DecordReader(path, max_pixels, threads)


class CustomReader(VideoReader):
    """Frames of a user's decoder. A seek starts over: the contract has no random access."""

    def __init__(self, path: Path, name: str, decode: CustomDecoder, max_pixels: int | None) -> None:
        self.decoder = name
        self._path = path
        self._decode = decode
        self._ahead = iter(decode(path))
        first_two = list(islice(self._ahead, 2))
        if not first_two:
            raise RowError("DecodeFailed", f"{path.name}: decoder {name} gives no frame")
        self.height_px, self.width_px = first_two[0][1].shape[:2]
        check_pixels(self.width_px, self.height_px, max_pixels)
        step_s = first_two[-1][0] - first_two[0][0]
        self.fps = Fraction(1 / step_s).limit_denominator(10_000) if step_s > 0 else FALLBACK_FPS
        self._ahead = chain(first_two, self._ahead)
        self._is_fresh = True

    def __iter__(self) -> Iterator[Frame]:
        first: float | None = None
        pictures = self._ahead if self._is_fresh else iter(self._decode(self._path))
        self._is_fresh = False
        for index, (seconds, image) in enumerate(pictures):
            first = seconds if first is None else first
            frame = Frame(index, round((seconds - first) / MICROSECOND), MICROSECOND, lambda image=image: image)  # type: ignore[misc]  # default binds the loop variable
            self.end_s = frame.seconds + float(1 / self.fps)
            yield frame

    def seek(self, seconds: float) -> None:
        """Does nothing: every iteration starts at the first frame, which is before any other."""

    def close(self) -> None:
        """Does nothing: what the decoder holds is its own."""
