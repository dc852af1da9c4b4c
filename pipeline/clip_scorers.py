"""All scorers of one pass over a medium: each is served the samples it declared, and answers clip by clip at the end.

Which frames are samples must not depend on what the cutter knows by then: it knows some cuts late (a fade is cut in its
middle, when it is over), and a medium that is scanned in segments has no cutter until all of them are done. So every rule
here looks at a frame and its neighbourhood alone:

- Regular samples lie on a time grid of the medium: the first frame at or after every grid point.
- A clip that begins between grid points begins, but for fades, at a frame whose score reaches the threshold. Such a
  frame is paired with the next regular sample to measure motion, unless they are less than half a step apart.
- A clip that no regular sample lies in is measured at its first frame, or in the dark: those frames are measured where
  another possible cut comes before the next grid point.
- Every minute the text scorer forgets the last picture, so that a segment may begin there.

Values are kept per sample, a few numbers each; frames are not kept.
"""

from bisect import bisect_left
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, Literal, TypeVar

from pipeline import score_motion, score_technical, score_text
from pipeline.camera_motion import PairMotion
from pipeline.decode import Frame
from pipeline.detect_scenes import FrameNumbers
from pipeline.samples import Sample, SampleSpec, shrunk_size, take_sample
from schemas.scores import MOTION, TECHNICAL, TEXT

GRID_TOLERANCE_S = 1e-6
LEAST_PAIR_STEPS = 0.5  # what little moves between pictures closer than this would be scaled up, noise and all
PERIOD_S = 60  # what a scorer remembers of earlier samples does not reach from one period of the medium into the next

V = TypeVar("V")


@dataclass(frozen=True)
class Pick:
    """A sample and why it is one. `since` is the start of a clip that this regular sample may be the second one of."""

    kind: Literal["regular", "start", "dark"]
    frame: int
    sample: Sample
    since: tuple[int, Sample] | None = None


class Picker:
    """Which frames are samples of one declaration. `least_cut_s` is the least time between two cuts of ContentDetector."""

    def __init__(self, spec: SampleSpec, width_px: int, height_px: int, least_cut_s: float) -> None:
        self._size = shrunk_size(width_px, height_px, spec.short_edge_px)
        self._fps = spec.fps
        self._least_cut_s = least_cut_s
        self._point = -1  # the newest point of the grid that has its sample
        self._pending: tuple[int, Sample] | None = None
        self._pending_follows = False  # closely on another candidate
        self._candidate_s = float("-inf")
        self._before: tuple[int, Frame, FrameNumbers] | None = None

    def see(self, index: int, frame: Frame, numbers: FrameNumbers) -> Iterator[Pick]:
        """The next frame -> what it shows to be samples: itself, one before it, or nothing."""
        was_dark = self._before is not None and self._before[2].dark
        if numbers.candidate:
            if self._before is not None and was_dark:
                yield Pick("dark", self._before[0], self._sample(self._before[1]))
            yield from self._passed_over(frame.seconds)
        elif numbers.dark:
            yield from self.finish()
        if self._is_due(frame.seconds):
            sample = self._sample(frame)
            yield Pick("regular", index, sample, self._start_of_pair(frame.seconds))
            self._pending = None
        else:
            if was_dark and not numbers.dark:
                yield Pick("dark", index, self._sample(frame))
            if numbers.candidate:
                self._pending = index, self._sample(frame)
                self._pending_follows = frame.seconds - self._candidate_s < self._least_cut_s
        if numbers.candidate:
            self._candidate_s = frame.seconds
        self._before = index, frame, numbers

    def _is_due(self, seconds: float) -> bool:
        """Whether the frame shown at `seconds` is the first one at or after a point of the grid."""
        point = grid_point(seconds, self._fps)
        is_new = point > self._point
        self._point = max(point, self._point)
        return is_new

    def _start_of_pair(self, seconds: float) -> tuple[int, Sample] | None:
        if self._pending is None or seconds - self._pending[1].seconds < LEAST_PAIR_STEPS / self._fps:
            return None
        return self._pending

    def _passed_over(self, seconds: float) -> Iterator[Pick]:
        """Another candidate came before a regular sample. In the middle of a run of them no clip starts: FlashFilter cuts
        at the first or the last.
        """
        follows = self._pending is not None and self._pending_follows
        if follows and seconds - self._candidate_s < self._least_cut_s:
            self._pending = None
        yield from self.finish()

    def finish(self) -> Iterator[Pick]:
        """The start of a clip that no regular sample may lie in."""
        if self._pending is not None:
            yield Pick("start", *self._pending)
        self._pending = None

    def _sample(self, frame: Frame) -> Sample:
        return take_sample(frame.bgr(), self._size, frame.seconds)


