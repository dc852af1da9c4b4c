"""The few numbers of a frame that scene cuts are decided by, exact only where a decision hangs on them.

PySceneDetect decides on the change of hue, saturation and brightness of a small picture, and on its mean. Most frames
are nowhere near either threshold. So both numbers are first estimated from a sketch: every other pixel of that small
picture, taken out of the planes of the decoded frame without converting it. Where an estimate does not settle on which
side of its threshold the number lies, and where no sketch can be had, the frame and the one before are converted whole,
and the numbers are PySceneDetect's to the last bit. `docs/experiments/scan.md` has the distance of estimates from them.
"""

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipeline.decode import Frame, Image, Size
from pipeline.detect_scenes import FrameNumbers, SegmentationConfig
from pipeline.score_technical import is_repeat, repeat_lines

ANALYSED_LONG_EDGE_PX = 256  # SceneManager's automatic downscale: the longer side becomes this long
SKETCH_LEAST_PX = 640 * 360  # smaller frames are converted whole in the time that a sketch takes
SURE_RATIO = 0.5  # an estimated score below this share of the threshold is no cut
SKETCHED_THRESHOLD_LEAST = 10.0  # below, what a sketch leaves out is as large as what it is held against
SURE_LEVELS = 6.0  # an estimated mean this far from the threshold of fades is on its side of it
DARK_LEVELS = 24.0  # below this mean, one level more or less of one channel is another hue and full saturation


class FrameMeter:
    """Takes the frames of a video in order. Keeps the last one, to convert it if the next one is in doubt."""

    def __init__(self, config: SegmentationConfig, *, repeats: bool = True) -> None:
        self._repeats = repeats  # whether repeated frames are told
        self._cut_threshold = config.least_score
        # The adaptive detector weighs every score against those around it.
        self._estimates = config.adaptive is None and config.content_threshold >= SKETCHED_THRESHOLD_LEAST
        self._fade_threshold = config.fade_threshold
        self._size: Size | None = None
        self._before: _Seen | None = None

    def measure(self, frame: Frame) -> FrameNumbers:
        """The next frame -> its numbers. The first one has score 0, as in PySceneDetect."""
        size = frame.size
        self._size = self._size or size
        if size != self._size:
            return FrameNumbers(None, None)
        seen = _Seen(frame)
        score, mean = self._score(self._before, seen), self._mean(seen)
        repeats = self._repeats and self._before is not None and is_repeat(self._before.lines, seen.lines)
        self._before = seen
        return FrameNumbers(score, mean, score >= self._cut_threshold, mean < self._fade_threshold, repeats)

    def _score(self, before: "_Seen | None", seen: "_Seen") -> float:
        if before is None:
            return 0.0
        if self._estimates and before.is_sketchable and seen.is_sketchable:
            estimate = hsv_score(before.sketch_hsv, seen.sketch_hsv)
            if estimate < SURE_RATIO * self._cut_threshold:
                return estimate
        return hsv_score(before.hsv, seen.hsv)

    def _mean(self, seen: "_Seen") -> float:
        if seen.is_sketchable and abs(seen.sketch_mean - self._fade_threshold) > SURE_LEVELS:
            return seen.sketch_mean
        return float(np.mean(seen.analysed))


class _Seen:
    """One frame, and what is made of it when it is asked for."""

    def __init__(self, frame: Frame) -> None:
        self._frame = frame

    @cached_property
    def sketch(self) -> Image | None:
        width, height = self._frame.size
        if width * height < SKETCH_LEAST_PX:
            return None
        return self._frame.sketch(sketch_size(width, height))

    @cached_property
    def sketch_mean(self) -> float:
        import cv2

        return 0.0 if self.sketch is None else sum(cv2.mean(self.sketch)[:3]) / 3

    @property
    def is_sketchable(self) -> bool:
        return self.sketch_mean >= DARK_LEVELS

    @cached_property
    def sketch_hsv(self) -> Image:
        return _hsv(self.sketch)

    @cached_property
    def analysed(self) -> Image:
        return analysed(self._frame.bgr())

    @cached_property
    def lines(self) -> Image:
        return repeat_lines(self.analysed if self.sketch is None else self.sketch)

    @cached_property
    def hsv(self) -> Image:
        return _hsv(self.analysed)


def analysed(image: Image) -> Image:
    """A frame -> the small frame that SceneManager would hand to its detectors by default."""
    import cv2

    height, width = image.shape[:2]
    size = analysed_size(width, height)
    if size == (width, height):
        return image
    return cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)  # type: ignore[return-value]  # uint8 in, uint8 out


def analysed_size(width: int, height: int) -> Size:
    """The (width, height) at which SceneManager analyses frames of this size."""
    factor = max(width, height) / ANALYSED_LONG_EDGE_PX
    if factor <= 1.0:
        return width, height
    return max(1, round(width / factor)), max(1, round(height / factor))


def sketch_size(width: int, height: int) -> Size:
    """Half the analysed size."""
    small_width, small_height = analysed_size(width, height)
    return max(1, small_width // 2), max(1, small_height // 2)


def hsv_score(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> float:
    """Two HSV pictures of one size -> ContentDetector's frame score with its default weights, in its own arithmetic."""
    import cv2

    num_pixels = float(before.shape[0] * before.shape[1])
    hue, saturation, brightness = (total / num_pixels for total in cv2.sumElems(cv2.absdiff(before, after))[:3])
    return (hue + saturation + brightness) / 3.0


def _hsv(image: Image | None) -> Image:
    import cv2

    if image is None:
        raise RuntimeError("a frame without a sketch has no hue of one")
    return cv2.cvtColor(image, cv2.COLOR_BGR2HSV)  # type: ignore[return-value]  # uint8 in, uint8 out
