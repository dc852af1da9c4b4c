"""What a medium may ask for: held against its header when it is opened, and against what comes out when it is decoded.

Limits decide whether a medium is read, never what is found in it, so they are no part of the identity of a scan. They are
part of the identity of a failure: what was refused under one limit is tried again under another.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import Field

from pipeline.decode import Frame
from schemas.errors import RowError
from schemas.recipe import Config

GIF_MARKS = (b"GIF87a", b"GIF89a")


class MediaLimits(Config):
    """What one medium may ask for. The largest cameras and the longest films pass, decompression bombs do not."""

    max_pixels: int = Field(120_000_000, gt=0)  # of one frame or picture
    max_frames: int = Field(10_000_000, gt=0)  # of a video: two days at 60 a second
    max_pictures: int = Field(10_000, gt=0)  # of an animated picture, or of a file that holds several
    max_duration_s: float = Field(86_400.0, gt=0)  # of a video

    def check_length(self, name: str, num_frames: int | None, seconds: float | None, *, is_gif: bool = False) -> None:
        """Frames and seconds, None where they are not known -> nothing.

        Raises: RowError with TooManyFrames or TooLong.
        """
        most = min(self.max_frames, self.max_pictures) if is_gif else self.max_frames
        if num_frames is not None and num_frames > most:
            limit = "max_pictures" if most < self.max_frames else "max_frames"
            raise RowError("TooManyFrames", f"{name}: found {num_frames} frames or more; the limit is {limit}={most}")
        if seconds is not None and seconds > self.max_duration_s:
            limit_s = f"max_duration_s={self.max_duration_s:g}"
            raise RowError("TooLong", f"{name}: found {seconds:.0f} s or more; the limit is {limit_s}")

    def bounded(self, frames: Iterable[Frame], path: Path) -> Iterator[Frame]:
        """Frames of a file -> the same frames, for as long as they are within the limits.

        Raises: RowError with TooManyFrames or TooLong at the first frame beyond: a header need not be true.
        """
        gif = False
        for index, frame in enumerate(frames):
            if index == self.max_pictures:
                gif = path.is_file() and is_gif(path)  # a user's decoder may need no file
            self.check_length(path.name, index + 1, frame.seconds, is_gif=gif)
            yield frame


def is_gif(path: Path) -> bool:
    """Whether the content is a GIF, which is read as a video where it moves and may hold as many frames as one."""
    with path.open("rb") as file:
        return file.read(len(GIF_MARKS[0])) in GIF_MARKS
