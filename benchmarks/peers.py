"""What two other pipelines cost for the same operations: split by content, motion, resolution, aspect ratio and length.

Usage: python benchmarks/peers.py [--media FOLDER] [--seconds N] [--rounds N] [--write]

Data-Juicer and NeMo Curator are installed into environments of their own under build/peers, the versions pinned below.
Each pipeline runs as its users run it, as whole processes; a second run on one short video tells what of it is starting.
CPU seconds are those of every process that a run starts, and memory is the largest sum of their proportional set sizes.
NeMo Curator cuts by content on GPUs only: it cuts by time here, and transcodes. It does not run on
fewer than six CPUs, so it is told of six. Needs the ffmpeg program, which both peers call, and Python 3.12 for NeMo Curator.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

import av
import cv2
import numpy as np
import psutil

from pipeline.probe_media import probe
from schemas.errors import RowError

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "peers"
PAGE = ROOT / "docs" / "experiments" / "peers.md"
TABLE_START, TABLE_END = "<!-- table -->", "<!-- end of table -->"
SUFFIXES = (".mp4", ".mkv", ".webm", ".mov")  # what all three list
MARK = "OUTBACK_PEER_RUN"
SAMPLED_EVERY_S = 0.2
TIME_LIMIT_S = 1800

DATA_JUICER = ("py-data-juicer==1.6.1", "scenedetect==0.7.2", "opencv-python-headless", "av==13.1.0", "ray[default]")
NEMO = ("nemo-curator[video_cpu]==1.4.0", "ray[default,data]==2.57.0")
# The operations of `scan` and `curate` that these pipelines have too. Motion at 2 fps on a short edge of 256 pixels.
DATA_JUICER_RECIPE = """
dataset_path: {listing}
export_path: {folder}/kept.jsonl
np: 2
use_cache: false
process:
  - video_split_by_scene_mapper: {{detector: ContentDetector, threshold: 27.0, min_scene_len: 15, save_dir: {folder}/clips}}
  - video_resolution_filter: {{min_width: 256, min_height: 256}}
  - video_aspect_ratio_filter: {{min_ratio: 1/3, max_ratio: 3/1}}
  - video_duration_filter: {{min_duration: 0.5}}
  - video_motion_score_filter: {{min_score: 0.25, sampling_fps: 2, size: 256}}
"""
NEMO_PIPELINE = """
import sys

import ray
from nemo_curator.backends.ray_data import RayDataExecutor
from nemo_curator.pipeline import Pipeline
from nemo_curator.stages.video.clipping.clip_extraction_stages import ClipTranscodingStage, FixedStrideExtractorStage
from nemo_curator.stages.video.filtering.motion_filter import MotionFilterStage, MotionVectorDecodeStage
from nemo_curator.stages.video.io.clip_writer import ClipWriterStage
from nemo_curator.stages.video.io.video_reader import VideoReader

if __name__ == "__main__":
    media, folder = sys.argv[1:]
    ray.init(num_cpus=6, num_gpus=0, include_dashboard=False)
    pipeline = Pipeline(name="peer")
    pipeline.add_stage(VideoReader(input_video_path=media))
    pipeline.add_stage(FixedStrideExtractorStage(clip_len_s=10, clip_stride_s=10, min_clip_length_s=0.5, limit_clips=0))
    pipeline.add_stage(ClipTranscodingStage(num_cpus_per_worker=1, encoder="{encoder}"))
    pipeline.add_stage(MotionVectorDecodeStage(num_cpus_per_worker=1))
    pipeline.add_stage(MotionFilterStage(score_only=True, num_gpus_per_worker=0, motion_filter_batch_size=64))
    pipeline.add_stage(ClipWriterStage(output_path=folder, input_path=media, upload_clips=True, dry_run=False,
        generate_embeddings=False, generate_previews=False, generate_captions=False))
    pipeline.run(RayDataExecutor())
    ray.shutdown()
