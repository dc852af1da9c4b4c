"""Training pictures for the vision tokenizer: groups of four frames of a clip, at a fixed square size."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import Field

from pipeline.read_frames import read_frames
from pipeline.tokenize_vision import FRAMES_PER_LATENT, PATCH_PX
from schemas.errors import RowError
from schemas.recipe import Config


class ChunkConfig(Config):
    """Size and number of the groups taken from each clip; images give one group of four equal frames."""

    side_px: int = Field(default=256, ge=PATCH_PX, multiple_of=PATCH_PX)
    fps: float = Field(default=24.0, gt=0)
    chunks_per_clip: int = Field(default=4, gt=0)
    timeout_s: float = Field(default=120.0, gt=0)
    memory_mb: int = Field(default=4096, gt=0)

    def identity(self) -> dict[str, object]:
        """What the pictures depend on: not the limits of decoding."""
        return self.model_dump(mode="json", exclude={"timeout_s", "memory_mb"})


def frame_chunks(item: Mapping[str, Any], config: ChunkConfig) -> npt.NDArray[np.uint8]:
    """A clip (uri, kind, start_ms, end_ms) -> uint8 RGB (N, 4, side, side, 3), spread over the clip.

    Frames are scaled by the short edge and cut to their centre square: a batch needs one size, and padding would change
    codes.

    Raises: RowError if the clip is shorter than four frames or cannot be read.
    """
    path, start_ms = Path(item["uri"]), item["start_ms"]

    def size(height_px: int, width_px: int) -> tuple[int, int]:
        scale = config.side_px / min(height_px, width_px)
        return round(height_px * scale), round(width_px * scale)

    if item["kind"] == "image":
        frames = _centre(read_frames(path, 0, 0, size=size), config.side_px)
        return np.repeat(frames[None], FRAMES_PER_LATENT, axis=1)
    frames = _centre(read_frames(path, start_ms, item["end_ms"], fps=config.fps, size=size), config.side_px)
    available = len(frames) // FRAMES_PER_LATENT
    if not available:
        raise RowError("TooShort", f"{len(frames)} frames at {config.fps} fps; a chunk has {FRAMES_PER_LATENT}")
    groups = frames[: available * FRAMES_PER_LATENT].reshape(available, FRAMES_PER_LATENT, *frames.shape[1:])
    chosen = np.unique(np.linspace(0, available - 1, min(available, config.chunks_per_clip)).round().astype(int))
    return np.ascontiguousarray(groups[chosen])


def _centre(frames: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.uint8]:
    top, left = (frames.shape[1] - side) // 2, (frames.shape[2] - side) // 2
    return np.ascontiguousarray(frames[:, top : top + side, left : left + side])


def contact_thumbnail(frame: npt.NDArray[np.uint8], side_px: int) -> bytes:
    """One uint8 RGB frame (H, W, 3) -> JPEG bytes of at most `side_px` on its long edge."""
    scale = side_px / max(frame.shape[:2])
    size = (max(1, round(frame.shape[1] * scale)), max(1, round(frame.shape[0] * scale)))
    small = cv2.resize(frame, size, interpolation=cv2.INTER_AREA) if scale < 1 else frame
    ok, encoded = cv2.imencode(".jpg", small[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])
    if not ok:
        raise RowError("Thumbnail", f"a frame of {frame.shape} could not be encoded")
    return encoded.tobytes()
