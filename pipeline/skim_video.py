"""The cuts of a video without decoding all of it: frames that no other is decoded from are passed over where nothing happens.

Half of the frames of a usual H.264 or HEVC video are needed by no other. Whatever changes for longer than the few of them
that stand between two others shows in those two. What is gone again before the next one, a flash, is new to the coder: it
takes far more bytes than frames like it around it, and the frame is decoded for them. So a frame is passed over if its
packet and the one that it follows are of usual size, and nothing moves much. Where the frames on both sides then differ
by more than half of what makes a cut, or one is dark, the place is decoded again whole, from the key frame before.

`docs/experiments/scan.md` has the cost, and how often the list was that of a whole pass.
"""

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from av.packet import Packet
from av.video.stream import VideoStream

from pipeline.decode_pyav import PacketTimes, PyavReader
from pipeline.frame_meter import SURE_RATIO, FrameMeter
from pipeline.video_part import Part, Segment, scan_part

if TYPE_CHECKING:
    from pipeline.scan_medium import ScanConfig

NUM_SIZES = 16  # packets of a kind that say what is usual
NUM_SIZES_LEAST = 4
USUAL_MOST = 2.0  # times their median
CALM_RATIO = 0.3  # of the threshold of cuts: where frames differ by more, soon they may differ by half of it
AGAIN_ENOUGH = 0.1  # share of all frames to be decoded a second time from which on none is passed over any more
AGAIN_MOST = 0.25  # share from which on one whole pass is cheaper


class Passing:
    """Which packets may be passed over, asked once for each in the order of decoding."""

    def __init__(self, times: PacketTimes) -> None:
        self.is_worth_it = True
        self.is_calm = False  # nothing is known of the first frames
        self._ends = (
            times.origin + times.pts[max(0, len(times.pts) - 2)]
        )  # how long the last frame is shown is told by two
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
        is_usual = len(sizes) >= NUM_SIZES_LEAST and packet.size <= USUAL_MOST * median(sizes)
        if leads:
            self._newest, self._newest_is_usual = pts, is_usual and not packet.is_keyframe
        if not packet.is_keyframe:
            sizes.append(packet.size)
        return self.is_worth_it and self.is_calm and is_usual and self._newest_is_usual and pts < self._ends


def skim_video(path: Path, config: "ScanConfig", times: PacketTimes) -> Part | None:
    """A video and the times of its frames -> the numbers of all of them, those of frames passed over being those around
    them; None where that saves nothing, or frames come at other times than packets said.

    Raises: RowError as the decoders say.
    """
    limits, threshold = config.limits, config.segmentation.content_threshold
    passing = Passing(times)
    doubts: list[tuple[int, int]] = []
    with PyavReader(path, limits.max_pixels, limits.threads, passing) as reader:
        meter = FrameMeter(config.segmentation, repeats=False)
        part: Part | None = None
        for frame in limits.bounded(reader, path):
            if part is None:
                part = Part(frame.size, reader.fps, frame.time_base, reader.decoder)
            index, numbers = bisect_left(times.pts, frame.pts), meter.measure(frame)
            last, is_known = len(part.pts) - 1, index < len(times.pts) and times.pts[index] == frame.pts
            if not is_known or index <= last or numbers.score is None:
                return None
            if index > last + 1:
                before = part.numbers[last]
                if numbers.score >= SURE_RATIO * threshold or numbers.dark != before.dark:
                    doubts.append((last, index))
                    share_again = num_again(doubts, times) / len(times.pts)
                    if share_again > AGAIN_MOST:
                        return None
                    passing.is_worth_it = share_again < AGAIN_ENOUGH
                part.numbers += [replace(numbers, candidate=False)] * (index - last - 1)
            part.pts.extend(times.pts[last + 1 : index + 1])
            part.numbers.append(numbers)
            passing.is_calm = numbers.score < CALM_RATIO * threshold
        if part is None or part.pts != times.pts:
            return None
        part.end_s = reader.end_s
    for segment, last in entered_by_key(doubts, times):
        again = scan_part(path, config, segment)
        if again.pts != times.pts[last + 1 : last + 1 + len(again.pts)]:
            return None
        part.numbers[last + 1 : last + 1 + len(again.pts)] = again.numbers
    return part


def entered_by_key(doubts: Sequence[tuple[int, int]], times: PacketTimes) -> list[tuple[Segment, int]]:
    """Frames between which something may have happened -> segments that hold them, one for all that are reached from the
    same key frame, each with the index of the frame that leads in to it.
    """
    by_key: dict[int, tuple[int, int]] = {}
    for before, after in doubts:
        key = _key_before(before, times)
        by_key[key] = (by_key.get(key, (before, after))[0], after)
    return [
        (Segment(times.pts[before], 1, times.pts[after + 1] if after + 1 < len(times.pts) else None), before)
        for before, after in by_key.values()
    ]


def num_again(doubts: Sequence[tuple[int, int]], times: PacketTimes) -> int:
    """Frames that are decoded to look at those places again."""
    return sum(
        bisect_left(times.pts, segment.end) - _key_before(before, times)
        if segment.end is not None
        else len(times.pts) - _key_before(before, times)
        for segment, before in entered_by_key(doubts, times)
    )


def _key_before(frame: int, times: PacketTimes) -> int:
    """The newest key frame that a frame can be reached from."""
    newest = times.key_pts[max(0, bisect_right(times.key_pts, times.pts[frame]) - 1)]
    return bisect_left(times.pts, newest)
