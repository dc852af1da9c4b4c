"""What it costs to find the duplicates among many fingerprints, and how many of the known ones are found.

    python benchmarks/duplicates.py [--clips 1000000] [--flipped 0.05]

A tenth of the clips are copies of others with that share of their bits flipped. CPU seconds, wall seconds, peak memory.
"""

import argparse
import json
import resource
import time

import numpy as np

from pipeline.find_duplicates import find_duplicates
from pipeline.fingerprint_clips import NUM_FRAMES


def main() -> None:
    """Make hashes, join them, print what was found and what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=1_000_000)
    parser.add_argument("--flipped", type=float, default=0.05)
    asked = parser.parse_args()
    rng = np.random.default_rng(0)
    hashes = rng.integers(1, 1 << 63, (asked.clips, NUM_FRAMES), dtype=np.uint64)
    copies = asked.clips // 10
    for frame in range(NUM_FRAMES):
        noise = np.packbits(rng.random((copies, 64), np.float32) < asked.flipped, axis=-1).view(np.uint64)[:, 0]
        hashes[-copies:, frame] = hashes[:copies, frame] ^ noise
    blank, group = np.zeros(asked.clips, np.int32), np.zeros(asked.clips, np.int64)
    pixels = np.array([f"{index:064x}" for index in range(asked.clips)], object)
    before_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    cpu, wall = time.process_time(), time.perf_counter()
    found = find_duplicates(hashes, blank, pixels, group)
    taken = {"cpu_s": round(time.process_time() - cpu, 1), "wall_s": round(time.perf_counter() - wall, 1)}
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    recall = float((found.place[-copies:] == np.arange(copies)).mean())
    chance = float((found.near[:-copies] > 0.8).mean())
    memory = {"before_mb": round(before_mb), "peak_mb": round(peak_mb)}
    print(json.dumps({"clips": asked.clips, **taken, **memory, "recall": recall, "others_above_0.8": chance}))


if __name__ == "__main__":
    main()
