"""What finding cuts and the whole scan cost, against the `scenedetect` program and bare decoding.

Usage: python benchmarks/scan.py [--media FOLDER] [--least-short-edge PX] [--repeats N] [--no-text] [--ffmpeg] [--write FILE]

Without a folder a 1080p H.264 video with B-frames is made. All commands take turns, so that a machine that is busy for a
while is busy for all of them. CPU seconds are of whole processes and include those of children. The program is started
once a file, as it takes one, ours once for all: ratios are given with and without what starting costs each.
"""

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import av
import cv2
import numpy as np
from scenedetect import ContentDetector, SceneManager, ThresholdDetector
from scenedetect import open_video as open_stream

from pipeline.decode import open_video
from pipeline.scan_medium import ScanConfig, ScanLimits, scan_medium
from pipeline.scan_video import scan_video
from schemas.errors import RowError

SUFFIXES = {".mp4", ".mkv", ".mov", ".webm", ".avi", ".ts", ".flv", ".3gp"}
NUM_SHOTS, SHOT_FRAMES = 12, 100


@dataclass(frozen=True)
class Cost:
    """Of one run of a command over all files."""

    cpu_s: float
    wall_s: float


def make_video(path: Path) -> Path:
    """Shots of 4 s at 1080p, with camera movement and grain, as a usual encode has them: B-frames, a few megabits."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "medium", "crf": "23", "bf": "3"})
        stream.width, stream.height, stream.pix_fmt = 1920, 1080, "yuv420p"
        for shot in range(NUM_SHOTS):
            rng = np.random.default_rng(shot)
            rough = rng.integers(30, 225, (12, 20, 3), dtype=np.uint8)
            smooth = cv2.resize(rough, (2320, 1180), interpolation=cv2.INTER_CUBIC).astype(np.float32)
            wide = np.clip(smooth + rng.normal(0, 6, (1180, 2320, 1)), 0, 255).astype(np.uint8)
            for index in range(SHOT_FRAMES):
                part = np.ascontiguousarray(wide[index // 2 : index // 2 + 1080, 4 * index : 4 * index + 1920])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(part, format="bgr24")))
        container.mux(stream.encode())
    return path


def videos_in(folder: Path, least_short_edge_px: int) -> list[Path]:
    """Files that decode to their end and are large enough."""
    found = []
    for path in sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES):
        try:
            with open_video(path) as reader:
                is_large = min(reader.width_px, reader.height_px) >= least_short_edge_px
                if is_large and all(True for _ in reader):
                    found.append(path)
        except RowError as error:
            print(f"left out: {error}")
    return found


def bare(paths: Sequence[Path], *, needed: bool = False) -> None:
    """Decodes every frame, or those that others are decoded from, and looks at none."""
    for path in paths:
        with av.open(str(path), metadata_errors="ignore", options={"protocol_whitelist": "file"}) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            stream.codec_context.skip_frame = "NONREF" if needed else "DEFAULT"
            for packet in container.demux(stream):
                try:
                    packet.decode()
                except av.error.FFmpegError:
                    continue


def our_cuts(path: Path, *, skim: bool = False) -> list[int]:
    """First frames of all clips but the first, by a scan that measures nothing else, in one process."""
    config = ScanConfig(families=(), skim=skim, limits=ScanLimits(segment_workers=1))
    return [cut.frame_num for cut in scan_video(path, config).cutter(config.segmentation).timecodes()]


def their_cuts(path: Path) -> list[int]:
    """The same by PySceneDetect's own API, with the same detectors."""
    capture = cv2.VideoCapture(str(path))
    backend = "opencv" if capture.read()[0] else "pyav"  # OpenCV's wheel has no AV1 on CPU
    capture.release()
    manager = SceneManager()
    manager.add_detector(ContentDetector())
    manager.add_detector(ThresholdDetector())
    manager.detect_scenes(open_stream(str(path), backend=backend))
    return [start.frame_num for start, _ in manager.get_scene_list(start_in_scene=True)][1:]


def scan(paths: Sequence[Path], *, text: bool) -> None:
    """The whole scan, on one worker."""
    config = ScanConfig(
        families=("motion", "technical", "text") if text else ("motion", "technical"),
        limits=ScanLimits(segment_workers=1),
    )
    for path in paths:
        scan_medium(path, "0123456789abcdef", "video", config)


PROGRAM = "scenedetect detect-content"
STEPS: dict[str, Callable[[Sequence[Path]], object]] = {
    "bare decoding (PyAV)": bare,
    "the same, of frames that others need": lambda paths: bare(paths, needed=True),
    "our cuts": lambda paths: [our_cuts(path) for path in paths],
    "our cuts, skimmed": lambda paths: [our_cuts(path, skim=True) for path in paths],
    "our scan without text": lambda paths: scan(paths, text=False),
    "our scan": lambda paths: scan(paths, text=True),
}


