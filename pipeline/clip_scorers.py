"""All scorers of one pass over a medium: each is served the samples it declared, and answers clip by clip at the end.

A clip of any length has at least one sample. Samples lie on a time grid that starts anew at every cut known at once.
For a clip that the grid misses, because its start or end became known late, a spare sample was taken at the frames that
such clips must contain: the first frame after a cut of ContentDetector; the last frame before one while the picture was
faded out; and the frame at which a fade was over.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, Generic, TypeVar

from pipeline import score_motion, score_technical, score_text
from pipeline.camera_motion import PairMotion
from pipeline.detect_scenes import Step
from pipeline.samples import Image, Sample, SampleSpec, shrunk_size, take_sample
from schemas.scores import MOTION, TECHNICAL, TEXT

GRID_TOLERANCE_S = 1e-6
REMEMBERED_CANDIDATES = 64  # ContentDetector cuts at most its least scene length late: 15 frames by default

V = TypeVar("V")


class Grid:
    """When samples of one declaration are due, and how large they are."""

    def __init__(self, spec: SampleSpec, width_px: int, height_px: int) -> None:
        self.size = shrunk_size(width_px, height_px, spec.short_edge_px)
        self._step_s = 1 / spec.fps
        self._next_s = 0.0

    def is_due(self, seconds: float, *, restart: bool) -> bool:
        """Whether the frame shown at `seconds` is a sample: the first one at or after every grid point."""
        if restart:
            self._next_s = seconds
        if seconds < self._next_s - GRID_TOLERANCE_S:
            return False
        passed = int((seconds - self._next_s + GRID_TOLERANCE_S) / self._step_s)
        self._next_s += (passed + 1) * self._step_s
        return True


class Measured(Generic[V]):
    """Values of one family by frame. Spare ones count only in a span that has no regular one."""

    def __init__(self) -> None:
        self._regular: list[tuple[int, V]] = []
        self._spare: list[tuple[int, V]] = []

    def add(self, frame: int, value: V, *, spare: bool) -> None:
        """Notes the value of a frame."""
        insort(self._spare if spare else self._regular, (frame, value), key=_frame)

    def within(self, start: int, end: int) -> list[V]:
        """Values of frames [start, end), in order."""
        for values in (self._regular, self._spare):
            first = bisect_left(values, start, key=_frame)
            last = bisect_left(values, end, key=_frame)
            if first < last:
                return [value for _, value in values[first:last]]
        return []


class ClipScorers:
    """Takes every frame of a medium with what the cutter made of it, and keeps a few numbers per sample."""

    def __init__(
        self,
        motion: score_motion.MotionConfig,
        text: score_text.TextConfig,
        technical: score_technical.TechnicalConfig,
        size: tuple[int, int],
    ) -> None:
        self._specs = {MOTION.name: motion.samples, TEXT.name: text.samples, TECHNICAL.name: technical.samples}
        self._grids = {spec: Grid(spec, *size) for spec in self._specs.values()}
        self._motion = score_motion.MotionScorer(motion)
        self._text = score_text.TextScorer(text)
        self._text_present_min = text.present_min
        self._technical = score_technical.TechnicalScorer(technical)
        self._flows: Measured[PairMotion | None] = Measured()
        self._coverages: Measured[score_text.SampleCoverage] = Measured()
        self._values: Measured[score_technical.TechnicalValues] = Measured()
        self._last_motion: Sample | None = None
        self._last_technical: Sample | None = None
        self._repeats = score_technical.RepeatedFrames()
        self._last: tuple[int, float, Image] | None = None
        self._candidates: OrderedDict[int, dict[SampleSpec, Sample]] = OrderedDict()

    def see(self, frame: int, seconds: float, image: Image, step: Step) -> None:
        """One frame at full size, BGR, and the cutter's word on it: measures whatever became due."""
        self._repeats.see(image)
        for spec, grid in self._grids.items():
            if grid.is_due(seconds, restart=step.starts_clip):
                self._measure(frame, {spec: take_sample(image, grid.size, seconds)}, spare=False)
        if step.starts_clip and step.dark and self._last is not None:
            self._measure(self._last[0], self._shrunk(*self._last[1:]), spare=True)
        for cut in step.late_cuts:
            if cut in self._candidates:
                self._spare_candidates((cut - 1, cut))
            else:
                self._measure(frame, self._shrunk(seconds, image), spare=True)
        if step.candidate:
            self._remember(frame, seconds, image, step)
        self._last = (frame, seconds, image)

    def _remember(self, frame: int, seconds: float, image: Image, step: Step) -> None:
        if step.dark and self._last is not None:
            self._candidates[self._last[0]] = self._shrunk(*self._last[1:])
        self._candidates[frame] = self._shrunk(seconds, image)
        while len(self._candidates) > REMEMBERED_CANDIDATES:
            self._candidates.popitem(last=False)

    def _spare_candidates(self, frames: Iterable[int]) -> None:
        for frame in frames:
            if frame in self._candidates:
                self._measure(frame, self._candidates[frame], spare=True)

    def _shrunk(self, seconds: float, image: Image) -> dict[SampleSpec, Sample]:
        return {spec: take_sample(image, grid.size, seconds) for spec, grid in self._grids.items()}

    def _measure(self, frame: int, samples: dict[SampleSpec, Sample], *, spare: bool) -> None:
        for family, spec in self._specs.items():
            if spec not in samples:
                continue
            sample = samples[spec]
            if family == TEXT.name:
                coverage = score_text.SampleCoverage(sample.seconds, self._text.coverage(sample.image))
                self._coverages.add(frame, coverage, spare=spare)
            elif family == TECHNICAL.name:
                before = None if spare else self._last_technical
                self._last_technical = self._last_technical if spare else sample
                self._values.add(frame, self._technical.measure(sample, before), spare=spare)
            elif spare:
                self._flows.add(frame, None, spare=True)  # spares are off the grid: no pair has the step between them
            else:
                before, self._last_motion = self._last_motion, sample
                self._flows.add(frame, self._motion.pair(before, sample) if before else None, spare=False)

    def scores(self, start_frame: int, end_frame: int) -> dict[str, dict[str, Any]]:
        """Frames [start, end) of one clip -> score table -> its columns, but for clip and scorer."""
        flows = self._flows.within(start_frame, end_frame)
        pairs = [flow for flow in flows[1:] if flow is not None]  # the first pair reaches into the clip before
        return {
            MOTION.name: asdict(score_motion.summarise(pairs, len(flows))),
            TEXT.name: asdict(
                score_text.summarise(self._coverages.within(start_frame, end_frame), self._text_present_min)
            ),
            TECHNICAL.name: {
                **score_technical.summarise(self._values.within(start_frame, end_frame)),
                "repeated_ratio": self._repeats.ratio(start_frame, end_frame),
            },
        }


def _frame(entry: tuple[int, Any]) -> int:
    return entry[0]
