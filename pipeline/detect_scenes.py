"""Scene cuts, decided from a few numbers of every frame: PySceneDetect's own decisions, apart from its measurements.

Paper: Emu3 report, appendix on video data: ContentDetector for cuts and ThresholdDetector for fades. Its thresholds are
not stated; the library's defaults are taken. The cut list equals that of PySceneDetect's own `SceneManager` with both
detectors: this file repeats what the manager does around them (order, sorting), because the manager insists on decoding
by itself. The numbers come from `pipeline.frame_meter`.
"""

from array import array
from bisect import bisect_left
from collections.abc import Collection, Iterable, MutableSequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, isnan, nan
from typing import TYPE_CHECKING, overload

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from schemas.recipe import Config, short_hash

if TYPE_CHECKING:
    from scenedetect import AdaptiveDetector, FrameTimecode


NUM_MARKS = 3  # what a frame is besides its two numbers
ROUNDING_S = 1e-6
ROUNDING_PARTS = 1e-6  # a scene of just the longest length is one part


class AdaptiveConfig(Config):
    """PySceneDetect's AdaptiveDetector: a cut is where the change is several times that of the frames around it."""

    ratio: float = Field(3.0, gt=0)  # its default, as the others
    window_frames: int = Field(2, ge=1)  # on each side
    least_score: float = Field(15.0, gt=0)


class Joined(Config):
    """Which cuts are left out: those across which a scene goes on, by `outback score continuity`."""

    scorer: str
    """A `scorer_id` of `score_continuity`, which scored the clips of the same settings without this one."""
    low: float = Field(ge=-1, le=1)
    """The least `continuity` of a clip that is joined to the one before it."""


class SegmentationConfig(Config):
    """The detectors and their settings."""

    content_threshold: float = Field(27.0, gt=0)  # ours: the paper is silent, this is PySceneDetect's default
    fade_threshold: int = Field(12, ge=0, le=255)  # ours, likewise; mean of the 8-bit channels
    min_scene_len_frames: int = Field(15, ge=0)  # ours, likewise
    adaptive: AdaptiveConfig | None = None  # in the place of the content threshold; costs more
    max_scene_s: float | None = Field(None, ge=2.0)  # a longer scene is divided into equal clips; None keeps it whole
    joined: Joined | None = None

    @property
    def least_score(self) -> float:
        """Change from which on a frame may begin a scene."""
        return self.content_threshold if self.adaptive is None else self.adaptive.least_score

    @property
    def segmentation_id(self) -> str:
        """Hash of the detectors and their settings."""
        settings = self.model_dump(mode="json", exclude_none=True)
        return short_hash({"family": "segmentation", "version": 1, **settings})


@dataclass(frozen=True)
class Span:
    """Frames [start_frame, end_frame) of a video and the milliseconds at which they are shown."""

    start_frame: int
    end_frame: int
    start_ms: int
    end_ms: int


@dataclass(frozen=True, slots=True)
class FrameNumbers:
    """What cuts are decided by. `score` is the change since the last frame and `mean` the brightness, both 0 to 255;
    None where a frame is not analysed, because its size is not that of the first.

    `candidate`: the score reaches the threshold of cuts. `dark`: the mean is below the threshold of fades. `repeats`: the
    frame shows the same as the last one, which no cut is decided by.
    """

    score: float | None
    mean: float | None
    candidate: bool = False
    dark: bool = False
    repeats: bool = False


