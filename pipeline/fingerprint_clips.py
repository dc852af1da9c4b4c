"""Fingerprints: a clip -> perceptual hashes of a few frames over time, how sharp those are, and a hash of all its pixels.

The perceptual hash is pHash: the signs of the 64 lowest coefficients of the cosine transform against their median
(Zauner 2010, "Implementation and benchmarking of perceptual image hash functions"). It survives another codec or size and
a slight crop. A mirrored picture differs in half of its bits, like an unrelated one.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.failures import FailureBound
from pipeline.read_frames import read_frames
from pipeline.samples import shrunk_size
from pipeline.sandbox import Sandbox
from pipeline.stage import Rows
from schemas.fingerprints import FINGERPRINTS
from schemas.recipe import Config, short_hash

VERSION = 2
NUM_FRAMES = 8
SHORT_EDGE_PX = 256
TRANSFORM_PX = 32
KEPT = 8  # coefficients a side
BLANK_STD = 2.0  # of 255, over 32x32 means: below it the coefficients are those of noise and rounding


class FingerprintConfig(Config):
    """Limits of one clip. Nothing here changes a fingerprint."""

    timeout_s: float = Field(default=120.0, gt=0)
    memory_mb: int = Field(default=2048, gt=0)
    max_pixels: int = Field(default=120_000_000, gt=0)
    failures: FailureBound = FailureBound()


def fingerprint_id() -> str:
    """The id under which fingerprints of this version are kept."""
    return short_hash({"version": VERSION, "num_frames": NUM_FRAMES, "short_edge_px": SHORT_EDGE_PX})


def phash(luma: NDArray[np.uint8]) -> int:
    """A picture (H, W) uint8 -> its 64-bit pHash, the lowest frequency first; 0 for one that shows nothing."""
    import cv2

    small = cv2.resize(luma, (TRANSFORM_PX, TRANSFORM_PX), interpolation=cv2.INTER_AREA).astype(np.float32)
    if small.std() < BLANK_STD:
        return 0
    lowest = cv2.dct(small)[:KEPT, :KEPT].ravel()
    return int.from_bytes(np.packbits(lowest > np.median(lowest), bitorder="little").tobytes(), "little")


def fingerprint(frames: NDArray[np.uint8], pixels_sha256: str) -> dict[str, Any]:
    """Frames (T, H, W, 3) uint8 RGB, `NUM_FRAMES` or the one of an image, and the hash of all that the span holds -> the
    columns of `fingerprints` but ids.
    """
    import cv2

    lumas = [np.asarray(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), np.uint8) for frame in frames]
    hashes = [phash(luma) for luma in lumas]
    # A damaged end gives fewer frames than asked for; the last one stands for those that are missing.
    hashes += [hashes[-1]] * (NUM_FRAMES - len(hashes))
    return {
        "hashes": np.array(hashes, "<u8").tobytes(),
        "blank": hashes.count(0),
        "pixels_sha256": pixels_sha256,
        "sharpness": float(np.median([cv2.Laplacian(luma, cv2.CV_32F).var() for luma in lumas])),
    }


def fingerprint_clip(item: Mapping[str, Any], config: FingerprintConfig) -> dict[str, Any]:
    """A clip (uri, start_ms, end_ms) -> the columns of `fingerprints` but ids. Raises: RowError as the decoders say."""
    pixels = hashlib.sha256()
    frames = read_frames(
        Path(item["uri"]),
        item["start_ms"],
        item["end_ms"],
        num_frames=NUM_FRAMES,
        size=_size,
        max_pixels=config.max_pixels,
        on_frame=lambda frame: frame.update_digest(pixels),
    )
    return fingerprint(frames, pixels.hexdigest())


class FingerprintWorker:
    """Reads clips in a child process, which dies in its place when a file is hostile."""

    def __init__(self, config: FingerprintConfig) -> None:
        self.config = config
        self.sandbox = Sandbox(config.timeout_s, config.memory_mb)

    def process(self, item: Mapping[str, Any]) -> Rows:
        """One clip -> its row of `fingerprints`."""
        columns = self.sandbox.run(fingerprint_clip, item, self.config)
        return {FINGERPRINTS.name: [{"clip_id": item["clip_id"], "fingerprint_id": fingerprint_id(), **columns}]}


def _size(height_px: int, width_px: int) -> tuple[int, int]:
    width, height = shrunk_size(width_px, height_px, SHORT_EDGE_PX)
    return height, width
