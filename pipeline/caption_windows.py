"""What a captioner is shown of a clip: windows of it, and frames of each window."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from pipeline.read_frames import read_frames
from schemas.recipe import Config


class WindowConfig(Config):
    """How clips are cut into windows, and how many frames of which size speak for one."""

    max_s: float = Field(default=20.0, gt=0)  # Paper: Emu3 report, appendix on video data: sub-clips of 10 to 20 s
    num_frames: int = Field(default=12, ge=1)  # Paper: the same: 12 uniform frames
    video_area_px: int = Field(default=768 * 28 * 28, gt=0)  # ours: Qwen's own limit for a frame
    image_area_px: int = Field(default=1280 * 28 * 28, gt=0)  # ours: Qwen's advice; the model may shrink further
    max_image_pixels: int = Field(default=120_000_000, gt=0)
    timeout_s: float = Field(default=120.0, gt=0)
    memory_mb: int = Field(default=4096, gt=0)

    def identity(self) -> dict[str, object]:
        """What a caption depends on: not the limits of decoding."""
        return self.model_dump(mode="json", exclude={"max_image_pixels", "timeout_s", "memory_mb"})


@dataclass(frozen=True)
class Window:
    """One stretch of a clip, in milliseconds of its medium."""

    index: int
    start_ms: int
    end_ms: int


def windows(start_ms: int, end_ms: int, max_s: float) -> list[Window]:
    """A clip's span -> windows of equal length, no longer than `max_s`, and so never shorter than half of it."""
    length_ms = end_ms - start_ms
    count = max(1, math.ceil(length_ms / (1000 * max_s)))
    edges = [start_ms + round(length_ms * index / count) for index in range(count + 1)]
    return [Window(index, edges[index], edges[index + 1]) for index in range(count)]


def window_frames(item: Mapping[str, Any], config: WindowConfig) -> npt.NDArray[np.uint8]:
    """A window (uri, kind, window_start_ms, window_end_ms) -> uint8 RGB (T, H, W, 3), T = 1 for an image.

    Larger pictures are shrunk to the area of the config, aspect ratio kept; smaller ones are left as they are.
    """
    is_image = item["kind"] == "image"
    area_px = config.image_area_px if is_image else config.video_area_px

    def size(height_px: int, width_px: int) -> tuple[int, int]:
        scale = min(1.0, math.sqrt(area_px / (height_px * width_px)))
        return max(1, round(height_px * scale)), max(1, round(width_px * scale))

    return read_frames(
        Path(item["uri"]),
        item["window_start_ms"],
        item["window_end_ms"],
        num_frames=None if is_image else config.num_frames,
        size=size,
        max_pixels=config.max_image_pixels,
    )
