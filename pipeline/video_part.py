"""The frames of a video, or of a segment of it, to numbers: those that decide its cuts, and those of its samples."""

from array import array
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.clip_scorers import ClipScorers, Measurements
from pipeline.decode import Frame, Size, VideoReader, open_video
from pipeline.detect_scenes import NumberRow, SceneCutter, SegmentationConfig, Span
from pipeline.frame_meter import FrameMeter
from schemas.errors import RowError

if TYPE_CHECKING:
    from pipeline.scan_medium import ScanConfig


@dataclass(frozen=True)
class Segment:
    """Frames with lead_in <= pts < end, of which the first `num_lead_in` belong to the segment before. Times are in units
    of the stream from its first frame; an end of None is that of the video.
    """

    lead_in: int
    num_lead_in: int
    end: int | None


@dataclass
class Part:
    """What the frames of a video, or of a segment, told. `lead_in` has the numbers of frames before it."""

    size: Size
    fps: Fraction
    time_base: Fraction
    decoder: str
    pts: "array[int]" = field(default_factory=lambda: array("q"))
    numbers: NumberRow = field(default_factory=NumberRow)
    lead_in: NumberRow = field(default_factory=NumberRow)
    measurements: Measurements = field(default_factory=Measurements)
    end_s: float = 0.0

    def add(self, later: "Part") -> None:
        """Takes in the part that follows."""
        self.measurements.add(later.measurements, len(self.pts))
        self.pts += later.pts
        self.numbers += later.numbers
        self.end_s = later.end_s

    def cutter(self, config: SegmentationConfig) -> SceneCutter:
        """What knows the cuts of the whole video."""
        cutter = SceneCutter(config, self.fps)
        for pts, numbers in zip(self.pts, self.numbers, strict=True):
            cutter.see(numbers, pts, self.time_base)
        return cutter

    def spans(self, config: SegmentationConfig, left_out: Collection[int] = ()) -> list[Span]:
        """The clips of the whole video, without the cuts before the frames that are left out."""
        return self.cutter(config).spans(self.end_s, left_out)


def scan_part(path: Path, config: "ScanConfig", segment: Segment | None = None) -> Part:
    """The frames of a segment, or all of them -> their numbers.

    Raises: RowError as the decoders say, or NotSeekable if the frames that lead in cannot be reached by a seek.
    """
    limits = config.limits
    with open_video(path, config.decoder, max_pixels=limits.max_pixels, threads=limits.threads) as reader:
        frames = limits.bounded(_frames_of(reader, segment) if segment else reader, path)
        first = next(frames, None)
        if first is None:
            raise RowError("DecodeFailed", f"{path.name}: no frame decodes")
        part = Part(first.size, reader.fps, first.time_base, reader.decoder)
        meter = FrameMeter(config.segmentation, repeats="technical" in config.families)
        # FlashFilter counts frame numbers at the nominal rate, rounded.
        least_cut_s = float(max(0, config.segmentation.min_scene_len_frames - 1) / reader.fps)
        scorers = ClipScorers(config.motion, config.text, config.technical, first.size, least_cut_s, config.scorer_ids)
        num_lead_in = segment.num_lead_in if segment else 0
        for index, frame in enumerate(chain([first], frames), start=-num_lead_in):
            numbers = meter.measure(frame)
            scorers.see(index, frame, numbers, leads_in=index < 0)
            if index < 0:
                part.lead_in.append(numbers)
            else:
                part.pts.append(frame.pts)
                part.numbers.append(numbers)
        part.measurements, part.end_s = scorers.finish(), reader.end_s
        return part


def _frames_of(reader: VideoReader, segment: Segment) -> Iterator[Frame]:
    """Frames of a segment and those that lead in."""
    for frame in _entered(reader, segment.lead_in):
        if segment.end is not None and frame.pts >= segment.end:
            return
        if frame.pts >= segment.lead_in:
            yield frame


def _entered(reader: VideoReader, pts: int) -> Iterator[Frame]:
    """Frames from a key frame at or before `pts` on. A reader that had to start over counts its frames."""
    frames = iter(reader)
    if pts == 0:
        return frames
    seconds = float(pts * next(frames).time_base)
    reader.seek(seconds)
    frames = iter(reader)
    first = next(frames, None)
    if first is None or first.index is not None:
        raise RowError("NotSeekable", f"no key frame is found before {seconds:.2f} s")
    return chain([first], frames)