class NumberRow(MutableSequence[FrameNumbers]):
    """The numbers of many frames, in order, in 17 bytes each: a film of days has ten millions."""

    def __init__(self, numbers: Iterable[FrameNumbers] = ()) -> None:
        self._scores, self._means, self._marks = array("d"), array("d"), array("B")
        self.extend(numbers)

    def __len__(self) -> int:
        return len(self._marks)

    @overload
    def __getitem__(self, index: int) -> FrameNumbers: ...
    @overload
    def __getitem__(self, index: slice) -> "NumberRow": ...
    def __getitem__(self, index: int | slice) -> "FrameNumbers | NumberRow":
        if isinstance(index, slice):
            part = NumberRow()
            part._scores, part._means, part._marks = self._scores[index], self._means[index], self._marks[index]
            return part
        score, mean, marks = self._scores[index], self._means[index], self._marks[index]
        return FrameNumbers(
            None if isnan(score) else score,
            None if isnan(mean) else mean,
            *(bool(marks >> bit & 1) for bit in range(NUM_MARKS)),
        )

    def __setitem__(self, index: int | slice, value: FrameNumbers | Iterable[FrameNumbers]) -> None:
        row = NumberRow([value] if isinstance(value, FrameNumbers) else value)
        place = index if isinstance(index, slice) else slice(index, index + 1)
        self._scores[place], self._means[place], self._marks[place] = row._scores, row._means, row._marks

    def __delitem__(self, index: int | slice) -> None:
        del self._scores[index], self._means[index], self._marks[index]

    def insert(self, index: int, value: FrameNumbers) -> None:
        """Puts one before that at `index`."""
        marks = (value.candidate, value.dark, value.repeats)
        self._scores.insert(index, nan if value.score is None else value.score)
        self._means.insert(index, nan if value.mean is None else value.mean)
        self._marks.insert(index, sum(mark << bit for bit, mark in enumerate(marks)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NumberRow) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # it changes

    @property
    def repeats(self) -> list[bool]:
        """Whether each frame shows the same as the one before."""
        return [bool(marks >> NUM_MARKS - 1) for marks in self._marks]


class SceneCutter:
    """Takes the numbers of every frame of a video in order and knows its cuts at the end.

    `fps` is the nominal rate of the header: PySceneDetect measures the least scene length with it, so a wrong rate
    makes a wrong length there and here alike.
    """

    def __init__(self, config: SegmentationConfig, fps: Fraction) -> None:
        from scenedetect import ThresholdDetector
        from scenedetect.detector import FlashFilter

        self._fps = fps
        self._max_scene_s = config.max_scene_s
        self._content = FlashFilter(FlashFilter.Mode.MERGE, config.min_scene_len_frames)
        self._adaptive = _adaptive_detector(config.adaptive, config.min_scene_len_frames) if config.adaptive else None
        self._fade = ThresholdDetector(config.fade_threshold, min_scene_len=config.min_scene_len_frames)
        self._cuts: list[FrameTimecode] = []
        self._times = array("d")  # seconds of every frame
        self._was_dark: bool | None = None  # None before the first frame that is analysed
        self._merged_until_s: float | None = None  # while changes are taken together
        self._merging_s = float((config.min_scene_len_frames + 2) / fps)

    @property
    def num_frames(self) -> int:
        """Frames seen so far."""
        return len(self._times)

    def see(self, numbers: FrameNumbers, pts: int, time_base: Fraction) -> None:
        """The numbers of the next frame and its time. A frame that was not analysed is only counted.

        Detectors are shown the frames that change what they know, a few of each clip: their times cost more than ours.
        """
        from scenedetect.common import FrameTimecode, Timecode

        seconds = pts * time_base.numerator / time_base.denominator
        self._times.append(seconds)
        if numbers.mean is None:
            return
        turns = numbers.dark != self._was_dark
        if numbers.candidate:
            self._merged_until_s = seconds + self._merging_s
        if not turns and self._merged_until_s is None and self._adaptive is None:
            return
        if self._merged_until_s is not None and seconds > self._merged_until_s:
            self._merged_until_s = None  # the first frame after it ends it, however late
        position = FrameTimecode(Timecode(pts, time_base), fps=self._fps)
        if self._adaptive is None:
            self._cuts += self._content.filter(position, numbers.candidate)
        else:
            self._cuts += self._adaptive.process_frame(position, np.array([numbers.score]))
        if turns:
            # The detector takes the mean of a picture: a picture of one number has that mean.
            self._cuts += self._fade.process_frame(position, np.array([numbers.mean]))
            self._was_dark = numbers.dark

    def _frame_of(self, cut: "FrameTimecode") -> int:
        """A detector's timecode -> the index of the first frame of the new clip.

        A cut of ContentDetector carries the time of its frame. ThresholdDetector gives a frame number at the nominal
        rate, which where the true rate varies is a time: the first frame at or after it starts the clip.
        """
        half_step = 0.0 if _is_exact(cut) else 0.5 / float(self._fps)
        return min(bisect_left(self._times, cut.seconds - half_step), len(self._times) - 1)

    def timecodes(self) -> list["FrameTimecode"]:
        """The cuts as PySceneDetect lists them: unique, in order."""
        return sorted(set(self._cuts))

    def cuts(self) -> list[int]:
        """First frame of every clip but the first, in order."""
        return sorted({self._frame_of(cut) for cut in self._cuts} - {0})

    def spans(self, end_s: float, left_out: Collection[int] = ()) -> list[Span]:
        """All clips of the video, without gap or overlap. `end_s` is the time at which the last frame ends, `left_out` are
        first frames of clips that are joined to the ones before them.
        """
        starts = self._divided([0, *(cut for cut in self.cuts() if cut not in left_out)], end_s)
        starts_ms = [round(self._times[start] * 1000) for start in starts]
        ends = [*starts[1:], self.num_frames]
        ends_ms = [*starts_ms[1:], max(round(end_s * 1000), starts_ms[-1])]
        return [Span(*edges) for edges in zip(starts, ends, starts_ms, ends_ms, strict=True)]

    def _divided(self, starts: list[int], end_s: float) -> list[int]:
        """First frames of scenes -> those of clips: a scene longer than the longest allowed is cut into equal parts."""
        if self._max_scene_s is None:
            return starts
        ends_s = [*(self._times[start] for start in starts[1:]), end_s]
        found = set(starts)
        for start, scene_end_s in zip(starts, ends_s, strict=True):
            begin_s = self._times[start]
            length_s = scene_end_s - begin_s
            num_parts = ceil(length_s / self._max_scene_s - ROUNDING_PARTS)
            edges_s = (begin_s + length_s * part / num_parts for part in range(1, num_parts))
            found.update(bisect_left(self._times, edge_s - ROUNDING_S) for edge_s in edges_s)
        return sorted(found - {self.num_frames})


def _adaptive_detector(config: AdaptiveConfig, min_scene_len_frames: int) -> "AdaptiveDetector":
    """PySceneDetect's detector, which is shown scores in the place of pictures."""
    from scenedetect import AdaptiveDetector

    class OfScores(AdaptiveDetector):  # type: ignore[misc]  # scenedetect is not typed
        def _calculate_frame_score(self, timecode: "FrameTimecode", frame_img: NDArray[np.float64]) -> float:
            return float(frame_img[0])

    return OfScores(config.ratio, min_scene_len_frames, config.window_frames, config.least_score)


def _is_exact(cut: "FrameTimecode") -> bool:
    from scenedetect.common import Timecode

    return isinstance(cut._time, Timecode)
