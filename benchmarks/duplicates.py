"""What it costs to find the duplicates among many clips, and how many of the known ones are found.

    python benchmarks/duplicates.py [near] [--clips 1000000] [--flipped 0.05]
    python benchmarks/duplicates.py semantic [--clips 100000] [--topics 50] [--cosine 0.95]

A tenth of the clips are copies of others, the worse ones: fingerprints with that share of their bits flipped, or embeddings
of 768 numbers turned away until their cosine is the one given. `--topics` is how many clips show alike things, with cosines of
0.74 or so; with 1 none do, which is the hardest case: cells mean nothing. CPU seconds, wall seconds, peak memory.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.find_duplicates import find_duplicates
from pipeline.find_similar import find_similar, unit_vectors
from pipeline.fingerprint_clips import NUM_FRAMES

DIM = 768
PART = 20_000
COMMON, OWN = 0.7, 0.6  # of a direction that all share, and of what a clip has alone, to that of its topic

T = TypeVar("T")


def near(num_clips: int, flipped: float) -> dict[str, object]:
    """Make hashes and join them."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(1, 1 << 63, (num_clips, NUM_FRAMES), dtype=np.uint64)
    copies = num_clips // 10
    for frame in range(NUM_FRAMES):
        noise = np.packbits(rng.random((copies, 64), np.float32) < flipped, axis=-1).view(np.uint64)[:, 0]
        hashes[-copies:, frame] = hashes[:copies, frame] ^ noise
    blank, group = np.zeros(num_clips, np.int32), np.zeros(num_clips, np.int64)
    pixels = np.array([f"{index:064x}" for index in range(num_clips)], object)
    found, taken = measured(lambda: find_duplicates(hashes, blank, pixels, group))
    recall = float((found.place[-copies:] == np.arange(copies)).mean())
    return {**taken, "recall": recall, "others_above_0.8": float((found.near[:-copies] > 0.8).mean())}


def semantic(num_clips: int, of_topic: int, cosine: float, folder: Path) -> dict[str, object]:
    """Make embeddings in a file, as the scorer has them, and compare them. Pages of the file that were read count as memory."""
    with ProcessPoolExecutor(1, get_context("spawn")) as other:  # so that what making takes is not counted
        other.submit(make_embeddings, num_clips, of_topic, cosine, folder).result()
    vectors = np.memmap(folder / "vectors", np.float16, "r", shape=(num_clips, DIM))
    found, taken = measured(lambda: find_similar(vectors, np.zeros(num_clips, np.int64)))
    copies = num_clips // 10
    recall = float((found.place[-copies:] == np.arange(copies)).mean())
    above = float((found.cosine[:-copies] > cosine - 0.05).mean())
    return {**taken, "recall": recall, f"others_above_{cosine - 0.05:.2f}": above}


def make_embeddings(num_clips: int, of_topic: int, cosine: float, folder: Path) -> None:
    """Unit vectors in a file, the copies last."""
    rng = np.random.default_rng(0)
    vectors = np.memmap(folder / "vectors", np.float16, "w+", shape=(num_clips, DIM))
    topics, common = directions(rng, num_clips // of_topic), directions(rng, 1)
    copies = num_clips // 10
    for start in range(0, num_clips - copies, PART):
        count = min(PART, num_clips - copies - start)
        made = OWN * directions(rng, count)
        if of_topic > 1:
            shown = topics[rng.integers(0, len(topics), count)] + COMMON * common
            made += shown / np.linalg.norm(shown, axis=1, keepdims=True)
        vectors[start : start + count] = unit_vectors(made)
    away = np.sqrt(1 / cosine**2 - 1)
    for start in range(0, copies, PART):
        count = min(PART, copies - start)
        made = vectors[start : start + count] + away * directions(rng, count)
        vectors[num_clips - copies + start : num_clips - copies + start + count] = unit_vectors(made)


def directions(rng: np.random.Generator, count: int) -> NDArray[np.float32]:
    """Unit vectors [count, DIM]."""
    found = rng.standard_normal((count, DIM), np.float32)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return found


def measured(work: Callable[[], T]) -> tuple[T, dict[str, object]]:
    """What it gives, and what it took."""
    before_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    cpu, wall = time.process_time(), time.perf_counter()
    found = work()
    cpu_s, wall_s = round(time.process_time() - cpu, 1), round(time.perf_counter() - wall, 1)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return found, {"cpu_s": cpu_s, "wall_s": wall_s, "before_mb": round(before_mb), "peak_mb": round(peak_mb)}


def main() -> None:
    """Measure one kind and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", nargs="?", choices=("near", "semantic"), default="near")
    parser.add_argument("--clips", type=int)
    parser.add_argument("--flipped", type=float, default=0.05)
    parser.add_argument("--topics", type=int, default=50)
    parser.add_argument("--cosine", type=float, default=0.95)
    asked = parser.parse_args()
    if asked.kind == "near":
        num_clips = asked.clips or 1_000_000
        told = near(num_clips, asked.flipped)
    else:
        num_clips = asked.clips or 100_000
        with tempfile.TemporaryDirectory() as folder:
            told = semantic(num_clips, asked.topics, asked.cosine, Path(folder))
    print(json.dumps({"kind": asked.kind, "clips": num_clips, **told}))


if __name__ == "__main__":
    main()
