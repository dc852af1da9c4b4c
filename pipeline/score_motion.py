"""Motion score: how much of the picture moves between samples, by dense optical flow."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.samples import Image, Sample, SampleSpec
from schemas.recipe import Config, short_hash

Preset = Literal["ultrafast", "fast", "medium"]


class MotionConfig(Config):
    """Dense inverse search flow (DIS, Kroeger et al. 2016) stands in for the paper's RAFT: it needs no weights, runs
    on CPU, and gives the same bits every time."""

    samples: SampleSpec = SampleSpec()
    preset: Preset = "medium"  # ours: "fast" loses large displacements

    @property
    def scorer_id(self) -> str:
        """Hash of family, version and parameters."""
        return short_hash({"family": "motion", "version": 1, **self.model_dump(mode="json")})


@dataclass(frozen=True)
class MotionScores:
    """Columns of `score_motion`. None below two samples: a single picture has no motion."""

    motion: float | None
    motion_max: float | None
    num_samples: int


class MotionScorer:
    """Measures pairs of consecutive samples.

    Paper: Emu3 report, appendix on video data: flow between frames at 2 fps; score = mean flow magnitude over all pixels
    over the short edge. A pair that is further apart or closer than the sampling step (few frames a second, variable
    rate) counts as motion per step, so that the score does not depend on the frame rate.
    """

    def __init__(self, config: MotionConfig) -> None:
        import cv2

        presets = {
            "ultrafast": cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST,
            "fast": cv2.DISOPTICAL_FLOW_PRESET_FAST,
            "medium": cv2.DISOPTICAL_FLOW_PRESET_MEDIUM,
        }
        self._flow = cv2.DISOpticalFlow.create(presets[config.preset])
        self._step_s = 1 / config.samples.fps

    def pair(self, before: Sample, after: Sample) -> float:
        """Two samples of one size -> mean flow magnitude per sampling step, in short edges."""
        if np.array_equal(before.image, after.image):
            return 0.0
        flow = self._flow.calc(_grey(before.image), _grey(after.image), None)  # type: ignore[call-overload]  # None: no first guess
        magnitude = float(np.sqrt(np.square(flow).sum(axis=2, dtype=np.float32)).mean(dtype=np.float64))
        steps = max(after.seconds - before.seconds, 1e-3) / self._step_s
        return magnitude / min(before.image.shape[:2]) / steps


def summarise(pairs: Sequence[float], num_samples: int) -> MotionScores:
    """Pair values of one clip -> its scores."""
    if not pairs:
        return MotionScores(None, None, num_samples)
    return MotionScores(float(np.mean(pairs)), max(pairs), num_samples)


def _grey(image: Image) -> NDArray[np.uint8]:
    import cv2

    return cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)  # type: ignore[return-value]  # uint8 in, uint8 out
