"""Scene cuts, found while frames go by: PySceneDetect's own detectors, fed frame by frame by whoever decodes.

Paper: Emu3 report, appendix on video data: ContentDetector for cuts and ThresholdDetector for fades. Its thresholds are
not stated; the library's defaults are taken. The cut list equals that of PySceneDetect's own `SceneManager` with both
detectors: this file repeats what the manager does around them (size of the analysed picture, order, sorting), because
the manager insists on decoding by itself.
"""

from array import array
from bisect import bisect_left
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from schemas.recipe import Config, short_hash

if TYPE_CHECKING:
    from scenedetect import FrameTimecode

ANALYSED_LONG_EDGE_PX = 256  # SceneManager's automatic downscale: the longer side becomes this long


class SegmentationConfig(Config):
    """The detectors and their settings."""

    content_threshold: float = Field(27.0, gt=0)  # ours: the paper is silent, this is PySceneDetect's default
    fade_threshold: int = Field(12, ge=0, le=255)  # ours, likewise; mean of the 8-bit channels
    min_scene_len_frames: int = Field(15, ge=0)  # ours, likewise

    @property
    def segmentation_id(self) -> str:
        """Hash of the detectors and their settings."""
        return short_hash({"family": "segmentation", "version": 1, **self.model_dump(mode="json")})


@dataclass(frozen=True)
class Span:
    """Frames [start_frame, end_frame) of a video and the milliseconds at which they are shown."""

    start_frame: int
    end_frame: int
    start_ms: int
    end_ms: int


@dataclass(frozen=True)
class Step:
    """What one frame told the cutter.

    `starts_clip`: a clip is now known to start at this very frame. `late_cuts`: frames before this one at which a clip
    is now known to start after all. `candidate`: a clip may later be found to start at this frame. `dark`: the picture
    is faded out, or was until this frame, so that a fade may later cut anywhere since.
    """

    starts_clip: bool = False
    late_cuts: tuple[int, ...] = ()
    candidate: bool = False
    dark: bool = False


class SceneCutter:
    """Takes every frame of a video once and knows its cuts at the end.

    `fps` is the nominal rate of the header: PySceneDetect measures the least scene length with it, so a wrong rate
    makes a wrong length there and here alike.
    """

    def __init__(self, config: SegmentationConfig, fps: Fraction) -> None:
        from scenedetect import ContentDetector, ThresholdDetector

        self._config = config
        self._fps = fps
        self._content = ContentDetector(config.content_threshold, min_scene_len=config.min_scene_len_frames)
        self._fade = ThresholdDetector(config.fade_threshold, min_scene_len=config.min_scene_len_frames)
        self._cuts: list[FrameTimecode] = []
        self._times = array("d")  # seconds of every frame
        self._size: tuple[int, int] | None = None

    @property
    def num_frames(self) -> int:
        """Frames seen so far."""
        return len(self._times)

    @property
    def content_score(self) -> float:
        """ContentDetector's score of the newest frame: mean change of hue, saturation and brightness, 0 to 255."""
        return self._content._frame_score or 0.0

    def see(self, image: NDArray[np.uint8], pts: int, time_base: Fraction) -> Step:
        """One frame, BGR at full size, and its time -> what it told. Frames of another size than the first are
        counted but not analysed, as PySceneDetect does.
        """
        from scenedetect.common import FrameTimecode, Timecode

        index = len(self._times)
        self._times.append(float(pts * time_base))
        size = (image.shape[1], image.shape[0])
        self._size = self._size or size
        if size != self._size:
            return Step()
        position = FrameTimecode(Timecode(pts, time_base), fps=self._fps)
        small = analysed(image)
        was_dark = self._fade.last_fade["type"] == "out"
        cuts = self._content.process_frame(position, small) + self._fade.process_frame(position, small)
        self._cuts += cuts
        starts = {self._frame_of(cut) for cut in cuts}
        return Step(
            starts_clip=index in starts,
            late_cuts=tuple(sorted(starts - {index})),
            candidate=self.content_score >= self._config.content_threshold,
            dark=was_dark or self._fade.last_fade["type"] == "out",
        )

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

    def spans(self, end_s: float) -> list[Span]:
        """All clips of the video, without gap or overlap. `end_s` is the time at which the last frame ends."""
        starts = [0, *self.cuts()]
        starts_ms = [round(self._times[start] * 1000) for start in starts]
        ends = [*starts[1:], self.num_frames]
        ends_ms = [*starts_ms[1:], max(round(end_s * 1000), starts_ms[-1])]
        return [Span(*edges) for edges in zip(starts, ends, starts_ms, ends_ms, strict=True)]


def analysed(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A frame -> the small frame that SceneManager would hand to its detectors by default."""
    import cv2

    height, width = image.shape[:2]
    factor = max(width, height) / ANALYSED_LONG_EDGE_PX
    if factor <= 1.0:
        return image
    size = (max(1, round(width / factor)), max(1, round(height / factor)))
    return cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)  # type: ignore[return-value]  # uint8 in, uint8 out


def _is_exact(cut: "FrameTimecode") -> bool:
    from scenedetect.common import Timecode

    return isinstance(cut._time, Timecode)