def grid_point(seconds: float, fps: float) -> int:
    """The newest point of the grid at a time."""
    return int((seconds + GRID_TOLERANCE_S) * fps)


@dataclass
class ByFrame(Generic[V]):
    """Values by frame, in order of frames."""

    frames: list[int] = field(default_factory=list)
    values: list[V] = field(default_factory=list)

    def put(self, frame: int, value: V) -> None:
        """Notes the value of a frame, once."""
        place = bisect_left(self.frames, frame)
        if self.frames[place : place + 1] != [frame]:
            self.frames.insert(place, frame)
            self.values.insert(place, value)

    def between(self, start: int, end: int) -> list[V]:
        """Values of frames [start, end)."""
        return self.values[bisect_left(self.frames, start) : bisect_left(self.frames, end)]

    def add(self, later: "ByFrame[V]", offset: int) -> None:
        """Takes in the values of a later part of the medium that counts its frames from `offset`."""
        for frame, value in zip(later.frames, later.values, strict=True):
            self.put(frame + offset, value)


@dataclass
class Measured(Generic[V]):
    """Values of one family. Those of starts and of the dark count only in a clip that has no regular one."""

    regular: ByFrame[V] = field(default_factory=ByFrame)
    start: ByFrame[V] = field(default_factory=ByFrame)
    dark: ByFrame[V] = field(default_factory=ByFrame)

    def put(self, pick: Pick, value: V) -> None:
        """Notes the value of a sample."""
        kinds = {"regular": self.regular, "start": self.start, "dark": self.dark}
        kinds[pick.kind].put(pick.frame, value)

    def within(self, start: int, end: int) -> list[V]:
        """Values of the clip of frames [start, end), in order. A fade's cut is a frame number at the nominal rate, which
        may be off by a frame: where that leaves a clip without any value, it has that of the sample before it.
        """
        return (
            self.regular.between(start, end)
            or self.start.between(start, start + 1)
            or self.dark.between(start, end)
            or self.regular.between(0, start)[-1:]
        )

    def add(self, later: "Measured[V]", offset: int) -> None:
        """Takes in the values of a later part of the medium that counts its frames from `offset`."""
        self.regular.add(later.regular, offset)
        self.start.add(later.start, offset)
        self.dark.add(later.dark, offset)


@dataclass
class Measurements:
    """All that the scorers measured in a medium or a part of it: a few numbers for each sample.

    `flows` have the motion since the regular sample before, None for the first one; `start_flows` that of the first
    regular sample in a clip since the start of the clip, by frame of the start, with the frame of the sample.
    """

    flows: ByFrame[PairMotion | None] = field(default_factory=ByFrame)
    start_flows: ByFrame[tuple[int, PairMotion]] = field(default_factory=ByFrame)
    coverages: Measured[score_text.SampleCoverage] = field(default_factory=Measured)
    technical: Measured[score_technical.TechnicalValues] = field(default_factory=Measured)

    def add(self, later: "Measurements", offset: int) -> None:
        """Takes in what was measured in a later part of the medium that counts its frames from `offset`."""
        self.flows.add(later.flows, offset)
        for start, (frame, flow) in zip(later.start_flows.frames, later.start_flows.values, strict=True):
            self.start_flows.put(start + offset, (frame + offset, flow))
        self.coverages.add(later.coverages, offset)
        self.technical.add(later.technical, offset)

    def scores(self, start_frame: int, end_frame: int, text: score_text.TextConfig) -> dict[str, dict[str, Any]]:
        """Frames [start, end) of one clip -> score table -> its columns, but for clip and scorer."""
        pairs, num_samples = self._pairs(start_frame, end_frame)
        return {
            MOTION.name: asdict(score_motion.summarise(pairs, num_samples)),
            TEXT.name: asdict(score_text.summarise(self.coverages.within(start_frame, end_frame), text.present_min)),
            TECHNICAL.name: score_technical.summarise(self.technical.within(start_frame, end_frame)),
        }

    def _pairs(self, start: int, end: int) -> tuple[list[PairMotion], int]:
        """Motion of the pairs inside a clip, and how many samples they are of."""
        inside = self.flows.between(start, end)
        pairs = [flow for flow in inside[1:] if flow is not None]  # the first reaches into the clip before
        first_pair = [flow for second, flow in self.start_flows.between(start, start + 1) if second < end]
        return first_pair + pairs, max(1, len(first_pair) + len(inside))