"""


@dataclass(frozen=True)
class Cost:
    """What one run took: seconds on the clock, CPU seconds and MiB."""

    wall_s: float
    cpu_s: float
    peak_mib: float

    def __sub__(self, start: "Cost") -> "Cost":
        return Cost(self.wall_s - start.wall_s, self.cpu_s - start.cpu_s, self.peak_mib)


@dataclass(frozen=True)
class Pipeline:
    """A pipeline: its name, and the commands that take it over a folder of videos into an empty one."""

    name: str
    commands: Callable[[Path, Path], list[list[str]]]


def cost_of(commands: list[list[str]], folder: Path) -> Cost:
    """Runs commands one after the other and watches every process that bears their mark.

    Raises: RuntimeError if one of them fails, with the end of what it said.
    """
    token, said = uuid.uuid4().hex, folder / "said.txt"
    ended, peak = threading.Event(), [0]
    cpu: dict[tuple[int, float], float] = {}
    watcher = threading.Thread(target=_watch, args=(token, ended, cpu, peak))
    started = time.monotonic()
    watcher.start()
    try:
        for command in commands:
            with said.open("w") as output:
                path = f"{Path(command[0]).parent}{os.pathsep}{os.environ['PATH']}"
                environment = {**os.environ, "PATH": path, MARK: token}
                done = subprocess.run(
                    command, cwd=folder, env=environment, stdout=output, stderr=output, timeout=TIME_LIMIT_S
                )
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{said.read_text()[-3000:]}")
    finally:
        wall_s = time.monotonic() - started
        ended.set()
        watcher.join()
    return Cost(wall_s, sum(cpu.values()), peak[0] / 2**20)


def _watch(token: str, ended: threading.Event, cpu: dict[tuple[int, float], float], peak: list[int]) -> None:
    """CPU seconds by process as last seen, and the largest sum of their memory."""
    mine: dict[tuple[int, float], bool] = {}
    while not ended.wait(SAMPLED_EVERY_S):
        held = 0
        for process in psutil.process_iter():
            try:
                key = (process.pid, process.create_time())
                if not mine.get(key):
                    mine[key] = process.environ().get(MARK) == token
                if mine[key]:
                    times = process.cpu_times()
                    cpu[key] = times.user + times.system
                    held += process.memory_full_info().pss
            except psutil.Error:
                continue  # it has just ended
        peak[0] = max(peak[0], held)


def interpreter_of(name: str, python: str, packages: tuple[str, ...]) -> Path:
    """The interpreter of a peer's environment, made on first use."""
    folder = BUILD / name
    interpreter = folder / "bin" / "python"
    made = folder / "made"
    if not made.exists():
        uv = str(Path(sys.executable).with_name("uv"))
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", python, str(folder)], check=True)
        subprocess.run([uv, "pip", "install", "--quiet", "--python", str(interpreter), *packages], check=True)
        made.touch()
    return interpreter


def outback(media: Path, folder: Path) -> list[list[str]]:
    """Ingest, scan, curate."""
    program, lake = str(Path(sys.executable).with_name("outback")), str(folder / "lake")
    scan = [program, "scan", "--set", 'families=["motion","technical"]', "--lake", lake]
    rules = folder / "rules.toml"
    rules.write_text("[resolution]\nlow = 256\n[aspect]\nhigh = 3.0\n[duration]\nlow = 0.5\n[motion]\nlow = 0.001\n")
    curate = [program, "curate", str(rules), "--name", "kept", "--lake", lake]
    return [[program, "ingest", str(media), "--lake", lake], scan, curate]


def data_juicer(media: Path, folder: Path) -> list[list[str]]:
    """One recipe over a list of the files."""
    interpreter = interpreter_of("data-juicer", "3.11", DATA_JUICER)
    listing, recipe = folder / "listing.jsonl", folder / "recipe.yaml"
    rows = [{"videos": [str(path)], "text": "<__dj__video>"} for path in sorted(media.iterdir())]
    listing.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe.write_text(DATA_JUICER_RECIPE.format(listing=listing, folder=folder))
    return [[str(interpreter.with_name("dj-process")), "--config", str(recipe)]]


def nemo_curator(media: Path, folder: Path) -> list[list[str]]:
    """One script."""
    interpreter = interpreter_of("nemo-curator", "3.12", NEMO)
    script = folder / "pipeline.py"
    script.write_text(NEMO_PIPELINE.replace("{encoder}", "libvpx-vp9"))
    return [[str(interpreter), str(script), str(media), str(folder / "clips")]]


PIPELINES = (Pipeline("Outback", outback), Pipeline("Data-Juicer", data_juicer), Pipeline("NeMo Curator", nemo_curator))


