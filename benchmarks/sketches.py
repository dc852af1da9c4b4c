"""How near the numbers that a sketch gives come to those of the whole picture, and what each costs.

Usage: python benchmarks/sketches.py --media FOLDER [--most-frames N]

Cuts hang on a score of change and on a mean, which are estimated from a sketch of the frame where that settles them:
`pipeline/frame_meter.py` has the margins that these figures have to leave room for.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import cv2
import numpy as np

from pipeline.decode import Frame, Image, Size, open_video
from pipeline.detect_scenes import SegmentationConfig
from pipeline.frame_meter import DARK_LEVELS, SKETCH_LEAST_PX, FrameMeter, analysed, hsv_score, sketch_size
from schemas.errors import RowError

SCORE_LEAST = 5.0  # where an exact score is smaller, a ratio says nothing


@dataclass(frozen=True)
class Seen:
    """A frame both ways."""

    sketch_hsv: Image
    picture_hsv: Image
    sketch_mean: float
    picture_mean: float


@dataclass
class Found:
    """Of one file: sketches beside pictures, frame by frame, and what both cost."""

    name: str
    ratios: list[float] = field(default_factory=list)  # of scores, between pictures that are not dark
    dark_excess: list[float] = field(default_factory=list)  # of scores, where one of two pictures is dark
    levels: list[float] = field(default_factory=list)  # between means
    sketch_s: list[float] = field(default_factory=list)
    picture_s: list[float] = field(default_factory=list)
    converted: float = 0.0  # share of frames that the meter has converted

    def add(self, before: Seen | None, seen: Seen) -> None:
        """The next frame and the one before it."""
        self.levels.append(seen.sketch_mean - seen.picture_mean)
        if before is None:
            return
        estimate, exact = (
            hsv_score(before.sketch_hsv, seen.sketch_hsv),
            hsv_score(before.picture_hsv, seen.picture_hsv),
        )
        if min(before.sketch_mean, seen.sketch_mean) < DARK_LEVELS:
            self.dark_excess.append(estimate - exact)
        elif exact >= SCORE_LEAST:
            self.ratios.append(estimate / exact)


class Counted(Frame):
    """A frame that knows whether it was converted."""

    def __init__(self, frame: Frame) -> None:
        super().__init__(frame.index, frame.pts, frame.time_base, frame.bgr)
        self._frame = frame
        self.is_converted = False

    @property
    def size(self) -> Size:
        """That of the frame."""
        return self._frame.size

    def bgr(self) -> Image:
        """The picture, which is converted for it."""
        self.is_converted = True
        return super().bgr()

    def sketch(self, size: Size) -> Image | None:
        """That of the frame, which is not converted for it."""
        return self._frame.sketch(size)


def study(path: Path, most_frames: int) -> Found | None:
    """A video -> what was found; None if its frames are too small for a sketch to be made.

    Raises: RowError if it does not decode.
    """
    found, before = Found(path.name), None
    for frame in frames_of(path, most_frames):
        width, height = frame.size
        start = time.perf_counter()
        sketch = frame.sketch(sketch_size(width, height)) if width * height >= SKETCH_LEAST_PX else None
        if sketch is None:
            return None
        between = time.perf_counter()
        picture = analysed(frame.bgr())
        found.sketch_s.append(between - start)
        found.picture_s.append(time.perf_counter() - between)
        seen = Seen(hsv(sketch), hsv(picture), float(np.mean(sketch)), float(np.mean(picture)))
        found.add(before, seen)
        before = seen
    meter = FrameMeter(SegmentationConfig(), repeats=False)
    counted = []
    for frame in frames_of(path, most_frames):
        counted.append(Counted(frame))
        meter.measure(counted[-1])
    found.converted = sum(frame.is_converted for frame in counted) / len(counted)
    return found


def frames_of(path: Path, most: int) -> Iterator[Frame]:
    """The first frames of a video."""
    with open_video(path) as reader:
        yield from islice(reader, most)


def hsv(picture: Image) -> Image:
    """As the score of change takes it."""
    return cv2.cvtColor(picture, cv2.COLOR_BGR2HSV)  # type: ignore[return-value]  # uint8 in, uint8 out


def table(studies: Sequence[Found]) -> str:
    """What the figures are over all files, as Markdown."""
    least = [min(one.ratios) for one in studies if one.ratios]
    most = [max(one.ratios) for one in studies if one.ratios]
    levels = [max(abs(level) for level in one.levels) for one in studies]
    dark = [excess for one in studies for excess in one.dark_excess]
    converted = [one.converted for one in studies]
    dearer = [sum(one.picture_s) / sum(one.sketch_s) for one in studies]
    dearest = max(studies, key=lambda one: np.mean(one.picture_s))
    rows = {
        "estimated over exact score, where that is 5 or more": f"{min(least):.2f} to {max(most):.2f}",
        "the same in most files": f"{np.quantile(least, 0.1):.2f} to {np.quantile(most, 0.9):.2f}",
        "estimated from exact mean, levels of 255": f"{max(levels):.1f} at most, {np.quantile(levels, 0.9):.1f} in most files",
        "scores of dark pictures": f"up to {max(dark):.0f} too high" if dark else "there are none",
        "frames converted": f"{np.median(converted):.1%} in the median file, up to {np.quantile(converted, 0.9):.0%} in most",
        "time of a picture over that of its sketch": f"{np.median(dearer):.0f} in the median file, {max(dearer):.0f} at most",
        "dearest picture": f"{1000 * np.mean(dearest.picture_s):.0f} ms a frame, {dearest.name}",
    }
    return "\n".join(["| | found |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows.items())])


def main() -> None:
    """Study every file, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--media", type=Path, required=True, help="a folder of videos")
    parser.add_argument("--most-frames", type=int, default=400, help="of each video")
    options = parser.parse_args()
    studies = []
    for path in sorted(file for file in options.media.rglob("*") if file.is_file()):
        try:
            found = study(path, options.most_frames)
        except RowError as error:
            print(f"left out: {error}")
            continue
        if found is not None:
            studies.append(found)
    if not studies:
        parser.error(f"found no video in {options.media} whose frames are large enough for a sketch")
    num_frames = sum(len(one.levels) for one in studies)
    print(f"{len(studies)} videos, {num_frames} frames; most files: all but a tenth on each side.\n\n{table(studies)}")


if __name__ == "__main__":
    main()
