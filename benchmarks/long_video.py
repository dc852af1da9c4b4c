"""What a long video takes: memory above that of a scan at its start, and how much faster several processes are than one.

Usage: python benchmarks/long_video.py [--minutes N] [--workers N] [--repeats N] [--text] [--write FILE]

The video is one minute of made scenes, remuxed again and again, at 640x360. Memory is the proportional share of the scan's
process and all that it starts, sampled ten times a second. Both ways of scanning take turns.
"""

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import psutil

from pipeline.scan_medium import ScanConfig, ScanLimits, scan_medium

FPS, SHOT_S, MINUTE_S = 25, 6, 60
SIZE = (640, 360)
SAMPLED_EVERY_S = 0.1


@dataclass(frozen=True)
class Cost:
    """Of one scan."""

    wall_s: float
    cpu_s: float
    peak_mb: float
    digest: str


def make_minute(path: Path) -> None:
    """Ten shots with camera movement and grain, of one group of pictures each second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "g": str(FPS), "bf": "2"})
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        for shot in range(MINUTE_S // SHOT_S):
            rng = np.random.default_rng(shot)
            width, height = SIZE[0] + 2 * FPS * SHOT_S, SIZE[1]
            smooth = cv2.resize(rng.integers(30, 225, (12, 20, 3), dtype=np.uint8), (width, height))
            wide = np.clip(smooth + rng.normal(0, 4, (height, width, 1)), 0, 255).astype(np.uint8)
            for index in range(FPS * SHOT_S):
                part = np.ascontiguousarray(wide[:, 2 * index : 2 * index + SIZE[0]])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(part, format="bgr24")))
        container.mux(stream.encode())


def repeat(minute: Path, path: Path, minutes: int) -> None:
    """The same packets over and over, at later times."""
    with av.open(str(minute)) as source, av.open(str(path), "w") as container:
        stream = source.streams.video[0]
        assert stream.time_base is not None
        packets = [
            (bytes(packet), packet.pts, packet.dts, packet.duration, packet.is_keyframe)
            for packet in source.demux(stream)
            if packet.size
        ]
        length = int(Fraction(MINUTE_S) / stream.time_base)
        made = container.add_stream_from_template(stream)
        for index in range(minutes):
            for data, pts, dts, duration, is_keyframe in packets:
                assert pts is not None
                assert dts is not None
                packet: av.Packet = av.Packet(data)
                packet.pts, packet.dts = pts + index * length, dts + index * length
                packet.duration, packet.time_base, packet.is_keyframe = duration, stream.time_base, is_keyframe
                packet.stream = made
                container.mux(packet)


def step(path: Path, workers: int, families: tuple[str, ...]) -> None:
    """One scan in this process, started by a line on standard input."""
    config = ScanConfig.model_validate({"families": families, "limits": ScanLimits(segment_workers=workers)})
    print("ready", flush=True)
    sys.stdin.readline()
    before, start = os.times(), time.perf_counter()
    result = scan_medium(path, "0123456789abcdef", "video", config)
    wall_s, after = time.perf_counter() - start, os.times()
    rows = json.dumps([result.clips, result.scores, result.scan["cuts"]], sort_keys=True, default=repr)
    spent_s = sum(after[:4]) - sum(before[:4])
    print(json.dumps({"wall_s": wall_s, "cpu_s": spent_s, "digest": hashlib.sha256(rows.encode()).hexdigest()}))


def held_mb(process: psutil.Process) -> float:
    """Memory of a process and its descendants, shared pages counted once."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_full_info().pss
        except psutil.Error:
            continue  # it ended in between
    return total / 2**20


def measured(path: Path, workers: int, families: tuple[str, ...]) -> Cost:
    """One scan in a process of its own."""
    command = [sys.executable, __file__, "--step", str(workers), "--families", *families, "--file", str(path)]
    scan = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert scan.stdin is not None
    assert scan.stdout is not None
    scan.stdout.readline()
    process, peaks, over = psutil.Process(scan.pid), [0.0], threading.Event()
    start_mb = held_mb(process)

    def sample() -> None:
        while not over.wait(SAMPLED_EVERY_S):
            peaks[0] = max(peaks[0], held_mb(process))

    sampler = threading.Thread(target=sample)
    sampler.start()
    scan.stdin.write("\n")
    scan.stdin.flush()
    said = json.loads(scan.stdout.readline())
    over.set()
    sampler.join()
    scan.wait()
    return Cost(said["wall_s"], said["cpu_s"], peaks[0] - start_mb, said["digest"])


def report(options: argparse.Namespace, path: Path) -> str:
    """Measures, and says so in Markdown."""
    families = ("motion", "technical", "text") if options.text else ("motion", "technical")
    ways = (1, options.workers)
    costs: dict[int, list[Cost]] = {workers: [] for workers in ways}
    for _ in range(options.repeats):
        for workers in ways:
            costs[workers].append(measured(path, workers, families))
    walls = {workers: statistics.median(cost.wall_s for cost in costs[workers]) for workers in ways}
    lines = [
        f"{options.minutes} minutes of made 640x360 H.264, {', '.join(families)}, median of {options.repeats}, "
        f"{os.cpu_count()} logical CPUs, Python {platform.python_version()}, av {av.__version__}.",
        "",
        "| processes | wall s | CPU s | most memory above the start, MB | to one process |",
        "|---|---|---|---|---|",
    ]
    for workers in ways:
        cpu_s = statistics.median(cost.cpu_s for cost in costs[workers])
        peak_mb = max(cost.peak_mb for cost in costs[workers])
        ratio = walls[1] / walls[workers]
        lines.append(f"| {workers} | {walls[workers]:.1f} | {cpu_s:.1f} | {peak_mb:.0f} | {ratio:.2f} |")
    is_same = len({cost.digest for found in costs.values() for cost in found}) == 1
    lines += ["", f"All rows are {'the same' if is_same else 'NOT the same'} in every run."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and write where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=int, default=120)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--text", action="store_true", help="look for text too")
    parser.add_argument("--write", type=Path, help="a Markdown file that the result is added to")
    parser.add_argument("--step", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--families", nargs="*", default=(), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        cv2.setNumThreads(1)
        step(options.file, options.step, tuple(options.families))
        return
    with tempfile.TemporaryDirectory() as folder:
        minute, path = Path(folder) / "minute.mp4", Path(folder) / "long.mp4"
        make_minute(minute)
        repeat(minute, path, options.minutes)
        text = report(options, path)
    print(text)
    if options.write:
        with options.write.open("a") as page:
            page.write(f"\n{text}")


if __name__ == "__main__":
    main()
