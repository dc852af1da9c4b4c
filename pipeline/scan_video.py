"""A video to its numbers: in one pass, in segments by several processes, or skimmed where only its cuts are wanted.

A long video is scanned in segments by several processes. Segments begin at fixed times and not at key frames: each
process seeks to the key frame before, and sees the last frames of the segment before once more, from which it has what it
remembers of them. Numbers are put together in order and the cutter goes over all of them, so cuts and scores are those of
one pass. Times of all frames are known beforehand, from the packets; where a process finds other frames, or other numbers
in the frames that it sees for the second time, the file cannot be entered in its middle, and is scanned in one pass.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.clip_scorers import PERIOD_S, grid_point
from pipeline.decode_pyav import PacketTimes, packet_times
from pipeline.sandbox import SandboxPool
from pipeline.skim_video import skim_video
from pipeline.video_part import Part, Segment, scan_part
from schemas.errors import RowError

if TYPE_CHECKING:
    from pipeline.scan_medium import ScanConfig

SEGMENT_LEAST_S = 2 * PERIOD_S  # entering a segment costs up to a group of pictures, often ten seconds
SEGMENTS_PER_WORKER = 3  # so that no worker waits long for the last one
ENTRY_MOST_S = 30.0  # from the key frame before a segment to its frames: what is decoded twice


def scan_video(path: Path, config: "ScanConfig") -> Part:
    """A video -> its numbers, by several processes where it is long and they find the frames of one pass.

    Raises: RowError as the decoders say.
    """
    workers, limits = config.limits.num_segment_workers, config.limits
    if config.skim and (skimmed := _skimmed(path, config)) is not None:
        return skimmed
    may_divide = workers > 1 and config.decoder == "pyav"
    times = packet_times(path, 2 * SEGMENT_LEAST_S, limits.max_frames) if may_divide else None
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


def _skimmed(path: Path, config: "ScanConfig") -> Part | None:
    """The numbers of a video that is worth skimming and can be."""
    times = packet_times(path, 0.0, config.limits.max_frames)
    if times is None:
        return None
    config.limits.check_length(path.name, len(times.pts), float(times.pts[-1] * times.time_base))
    try:
        return skim_video(path, config, times)
    except RowError:
        return None  # one pass tells what is wrong with the file, if anything is


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
        if (pts[lead_in] - times.newest_key(pts[lead_in])) * time_base > ENTRY_MOST_S:
            return []
        segments.append(Segment(pts[lead_in], start - lead_in, None if end is None else pts[end]))
    return segments


def joined_parts(parts: Iterable[Part], pts: "array[int]") -> Part | None:
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
    return whole if whole is not None and whole.pts == pts else None
