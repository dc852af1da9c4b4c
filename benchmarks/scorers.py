"""What each scorer family costs, in CPU milliseconds a sample and beside decoding, all in one pass over the same videos.

Usage: python benchmarks/scorers.py VIDEO... [--threads N]

One thread unless told otherwise. A pass decodes every frame, takes samples at 2 fps as the scan does, and hands each to the
scorers, in turn; CPU time is that of the process. Videos that do not decode are named and left out.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np

from pipeline.camera_motion import pair_motion
from pipeline.decode import open_video
from pipeline.detect_scenes import SegmentationConfig
from pipeline.frame_meter import FrameMeter
from pipeline.picture_noise import blockiness, noise_deviation
from pipeline.samples import Sample, SampleSpec, shrunk_size, take_sample
from pipeline.score_motion import MotionConfig, MotionScorer
from pipeline.score_technical import TechnicalConfig, TechnicalScorer
from pipeline.score_text import TextConfig, TextScorer
from schemas.errors import RowError

PARTS = ("decoding", "cuts and repeated frames", "conversion", "samples", "motion", "technical", "text")
FLOW_SIZE = (455, 256)


class Meter:
    """CPU seconds by part, and how often each ran."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.counts: defaultdict[str, int] = defaultdict(int)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the CPU time of what is inside."""
        start = time.process_time()
        yield
        self.seconds[name] += time.process_time() - start
        self.counts[name] += 1


def measure(path: Path, meter: Meter, threads: int) -> None:
    """Scores every sample of a video. Raises: RowError if it does not decode."""
    spec = SampleSpec()
    motion, technical, text = MotionScorer(MotionConfig()), TechnicalScorer(TechnicalConfig()), TextScorer(TextConfig())
    frames_meter, last, due = FrameMeter(SegmentationConfig()), None, 0.0
    with open_video(path, threads=threads) as reader:
        size = shrunk_size(reader.width_px, reader.height_px, spec.short_edge_px)
        frames = iter(reader)
        while True:
            with meter.part("decoding"):
                frame = next(frames, None)
            if frame is None:
                return
            with meter.part("cuts and repeated frames"):
                frames_meter.measure(frame)
            if frame.seconds < due - 1e-6:
                continue
            due += 1 / spec.fps
            with meter.part("conversion"):
                image = frame.bgr()
            with meter.part("samples"):
                sample = take_sample(image, size, frame.seconds)
            last = _score(sample, last, meter, motion, technical, text)


def _score(
    sample: Sample,
    last: Sample | None,
    meter: Meter,
    motion: MotionScorer,
    technical: TechnicalScorer,
    text: TextScorer,
) -> Sample:
    if last is not None and last.image.shape == sample.image.shape:
        with meter.part("motion"):
            motion.pair(last, sample)
    with meter.part("technical"):
        technical.measure(sample, last)
    with meter.part("text"):
        text.coverage(sample.image)
    return sample


def steps() -> Iterator[tuple[str, Callable[[], object]]]:
    """The steps inside the families, on one picture of noise that moves."""
    rng = np.random.default_rng(0)
    noise = cv2.GaussianBlur(rng.integers(0, 256, (FLOW_SIZE[1], FLOW_SIZE[0], 3), dtype=np.uint8), (0, 0), 2)
    before, after = (take_sample(np.roll(noise, shift, axis=1), FLOW_SIZE, shift / 6) for shift in (0, 3))
    far = take_sample(np.roll(noise, 40, axis=1), FLOW_SIZE, 0.5)
    scorer, grey = MotionScorer(MotionConfig()), cv2.cvtColor(before.image, cv2.COLOR_BGR2GRAY)
    flow = np.full((*grey.shape, 2), 3, np.float32)
    yield "motion: a slow pair", lambda: scorer.pair(before, after)
    yield "motion: a fast pair", lambda: scorer.pair(before, far)
    yield "motion: of that, telling the camera apart", lambda: pair_motion(flow, grey, 1.0)
    yield "technical: blocks", lambda: blockiness(cv2.cvtColor(before.detail, cv2.COLOR_BGR2GRAY))
    yield "technical: noise", lambda: noise_deviation(cv2.cvtColor(before.detail, cv2.COLOR_BGR2GRAY))


def median_ms(call: Callable[[], object], repeats: int = 21) -> float:
    """The median CPU milliseconds of a call."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return float(np.median(times)) * 1000


def main() -> None:
    """Measure the videos and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="+", type=Path)
    parser.add_argument("--threads", type=int, default=1, help="of the decoder")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    meter = Meter()
    for path in options.videos:
        try:
            measure(path, meter, options.threads)
        except RowError as error:
            print(f"left out: {error}")
    decoding = meter.seconds["decoding"]
    print(
        f"{meter.counts['decoding']} frames, {meter.counts['samples']} samples, {decoding:.1f} CPU seconds of decoding\n"
    )
    print("| | ms each | CPU seconds | of decoding |\n|---|---|---|---|")
    for name in PARTS:
        seconds = meter.seconds[name]
        print(
            f"| {name} | {seconds * 1000 / max(1, meter.counts[name]):.2f} | {seconds:.1f} | {seconds / decoding:.2f} |"
        )
    print("\n| a step | ms |\n|---|---|")
    for name, call in steps():
        print(f"| {name} | {median_ms(call):.2f} |")


if __name__ == "__main__":
    main()
