"""How long a person waits for `outback --help` and for a set with another threshold, as whole processes.

Usage: python benchmarks/curate.py [LAKE] [--clips N]

Without a lake a made-up one of N clips is used. On a given lake each run adds a set named `benchmark-...`,
for a set that is there already would cost less.
"""

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from schemas.catalog import Lake
from schemas.clips import CLIPS
from schemas.identity import clip_id
from schemas.scores import MOTION, RESOLUTION, TECHNICAL, TEXT

REPEATS = 5
NUM_COMMITS = 4
FRAMES = {"start_ms": 0, "end_ms": 4000, "start_frame": 0, "end_frame": 96, "fps": 24.0}


def make_lake(folder: Path, num_clips: int) -> Lake:
    """A lake of clips whose scores are drawn at random, in as many commits as a scan of a minute makes."""
    lake, rng = Lake(folder), random.Random(0)
    names = [clip_id(f"{index:016x}", 0, 4000) for index in range(num_clips)]
    for part in range(NUM_COMMITS):
        mine = names[part::NUM_COMMITS]
        clips = [{"clip_id": c, "segmentation_id": "s", "media_id": c[:16], "kind": "video", **FRAMES} for c in mine]
        lake.append(CLIPS, clips, "benchmark")
        for family in (RESOLUTION, MOTION, TEXT, TECHNICAL):
            scores = [name for name in family.content_columns if name not in ("clip_id", "scorer_id", "num_samples")]
            counted = {"num_samples": 8} if "num_samples" in family.names else {}
            rows = [{"clip_id": c, "scorer_id": "s", **counted, **{n: _score(n, rng) for n in scores}} for c in mine]
            lake.append(family, rows, "benchmark")
    return lake


def _score(name: str, rng: random.Random) -> float:
    if name in ("short_edge_px", "long_edge_px"):
        return float(rng.choice((480, 720, 1080)))
    return rng.uniform(1, 3) if name == "aspect_ratio" else rng.random() * (100 if name == "sharpness" else 1)


def seconds(command: list[str]) -> float:
    """Wall seconds of one process. Raises: CalledProcessError if it fails."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def report(name: str, times: list[float]) -> None:
    """Print the median and the range."""
    print(f"{name}: median {statistics.median(times):.2f} s of {len(times)}, {min(times):.2f} to {max(times):.2f} s")


def main() -> None:
    """Time both commands and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lake", nargs="?", help="a lake that has been scanned")
    parser.add_argument("--clips", type=int, default=10_000, help="clips of the made-up lake")
    options = parser.parse_args()
    outback = [sys.executable, "-m", "jobs.cli"]
    with tempfile.TemporaryDirectory() as folder:
        lake = options.lake or make_lake(Path(folder) / "lake", options.clips).where
        report("outback --help", [seconds([*outback, "--help"]) for _ in range(REPEATS)])
        stamp, times = int(time.time()), []
        for index in range(REPEATS):
            threshold = f"motion.low={0.002 + 1e-6 * (stamp % 1000) + 1e-9 * index!r}"
            name = f"benchmark-{stamp}-{index}"
            times.append(seconds([*outback, "curate", "offline", "--set", threshold, "--name", name, "--lake", lake]))
        report("outback curate emu3 --set motion.low=...", times)


if __name__ == "__main__":
    main()
