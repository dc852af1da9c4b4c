"""What looking for text costs, and how often it is right, on videos whose text is known.

Usage: python benchmarks/text.py [TRUTH] [--made N] [--short-edges 256 192 ...] [--ways whole changed waiting patient unread]

TRUTH is a JSON file beside the folders of its videos. Under `videos` each name has `text`: "none", or what there is, with
the frames it is on as FIRST..LAST where it is not on all; under `derived` some have `text_frames`, [first, after the last].
Samples are taken at 2 fps. Without TRUTH, or with `--made N`, the samples are those of N made videos with text and N without on
each surface of `benchmarks/made_text.py`. A sample has text where its coverage is above a bound, a video where that of any
sample is; recall and precision are over all samples, and at the shipped bound over all videos. Ways: `whole` looks at all of
every sample that is not the very same; `changed` where it changed; `waiting` (as shipped) and `patient` leave out one or two
samples after one without text; `unread` is `waiting` with whatever the detector finds, readable or not. Costs are CPU
milliseconds a sample on one thread, beside taking the samples (decoding and converting all frames of the same videos).
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2

from pipeline.decode import open_video
from pipeline.samples import Image, SampleSpec, shrunk, shrunk_size
from pipeline.score_text import TextConfig, TextScorer
from schemas.errors import RowError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a file that is run finds no neighbours
from benchmarks.made_text import made_videos

SAMPLE_S = 0.5
BOUNDS = (0.002, 0.005, 0.01, 0.015, 0.02)
WAYS: dict[str, dict[str, Any]] = {
    "whole": {"waits": 0, "still_tolerance": 0, "edges_min": 0},
    "changed": {"waits": 0},
    "waiting": {"waits": 1},
    "patient": {"waits": 2},
    "unread": {"unread_max": 1e-6},
}
ALL_FRAMES = (0, 2**62)
Frames = tuple[int, int]


@dataclass(frozen=True)
class Taken:
    """One sample of a video: whether it has text, None where that cannot be said, and its picture at the largest size."""

    has_text: bool | None
    image: Image


def text_frames(truth: Path) -> dict[Path, list[Frames]]:
    """A file of truth -> the first and the last frame of every stretch with text, by video."""
    told = json.loads(truth.read_text(encoding="utf-8"))
    found: dict[Path, list[Frames]] = {}
    for name, facts in told["videos"].items():
        if "text" in facts:
            stretches = [(int(first), int(last)) for first, last in re.findall(r"(\d+)\.\.(\d+)", facts["text"])]
            found[truth.parent / name] = [] if facts["text"] == "none" else stretches or [ALL_FRAMES]
    for name, facts in told["derived"].items():
        if "text_frames" in facts:
            first, after = facts["text_frames"]
            found[truth.parent / name] = [(first, after - 1)]
    return found


def samples(path: Path, stretches: list[Frames], short_edge_px: int) -> Iterator[Taken]:
    """A video -> its samples. Raises: RowError if it does not decode."""
    with open_video(path) as reader:
        size, due = shrunk_size(reader.width_px, reader.height_px, short_edge_px), 0.0
        for index, frame in enumerate(reader):
            image = frame.bgr()  # of every frame, as the scan must
            if frame.seconds >= due - 1e-6:
                due += SAMPLE_S
                yield Taken(any(first <= index <= last for first, last in stretches), shrunk(image, size))


def report(name: str, config: TextConfig, videos: Iterable[list[Taken]], taking_s: float) -> None:
    """Print what one configuration costs and finds."""
    samples_told: list[tuple[bool, float]] = []
    videos_told: list[tuple[bool, float]] = []
    num_samples, start = 0, time.process_time()
    for taken in videos:
        scorer, found = TextScorer(config), []
        for one in taken:
            height, width = one.image.shape[:2]
            small = shrunk(one.image, shrunk_size(width, height, config.samples.short_edge_px))
            found.append(scorer.coverage(small))
        num_samples += len(taken)
        known = [(one.has_text, value) for one, value in zip(taken, found, strict=True) if one.has_text is not None]
        samples_told += known
        if known:
            videos_told.append((any(has for has, _ in known), max(value for _, value in known)))
    seconds = time.process_time() - start
    cells = [_recall_precision(samples_told, bound) for bound in BOUNDS]
    cells.append(_recall_precision(videos_told, config.present_min))
    cost = f"{seconds * 1000 / num_samples:.1f} | {seconds / taking_s:.2f}"
    print(f"| {name} | {cost} | {' | '.join(cells)} |", flush=True)


def _recall_precision(told: list[tuple[bool, float]], bound: float) -> str:
    right = sum(has and value >= bound for has, value in told)
    recall = right / max(1, sum(has for has, _ in told))
    precision = right / max(1, sum(value >= bound for _, value in told))
    return f"{recall:.2f} / {precision:.2f}"


def main() -> None:
    """Take the samples once, then measure each configuration on them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("truth", type=Path, nargs="?")
    parser.add_argument("--made", type=int, default=0, metavar="N")
    parser.add_argument("--short-edges", type=int, nargs="+", default=[256, 192])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    options = parser.parse_args()
    cv2.setNumThreads(1)
    start, videos = time.process_time(), []
    for path, stretches in text_frames(options.truth).items() if options.truth else ():
        try:
            videos.append(list(samples(path, stretches, max(options.short_edges))))
        except RowError as error:
            print(f"left out: {error}")
    for _, made in made_videos(options.made or (0 if options.truth else 3)):
        videos.append([Taken(one.has_text, one.image) for one in made])
    taking_s = time.process_time() - start
    num_text = sum(bool(one.has_text) for taken in videos for one in taken)
    num_samples = sum(map(len, videos))
    print(
        f"{len(videos)} videos, {num_samples} samples, {num_text} with text, {taking_s:.1f} CPU seconds to take them\n"
    )
    bounds = " | ".join(f">= {bound:g}" for bound in BOUNDS)
    print(f"| | ms a sample | of taking samples | {bounds} | videos |")
    print("|---" * (4 + len(BOUNDS)) + "|")
    for edge in options.short_edges:
        for name in options.ways:
            config = TextConfig(samples=SampleSpec(short_edge_px=edge), **WAYS[name])
            report(f"{edge}: {name}", config, videos, taking_s)


if __name__ == "__main__":
    main()