def chosen(media: Path, folder: Path, seconds: float) -> float:
    """Links videos of `media`, by name, into `folder` until they last `seconds` -> how long they do last. Files that the
    prober refuses are left out: how pipelines take broken files is no question of speed.
    """
    total = 0.0
    for path in sorted(media.iterdir()):
        if total >= seconds:
            break
        try:
            facts = probe(path)
        except (RowError, OSError):
            continue
        if facts.kind == "video" and path.suffix in SUFFIXES and (facts.duration_ms or 0) >= 1000:
            shutil.copy(path, folder / path.name.lstrip("-"))
            total += (facts.duration_ms or 0) / 1000
    return total


def make_video(path: Path, seconds: int) -> None:
    """A video of 1280x720 at 24 fps in H.264: a picture that moves, another one every two seconds."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        for number in range(24 * seconds):
            if number % 48 == 0:
                coarse = rng.integers(0, 255, (24, 40, 3), np.uint8)
                picture = cv2.resize(coarse, (1920, 720), interpolation=cv2.INTER_CUBIC)
            shown = np.ascontiguousarray(picture[:, 4 * (number % 48) :][:, :1280], np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shown, "bgr24")))
        container.mux(stream.encode())


def measured(pipeline: Pipeline, media: Path) -> Cost:
    """One run from nothing, its results thrown away."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return cost_of(pipeline.commands(media, folder), folder)


def middle(costs: list[Cost]) -> Cost:
    """The median of each figure."""
    return Cost(*(statistics.median(values) for values in zip(*(astuple(cost) for cost in costs), strict=True)))


def table(seconds: float, whole: dict[str, Cost], starts: dict[str, Cost]) -> str:
    """A line per pipeline; `x` is how many times our CPU seconds and our memory it took."""
    lines = [
        "| | wall s | CPU s | x | CPU s without starting | x | video s per CPU s | peak MiB | x |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    ours, ours_moving = whole["Outback"], whole["Outback"] - starts["Outback"]
    for name, cost in whole.items():
        moving = cost - starts[name]
        lines.append(
            f"| {name} | {cost.wall_s:.1f} | {cost.cpu_s:.1f} | {cost.cpu_s / ours.cpu_s:.1f} | {moving.cpu_s:.1f} | "
            f"{moving.cpu_s / ours_moving.cpu_s:.1f} | {seconds / cost.cpu_s:.1f} | {cost.peak_mib:.0f} | "
            f"{cost.peak_mib / ours.peak_mib:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure in turn, print the table, and put it on its page if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--media", type=Path, help="a folder of videos; made ones without it")
    parser.add_argument("--seconds", type=float, default=60, help="of video")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--only", nargs="*", default=[pipeline.name for pipeline in PIPELINES], help="names of pipelines"
    )
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.relative_to(ROOT)}")
    options = parser.parse_args()
    pipelines = [pipeline for pipeline in PIPELINES if pipeline.name in ("Outback", *options.only)]
    with tempfile.TemporaryDirectory() as name:
        media, short = Path(name) / "media", Path(name) / "short"
        media.mkdir()
        short.mkdir()
        if options.media:
            seconds = chosen(options.media, media, options.seconds)
        else:
            seconds = 10.0 * max(1, round(options.seconds / 10))
            for index in range(round(seconds / 10)):
                make_video(media / f"made{index}.mp4", 10)
        make_video(short / "made.mp4", 1)
        whole: dict[str, list[Cost]] = {pipeline.name: [] for pipeline in pipelines}
        starts: dict[str, list[Cost]] = {pipeline.name: [] for pipeline in pipelines}
        for pipeline in pipelines:
            measured(pipeline, short)  # what a first run compiles and caches is not counted
        for number in range(options.rounds):
            for pipeline in pipelines:
                starts[pipeline.name].append(measured(pipeline, short))
                whole[pipeline.name].append(measured(pipeline, media))
                print(number, pipeline.name, starts[pipeline.name][-1], whole[pipeline.name][-1], flush=True)
        num_files = len(list(media.iterdir()))
    means = {name: middle(costs) for name, costs in whole.items()}
    lines = table(seconds, means, {name: middle(costs) for name, costs in starts.items()})
    said = f"{num_files} videos of {seconds:.0f} s, median of {options.rounds} rounds in turn.\n\n{lines}\n"
    print(said)
    if options.write:
        page = PAGE.read_text()
        before, _, rest = page.partition(TABLE_START)
        PAGE.write_text(f"{before}{TABLE_START}\n{said}{TABLE_END}{rest.partition(TABLE_END)[2]}")


if __name__ == "__main__":
    main()
