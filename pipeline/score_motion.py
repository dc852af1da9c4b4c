"""Motion scores by dense optical flow on CPU: how much of the picture moves between samples, and what part is the camera."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.camera_motion import STILL, Flow, PairMotion, mean_magnitude, pair_motion
from pipeline.samples import Image, Sample, SampleSpec
from schemas.recipe import Config, short_hash

LEAST_PX = (
    32  # a patch of 8 at a quarter of the size: below it OpenCV picks other scales by width alone, fails or gives NaN
)
LEAST_SHIFT_PX = 2  # at half size; less is found from rest
BETTER_FIT = 0.9  # the share of the difference at rest that must not be left after the shift
FINE_FLOW_PX = (
    0.25,
    4.0,
)  # mean flow that a quarter of the size gets wrong by up to 5 %: less is noise, more is exact enough


class MotionConfig(Config):
    """Dense inverse search flow (DIS, Kroeger et al. 2016) stands in for the paper's RAFT: it needs no weights, runs
    on CPU, and gives the same bits every time.
    """

    samples: SampleSpec = SampleSpec()

    @property
    def scorer_id(self) -> str:
        """Hash of family, version and parameters."""
        return short_hash({"family": "motion", "version": 3, **self.model_dump(mode="json")})


@dataclass(frozen=True)
class MotionScores:
    """Columns of `score_motion`: means over the pairs. None below two samples: a single picture has no motion."""

    motion: float | None
    motion_max: float | None
    camera_motion: float | None
    object_motion: float | None
    zoom: float | None
    rotation_deg: float | None
    static_ratio: float | None
    num_samples: int


class MotionScorer:
    """Measures pairs of consecutive samples.

    Paper: Emu3 report, appendix on video data: flow between frames at 2 fps; score = mean flow magnitude over all
    pixels, over the short edge. A pair that is further apart or closer than the sampling step (few frames a second,
    variable rate) counts as motion per step, so that the score does not depend on the frame rate.

    Half a second of a pan exceeds what dense flow finds from rest, so where the two pictures fit better after one
    common shift, flow starts from that shift. Flow is first found down to a quarter of the size; slow motion, which
    that misjudges, is found again down to half. Variational refinement is left out: it costs as much as the flow and
    its smoothing takes away from known shifts.
    """

    def __init__(self, config: MotionConfig) -> None:
        self._coarse = _flow(finest_scale=2, iterations=16, stride_px=4)
        self._fine = _flow(finest_scale=1, iterations=12, stride_px=5)
        self._step_s = 1 / config.samples.fps

    def pair(self, before: Sample, after: Sample) -> PairMotion:
        """Two samples of one size -> their motion per sampling step."""
        if np.array_equal(before.image, after.image):
            return STILL
        first, second = enlarged_grey(before.image), enlarged_grey(after.image)
        # Always with a first guess: an object that was once given one starts later calls without one from what it
        # remembers.
        start = np.full((*first.shape, 2), common_shift(first, second) or 0.0, np.float32)
        flow: Flow = self._coarse.calc(first, second, start.copy())
        if FINE_FLOW_PX[0] <= mean_magnitude(flow) <= FINE_FLOW_PX[1]:
            flow = self._fine.calc(first, second, start)
        return pair_motion(flow, first, steps_between(before, after, self._step_s))


def steps_between(before: Sample, after: Sample, step_s: float) -> float:
    """Two samples -> the time between them in sampling steps."""
    return max(after.seconds - before.seconds, 1e-3) / step_s


def _flow(finest_scale: int, iterations: int, stride_px: int) -> Any:
    import cv2

    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    flow.setFinestScale(finest_scale)
    flow.setGradientDescentIterations(iterations)
    flow.setPatchStride(stride_px)
    flow.setVariationalRefinementIterations(0)
    return flow


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


def summarise(pairs: Sequence[PairMotion], num_samples: int) -> MotionScores:
    """Pairs of one clip -> its scores."""
    if not pairs:
        return MotionScores(None, None, None, None, None, None, None, num_samples)

    def mean(name: str) -> float:
        return float(np.mean([getattr(pair, name) for pair in pairs]))

    return MotionScores(
        motion=mean("motion"),
        motion_max=max(pair.motion for pair in pairs),
        camera_motion=mean("camera_motion"),
        object_motion=mean("object_motion"),
        zoom=mean("zoom"),
        rotation_deg=mean("rotation_deg"),
        static_ratio=mean("static_ratio"),
        num_samples=num_samples,
    )


def enlarged_grey(image: Image) -> NDArray[np.uint8]:
    """A picture -> its brightness, enlarged where it is too small for flow."""
    import cv2

    grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    factor = -(-LEAST_PX // min(grey.shape))
    if factor > 1:
        grey = cv2.resize(grey, None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST)
    return grey  # type: ignore[return-value]  # uint8 in, uint8 out
