"""The cuts of a video without decoding all of it: frames that no other is decoded from are passed over where nothing happens.

Half of the frames of a usual H.264 or HEVC video are needed by no other. Whatever changes for longer than the few of them
that stand between two others shows in those two. What is gone again before the next one, a flash, is new to the coder: it
mostly takes far more bytes than frames like it around it, and the frame is decoded for them. So a frame is passed over if its
packet and the one that it follows are of usual size, and nothing moves much. Where the frames on both sides then differ by
more than half of what makes a cut, or one is about as dark as a fade, the place is decoded again whole, from the key frame
before. Coders of older formats spend as much on a flash as on any frame: their videos are not skimmed.

A flash of a few frames among noise, or of a plain surface, can be of usual size: then its cuts are missed. So this is done
for those who ask for it.

`docs/experiments/scan.md` has the cost, and how often the list was that of a whole pass.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from av.packet import Packet
from av.video.stream import VideoStream

from pipeline.decode_pyav import PacketTimes, PyavReader
from pipeline.detect_scenes import FrameNumbers, SegmentationConfig
from pipeline.frame_meter import SURE_LEVELS, SURE_RATIO, FrameMeter
from pipeline.video_part import Part, Segment, scan_part

if TYPE_CHECKING:
    from pipeline.scan_medium import ScanConfig

NUM_SIZES = 16  # packets of a kind that say what is usual
NUM_SIZES_LEAST = 4
USUAL_LEAST, USUAL_MOST = 0.5, 2.0  # times their median
CODECS = frozenset({"h264", "hevc"})
CALM_RATIO = 0.3  # of the threshold of cuts: where frames differ by more, soon they may differ by half of it
AGAIN_ENOUGH = 0.1  # share of all frames to be decoded a second time from which on none is passed over any more
AGAIN_MOST = 0.25  # share from which on one whole pass is cheaper


class Passing:
    """Which packets may be passed over, asked once for each in the order of decoding."""

    def __init__(self, times: PacketTimes) -> None:
        self.is_worth_it = True
        self.is_calm = False  # nothing is known of the first frames
        self._origin, self._passed = times.origin, set[int]()
        # How long the last frame is shown is told by the last two.
        self._ends = times.origin + times.pts[max(0, len(times.pts) - 2)]
        self._newest: int | None = None
        self._newest_is_usual = False
        # Frames shown after all before them, and those shown between two that are decoded first: these are far smaller.
        self._sizes: dict[bool, deque[int]] = {leads: deque(maxlen=NUM_SIZES) for leads in (True, False)}

    def __call__(self, packet: "Packet[VideoStream]") -> bool:
        """The next packet -> whether its frame may be left out."""
        pts = packet.pts
        if pts is None:
            return False
        leads = self._newest is None or pts > self._newest
        sizes = self._sizes[leads]
        usual = median(sizes) if len(sizes) >= NUM_SIZES_LEAST else 0
        is_usual = USUAL_LEAST * usual <= packet.size <= USUAL_MOST * usual
        if leads:
            self._newest, self._newest_is_usual = pts, is_usual and not packet.is_keyframe
        if not packet.is_keyframe:
            sizes.append(packet.size)
        may = self.is_worth_it and self.is_calm and is_usual and self._newest_is_usual and pts < self._ends
        if may:
            self._passed.add(pts - self._origin)
        return may

    def came_after(self, pts: Iterable[int]) -> bool:
        """Times of frames that did not come, and of the one that did -> whether all but that one may have been left out."""
        *missing, here = pts
        self._passed.discard(here)
        num_before = len(self._passed)
        self._passed.difference_update(missing)
        return num_before - len(self._passed) == len(missing)


def skim_video(path: Path, config: "ScanConfig", times: PacketTimes) -> Part | None:
    """A video and the times of its frames -> the numbers of all of them, those of frames passed over being those around
    them; None where that saves nothing, or frames come at other times than packets said.

    Raises: RowError as the decoders say.
    """
    limits, threshold = config.limits, config.segmentation.content_threshold
    passing, doubts = Passing(times), Doubts(times)
    with PyavReader(path, limits.max_pixels, limits.threads, passing) as reader:
        if reader.codec not in CODECS:
            return None
        meter = FrameMeter(config.segmentation, repeats=False)
        part: Part | None = None
        for frame in limits.bounded(reader, path):
            if part is None:
                part = Part(frame.size, reader.fps, frame.time_base, reader.decoder)
            index, numbers = bisect_left(times.pts, frame.pts), meter.measure(frame)
            last, is_known = len(part.pts) - 1, index < len(times.pts) and times.pts[index] == frame.pts
            if not is_known or index <= last or numbers.score is None:
                return None
            if not passing.came_after(times.pts[last + 1 : index + 1]):
                return None  # some were lost
            is_dim = _is_dim(numbers, config.segmentation)
            if index > last + 1:
                before = part.numbers[last]
                near_fade = is_dim or _is_dim(before, config.segmentation) or numbers.dark != before.dark
                if numbers.score >= SURE_RATIO * threshold or near_fade:
                    doubts.add(last, index)
                    share_again = doubts.num_again / len(times.pts)
                    if share_again > AGAIN_MOST:
                        return None
                    passing.is_worth_it = share_again < AGAIN_ENOUGH
                part.numbers += [replace(numbers, candidate=False)] * (index - last - 1)
            part.pts.extend(times.pts[last + 1 : index + 1])
            part.numbers.append(numbers)
            passing.is_calm = numbers.score < CALM_RATIO * threshold and not is_dim
        if part is None or part.pts != times.pts:
            return None
        part.end_s = reader.end_s
    for segment, last in doubts.segments():
        again = scan_part(path, config, segment)
        if again.pts != times.pts[last + 1 : last + 1 + len(again.pts)]:
            return None
        part.numbers[last + 1 : last + 1 + len(again.pts)] = again.numbers
    return part


class Doubts:
    """Places where something may have happened between frames, in order: those that are reached from one key frame are
    decoded again as one segment. `num_again` counts the frames that this takes.
    """

    def __init__(self, times: PacketTimes) -> None:
        self.num_again = 0
        self._times = times
        self._by_key: dict[int, tuple[int, int]] = {}

    def add(self, before: int, after: int) -> None:
        """Between these two frames."""
        times = self._times
        key = bisect_left(times.pts, times.newest_key(times.pts[before]))
        known = self._by_key.get(key)
        if known is not None:
            self.num_again -= known[1] + 1 - key
        self._by_key[key] = (before if known is None else known[0], after)
        self.num_again += after + 1 - key

    def segments(self) -> Iterator[tuple[Segment, int]]:
        """Segments, each with the index of the frame that leads in to it."""
        pts = self._times.pts
        for before, after in self._by_key.values():
            yield Segment(pts[before], 1, pts[after + 1] if after + 1 < len(pts) else None), before


def _is_dim(numbers: FrameNumbers, config: SegmentationConfig) -> bool:
    """Whether a frame is about as dark as the threshold of fades, so that one beside it may be on the other side of it."""
    return numbers.mean is not None and abs(numbers.mean - config.fade_threshold) <= SURE_LEVELS
