"""Motion score: how much of the picture moves between samples, by dense optical flow."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.samples import Image, Sample, SampleSpec
from schemas.recipe import Config, short_hash

Preset = Literal["ultrafast", "fast", "medium"]
LEAST_PX = 16  # flow needs patches: smaller pictures are enlarged
LEAST_SHIFT_PX = 2  # at half size; less is found from rest
BETTER_FIT = 0.9  # the share of the difference at rest that must not be left after the shift


class MotionConfig(Config):
    """Dense inverse search flow (DIS, Kroeger et al. 2016) stands in for the paper's RAFT: it needs no weights, runs
    on CPU, and gives the same bits every time.
    """

    samples: SampleSpec = SampleSpec()
    preset: Preset = "fast"  # ours: within 2 % of "medium" on known shifts of 3 pixels and more, at a third of its cost

    @property
    def scorer_id(self) -> str:
        """Hash of family, version and parameters."""
        return short_hash({"family": "motion", "version": 2, **self.model_dump(mode="json")})


@dataclass(frozen=True)
class MotionScores:
    """Columns of `score_motion`. None below two samples: a single picture has no motion."""

    motion: float | None
    motion_max: float | None
    num_samples: int


class MotionScorer:
    """Measures pairs of consecutive samples.

    Paper: Emu3 report, appendix on video data: flow between frames at 2 fps; score = mean flow magnitude over all
    pixels, over the short edge. A pair that is further apart or closer than the sampling step (few frames a second,
    variable rate) counts as motion per step, so that the score does not depend on the frame rate.

    Half a second of a pan exceeds what dense flow finds from rest, so where the two pictures fit better after one
    common shift, flow starts from that shift.
    """

    def __init__(self, config: MotionConfig) -> None:
        import cv2

        preset = {
            "ultrafast": cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST,
            "fast": cv2.DISOPTICAL_FLOW_PRESET_FAST,
            "medium": cv2.DISOPTICAL_FLOW_PRESET_MEDIUM,
        }[config.preset]
        # Two objects: one that was once given a first guess starts later calls without one from what it remembers.
        self._from_rest = cv2.DISOpticalFlow.create(preset)
        self._from_shift = cv2.DISOpticalFlow.create(preset)
        self._step_s = 1 / config.samples.fps

    def pair(self, before: Sample, after: Sample) -> float:
        """Two samples of one size -> mean flow magnitude per sampling step, in short edges."""
        if np.array_equal(before.image, after.image):
            return 0.0
        first, second = _grey(before.image), _grey(after.image)
        shift = common_shift(first, second)
        if shift is None:
            flow = self._from_rest.calc(first, second, None)  # type: ignore[call-overload]  # None: no first guess
        else:
            flow = self._from_shift.calc(first, second, np.full((*first.shape, 2), shift, np.float32))
        magnitude = float(np.sqrt(np.square(flow).sum(axis=2, dtype=np.float32)).mean(dtype=np.float64))
        steps = max(after.seconds - before.seconds, 1e-3) / self._step_s
        return magnitude / float(min(first.shape)) / steps


def common_shift(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> tuple[float, float] | None:
    """Two grey pictures -> the (right, down) pixels by which the first moves as a whole; None where that fits no better
    than rest. By phase correlation at half size.
    """
    import cv2

    small = [cv2.resize(picture, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA) for picture in (first, second)]
    height, width = small[0].shape
    window = cv2.createHanningWindow((width, height), cv2.CV_32F)
    (right, down), _ = cv2.phaseCorrelate(small[0].astype(np.float32), small[1].astype(np.float32), window)
    columns, rows = round(right), round(down)
    if max(abs(columns), abs(rows)) < LEAST_SHIFT_PX or abs(columns) >= width // 2 or abs(rows) >= height // 2:
        return None
    moved = small[0][max(0, -rows) : height - max(0, rows), max(0, -columns) : width - max(0, columns)]
    target = small[1][max(0, rows) : height + min(0, rows), max(0, columns) : width + min(0, columns)]
    if cv2.absdiff(moved, target).mean() >= BETTER_FIT * cv2.absdiff(small[0], small[1]).mean():
        return None
    return 2 * right, 2 * down


def summarise(pairs: Sequence[float], num_samples: int) -> MotionScores:
    """Pair values of one clip -> its scores."""
    if not pairs:
        return MotionScores(None, None, num_samples)
    return MotionScores(float(np.mean(pairs)), max(pairs), num_samples)


def _grey(image: Image) -> NDArray[np.uint8]:
    import cv2

    grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    factor = -(-LEAST_PX // min(grey.shape))
    if factor > 1:
        grey = cv2.resize(grey, None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST)
    return grey  # type: ignore[return-value]  # uint8 in, uint8 out
