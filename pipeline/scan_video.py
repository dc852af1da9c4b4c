"""Frames of a video, or of a segment of it, to numbers: those that decide its cuts, and those of its samples.

A long video is scanned in segments by several processes. Segments begin at fixed times and not at key frames: each
process seeks to the key frame before, and sees the last frames of the segment before once more, from which it has what it
remembers of them. Numbers are put together in order and the cutter goes over all of them, so cuts and scores are those of
one pass. Times of all frames are known beforehand, from the packets; where a process finds other frames, or other numbers
in the frames that it sees for the second time, the file cannot be entered in its middle, and is scanned in one pass.
"""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.clip_scorers import PERIOD_S, ClipScorers, Measurements, grid_point
from pipeline.decode import Frame, Size, VideoReader, open_video
from pipeline.decode_pyav import PacketTimes, packet_times
from pipeline.detect_scenes import FrameNumbers, SceneCutter, SegmentationConfig, Span
from pipeline.frame_meter import FrameMeter
from pipeline.sandbox import SandboxPool
from schemas.errors import RowError

if TYPE_CHECKING:
    from pipeline.scan_medium import ScanConfig

SEGMENT_LEAST_S = 2 * PERIOD_S  # entering a segment costs up to a group of pictures, often ten seconds
SEGMENTS_PER_WORKER = 3  # so that no worker waits long for the last one
ENTRY_MOST_S = 30.0  # from the key frame before a segment to its frames: what is decoded twice


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
    numbers: list[FrameNumbers] = field(default_factory=list)
    lead_in: list[FrameNumbers] = field(default_factory=list)
    measurements: Measurements = field(default_factory=Measurements)
    end_s: float = 0.0

    def add(self, later: "Part") -> None:
        """Takes in the part that follows."""
        self.measurements.add(later.measurements, len(self.pts))
        self.pts += later.pts
        self.numbers += later.numbers
        self.end_s = later.end_s

    def spans(self, config: SegmentationConfig, left_out: Collection[int] = ()) -> list[Span]:
        """The clips of the whole video, without the cuts before the frames that are left out."""
        cutter = SceneCutter(config, self.fps)
        for pts, numbers in zip(self.pts, self.numbers, strict=True):
            cutter.see(numbers, pts, self.time_base)
        return cutter.spans(self.end_s, left_out)


def scan_video(path: Path, config: "ScanConfig") -> Part:
    """A video -> its numbers, by several processes where it is long and they find the frames of one pass.

    Raises: RowError as the decoders say.
    """
    workers, limits = config.limits.num_segment_workers, config.limits
    times = packet_times(path, 2 * SEGMENT_LEAST_S) if workers > 1 and config.decoder == "pyav" else None
    if times:
        limits.check_length(path.name, len(times.pts), float(times.pts[-1] * times.time_base))
    segments = plan_segments(times, config, workers * SEGMENTS_PER_WORKER) if times else []
    if times is None or len(segments) < 2:
        return scan_part(path, config)
    pool = SandboxPool(workers, limits.timeout_s, limits.memory_mb // workers)
    threads = ThreadPoolExecutor(workers)
    try:
        joined = joined_parts(
            threads.map(lambda segment: pool.run(scan_part, path, config, segment), segments), times.pts
        )
    except RowError:
        joined = None  # one pass tells what is wrong with the file, if anything is
    finally:
        threads.shutdown(cancel_futures=True)
        pool.close()
    return joined or scan_part(path, config)


def plan_segments(times: PacketTimes, config: "ScanConfig", num_most: int) -> list[Segment]:
    """Times of all frames -> segments that begin with periods of the scorers, and are led in to by the newest regular
    sample of every declaration. None where a key frame comes so seldom that they would be decoded twice.
    """
    pts, time_base = times.pts, times.time_base
    length_s = float(pts[-1] * time_base)
    count = max(1, min(num_most, int(length_s // SEGMENT_LEAST_S)))
    starts_s = [round(index * length_s / count / PERIOD_S) * PERIOD_S for index in range(count)]
    starts = [bisect_left(pts, start_s / time_base) for start_s in starts_s]
    specs = {config.motion.samples, config.text.samples, config.technical.samples}

    def newest_sample(frame: int, fps: float) -> int:
        while frame > 0 and grid_point(float(pts[frame] * time_base), fps) == grid_point(
            float(pts[frame - 1] * time_base), fps
        ):
            frame -= 1
        return frame

    segments = []
    for start, end in zip(starts, [*starts[1:], None], strict=True):
        lead_in = min(newest_sample(start - 1, spec.fps) for spec in specs) if start else 0
        newest_key = times.key_pts[max(0, bisect_right(times.key_pts, pts[lead_in]) - 1)]
        if (pts[lead_in] - newest_key) * time_base > ENTRY_MOST_S:
            return []
        segments.append(Segment(pts[lead_in], start - lead_in, None if end is None else pts[end]))
    return segments


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
        meter = FrameMeter(config.segmentation)
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


def joined_parts(parts: Iterable[Part], pts: Sequence[int]) -> Part | None:
    """Parts in order and the times of all frames -> the whole; None if the parts do not fit together."""
    whole: Part | None = None
    for part in parts:
        if whole is None:
            whole = part
            continue
        if (part.size, part.time_base, part.decoder) != (whole.size, whole.time_base, whole.decoder):
            return None
        num_seen = len(part.lead_in)
        seen = whole.numbers[-num_seen:]
        # The first has no frame before it to differ from.
        if [one.mean for one in seen] != [one.mean for one in part.lead_in] or seen[1:] != part.lead_in[1:]:
            return None
        whole.add(part)
    return whole if whole is not None and list(whole.pts) == list(pts) else None