class ClipScorers:
    """Takes every frame of a medium, or of a part of it, with its numbers, and measures the samples among them for the
    score tables asked for.
    """

    def __init__(
        self,
        motion: score_motion.MotionConfig,
        text: score_text.TextConfig,
        technical: score_technical.TechnicalConfig,
        size: tuple[int, int],
        least_cut_s: float,
        tables: Collection[str] = (MOTION.name, TEXT.name, TECHNICAL.name),
    ) -> None:
        declared = {MOTION.name: motion.samples, TEXT.name: text.samples, TECHNICAL.name: technical.samples}
        self._specs = {table: spec for table, spec in declared.items() if table in tables}
        self._pickers = {spec: Picker(spec, *size, least_cut_s) for spec in self._specs.values()}
        self._motion = score_motion.MotionScorer(motion)
        self._text_config = text
        self._text: score_text.TextScorer | None = None  # of the period
        self._technical = score_technical.TechnicalScorer(technical)
        self._last_motion: Sample | None = None
        self._last_technical: Sample | None = None
        self._period = -1
        self.measurements = Measurements()

    def see(self, index: int, frame: Frame, numbers: FrameNumbers, *, leads_in: bool = False) -> None:
        """The next frame, and its numbers: measures whatever is now known to be a sample. A frame that only leads in to
        a part of a medium belongs to the part before, which measures it.
        """
        for spec, picker in self._pickers.items():
            for pick in picker.see(index, frame, numbers):
                if leads_in:
                    self._lead_in(spec, pick)
                else:
                    self._measure(spec, pick)

    def finish(self) -> Measurements:
        """What was measured, when all frames have been seen."""
        for spec, picker in self._pickers.items():
            for pick in picker.finish():
                self._measure(spec, pick)
        return self.measurements

    def _lead_in(self, spec: SampleSpec, pick: Pick) -> None:
        if pick.kind == "regular" and spec == self._specs.get(MOTION.name):
            self._last_motion = pick.sample
        if pick.kind == "regular" and spec == self._specs.get(TECHNICAL.name):
            self._last_technical = pick.sample

    def _measure(self, spec: SampleSpec, pick: Pick) -> None:
        found = self.measurements
        if spec == self._specs.get(TEXT.name):
            coverage = self._text_of(pick).coverage(pick.sample.image)
            found.coverages.put(pick, score_text.SampleCoverage(pick.sample.seconds, coverage))
        if spec == self._specs.get(TECHNICAL.name):
            is_regular = pick.kind == "regular"
            found.technical.put(
                pick, self._technical.measure(pick.sample, self._last_technical if is_regular else None)
            )
            self._last_technical = pick.sample if is_regular else self._last_technical
        if spec == self._specs.get(MOTION.name) and pick.kind == "regular":
            before, self._last_motion = self._last_motion, pick.sample
            found.flows.put(pick.frame, self._motion.pair(before, pick.sample) if before else None)
            if pick.since:
                start, first = pick.since
                found.start_flows.put(start, (pick.frame, self._motion.pair(first, pick.sample)))

    def _text_of(self, pick: Pick) -> score_text.TextScorer:
        """The scorer that remembers the regular sample before, where this is one of the same period."""
        if pick.kind != "regular":
            return score_text.TextScorer(self._text_config)
        period = int(pick.sample.seconds // PERIOD_S)
        if self._text is None or period != self._period:
            self._period, self._text = period, score_text.TextScorer(self._text_config)
        return self._text
