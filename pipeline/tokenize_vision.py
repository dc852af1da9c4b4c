"""Vision tokens of a clip: its frames, read from the original by seeking, through an encoder that `jobs` hands in."""

import math
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from pipeline.read_frames import read_frames
from pipeline.sandbox import Sandbox
from pipeline.stage import Rows
from schemas.errors import RowError
from schemas.recipe import Config, later_option
from schemas.vision_tokens import VISION_TOKENS

FRAMES_PER_LATENT = 4  # temporal compression of the vision tokenizer. Paper: Emu3 report, table 1
PATCH_PX = 8  # spatial compression

Frames = npt.NDArray[np.uint8]
Encode = Callable[[Frames], npt.NDArray[np.int64]]
"""uint8 RGB frames (T, H, W, 3), T = 1 for an image, else a multiple of 4 -> codes (t, h, w)."""


Remainder = Literal["leave", "repeat"]


class Preparation(Config):
    """How a clip's frames are read before encoding. Sizes keep the aspect ratio about `area_px`."""

    area_px: int = Field(default=512 * 512, gt=0)  # Paper: Emu3 report, section 2.4: about 512 x 512
    fps: float = Field(default=24.0, gt=0)
    max_frames: int = Field(default=120, ge=FRAMES_PER_LATENT, multiple_of=FRAMES_PER_LATENT)
    remainder: Remainder = later_option("leave")
    """Frames at a clip's end that fill no latent frame: left out, or the last repeated until they do."""
    timeout_s: float = Field(default=120.0, gt=0)
    memory_mb: int = Field(default=4096, gt=0)


def prepared_size(height_px: int, width_px: int, area_px: int) -> tuple[int, int]:
    """A picture's size -> (height, width) of about `area_px`, multiples of 8, aspect ratio nearly kept."""
    scale = math.sqrt(area_px / (width_px * height_px))
    return (
        max(PATCH_PX, round(height_px * scale / PATCH_PX) * PATCH_PX),
        max(PATCH_PX, round(width_px * scale / PATCH_PX) * PATCH_PX),
    )


def num_available(duration_ms: int, preparation: Preparation) -> int:
    """A clip's length -> its frames at the preparation's rate."""
    return round(duration_ms * preparation.fps / 1000)


def num_frames(duration_ms: int, preparation: Preparation) -> int:
    """A clip's length -> frames to read, no more than the preparation allows.

    Raises: RowError if the clip fills no latent frame.
    """
    count = min(num_available(duration_ms, preparation), preparation.max_frames)
    if preparation.remainder == "leave":
        count = count // FRAMES_PER_LATENT * FRAMES_PER_LATENT
    if not count:
        least = FRAMES_PER_LATENT if preparation.remainder == "leave" else 1
        raise RowError("TooShort", f"{duration_ms} ms at {preparation.fps} fps is less than {least} frames")
    return count


def clip_frames(item: Mapping[str, Any], preparation: Preparation) -> Frames:
    """A clip (uri, kind, start_ms, end_ms) -> prepared uint8 RGB frames (T, H, W, 3), T = 1 or a multiple of 4."""
    path, start_ms = Path(item["uri"]), item["start_ms"]

    def size(height_px: int, width_px: int) -> tuple[int, int]:
        return prepared_size(height_px, width_px, preparation.area_px)

    if item["kind"] == "image":
        return read_frames(path, 0, 0, size=size)
    count = num_frames(item["end_ms"] - start_ms, preparation)
    end_ms = min(item["end_ms"], start_ms + math.ceil(1000 * count / preparation.fps))
    frames = read_frames(path, start_ms, end_ms, fps=preparation.fps, size=size)[:count]
    if preparation.remainder == "leave":
        return frames[: len(frames) // FRAMES_PER_LATENT * FRAMES_PER_LATENT]
    return np.concatenate([frames, np.repeat(frames[-1:], -len(frames) % FRAMES_PER_LATENT, axis=0)])


class TokenizeWorker:
    """Encodes clips; frames come from a child process that a hostile file may take down."""

    def __init__(self, load: Callable[[], Encode], tokenizer_id: str, preparation: Preparation) -> None:
        self.encode = load()
        self.tokenizer_id, self.preparation = tokenizer_id, preparation
        self.sandbox = Sandbox(preparation.timeout_s, preparation.memory_mb)

    def process(self, item: Mapping[str, Any]) -> Rows:
        """One clip -> its `vision_tokens` row."""
        frames = self.sandbox.run(clip_frames, dict(item), self.preparation)
        codes = self.encode(frames)
        t, h, w = codes.shape
        stored = codes.astype("<u2").tobytes()
        row = {
            "clip_id": item["clip_id"],
            "tokenizer_id": self.tokenizer_id,
            "kind": item["kind"],
            "t": t,
            "h": h,
            "w": w,
            "fps": self.preparation.fps if item["kind"] == "video" else None,
            "source_frames": num_available(item["end_ms"] - item["start_ms"], self.preparation)
            if item["kind"] == "video"
            else 1,
            "codes": stored,
            "crc32": zlib.crc32(stored),
        }
        return {VISION_TOKENS.name: [row]}