def commands(paths: Sequence[Path], *, text: bool, ffmpeg: bool) -> dict[str, list[list[str]]]:
    """What is compared -> the command lines that walk all files."""
    names = [str(path.absolute()) for path in paths]
    found = {name: [[sys.executable, __file__, "--step", name, *names]] for name in STEPS}
    if not text:
        del found["our scan"]
    found[PROGRAM] = [[sys.executable, "-m", "scenedetect", "-q", "-i", name, "detect-content"] for name in names]
    if ffmpeg:
        decode = ["ffmpeg", "-v", "quiet", "-threads", "1"]
        found["bare decoding (ffmpeg)"] = [[*decode, "-i", name, "-map", "0:v:0", "-f", "null", "-"] for name in names]
    return found


def cost(lines: Sequence[Sequence[str]]) -> Cost:
    """Runs command lines one after the other."""
    before, start = os.times(), time.perf_counter()
    for line in lines:
        subprocess.run(line, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return Cost(spent, time.perf_counter() - start)


def measured(lines_of: dict[str, list[list[str]]], repeats: int) -> dict[str, list[Cost]]:
    """Every command `repeats` times, in turns."""
    found: dict[str, list[Cost]] = {}
    for _ in range(repeats):
        for name, lines in lines_of.items():
            found.setdefault(name, []).append(cost(lines))
    return found


def starting_s(repeats: int, num_files: int) -> dict[str, float]:
    """CPU seconds of the program and of ours with nothing to do, for as many files."""
    program = [sys.executable, "-m", "scenedetect", "version"]
    ours = {name: [sys.executable, __file__, "--step", name] for name in STEPS}
    found = {name: statistics.median(cost([line]).cpu_s for _ in range(repeats)) for name, line in ours.items()}
    return {**found, PROGRAM: num_files * statistics.median(cost([program]).cpu_s for _ in range(repeats))}


def compared(paths: Sequence[Path]) -> str:
    """Whether the cut lists are equal, file by file."""
    lists = {path.name: (our_cuts(path), our_cuts(path, skim=True), their_cuts(path)) for path in paths}
    lines = [
        f"{name}: ours {ours}, skimmed {skimmed}, theirs {theirs}"
        for name, (ours, skimmed, theirs) in lists.items()
        if not ours == skimmed == theirs
    ]
    num_equal = sum(ours == theirs for ours, _, theirs in lists.values())
    num_skimmed = sum(skimmed == theirs for _, skimmed, theirs in lists.values())
    equal = f"Cut lists (content and threshold detectors) are equal on {num_equal} of {len(paths)} files"
    return "; ".join([f"{equal}, skimmed on {num_skimmed}", *lines]) + "."


def table(costs: dict[str, list[Cost]], starting: dict[str, float]) -> str:
    """Medians as a Markdown table, with ratios to the program."""
    medians = {name: statistics.median(run.cpu_s for run in runs) for name, runs in costs.items()}
    lines = ["| | CPU s | range | wall s | to the program | without starting |", "|---|---|---|---|---|---|"]
    for name, runs in costs.items():
        spent = [run.cpu_s for run in runs]
        wall = statistics.median(run.wall_s for run in runs)
        working = medians[name] - starting.get(name, 0.0)
        lines.append(
            f"| {name} | {medians[name]:.2f} | {min(spent):.2f} to {max(spent):.2f} | {wall:.2f} "
            f"| {medians[name] / medians[PROGRAM]:.2f} | {working / (medians[PROGRAM] - starting[PROGRAM]):.2f} |"
        )
    return "\n".join(lines)


def report(paths: Sequence[Path], what: str, options: argparse.Namespace) -> str:
    """Measures, and says so in Markdown."""
    costs = measured(commands(paths, text=options.text, ffmpeg=options.ffmpeg), options.repeats)
    versions = ", ".join(f"{name} {version(name)}" for name in ("scenedetect", "av", "opencv-python-headless", "numpy"))
    machine = f"{os.cpu_count()} logical CPUs, Python {platform.python_version()}, {versions}"
    text = table(costs, starting_s(options.repeats, len(paths)))
    return f"{what}, median of {options.repeats}, {machine}.\n\n{text}\n\n{compared(paths)}\n"


def main() -> None:
    """Measure, print, and write where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--media", type=Path, help="a folder of videos")
    parser.add_argument("--least-short-edge", type=int, default=0, help="of videos in the folder, in pixels")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-text", dest="text", action="store_false", help="leave the scan with text coverage out")
    parser.add_argument("--ffmpeg", action="store_true", help="decode with the ffmpeg program too")
    parser.add_argument("--write", type=Path, help="a Markdown file that the result is added to")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("files", nargs="*", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        cv2.setNumThreads(1)
        STEPS[options.step](options.files)
        return
    if options.ffmpeg and not shutil.which("ffmpeg"):
        parser.error("there is no ffmpeg program on PATH: install it, or leave --ffmpeg out")
    with tempfile.TemporaryDirectory() as folder:
        if options.media:
            paths = videos_in(options.media, options.least_short_edge)
            what = f"{len(paths)} videos, short edge {options.least_short_edge} px or more"
        else:
            paths = [make_video(Path(folder) / "made.mp4")]
            what = f"{NUM_SHOTS * SHOT_FRAMES} frames of made 1080p H.264 with B-frames"
        text = report(paths, what, options)
    print(text)
    if options.write:
        with options.write.open("a") as page:
            page.write(f"\n{text}")


if __name__ == "__main__":
    main()
