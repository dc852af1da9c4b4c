"""Small real media for flow tests: pictures that differ by seed, and videos with a cut at a known frame."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image


def write_image(path: Path, seed: int, side_px: int = 96) -> None:
    """A PNG of smooth random colour."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(small).resize((side_px, side_px), Image.Resampling.BICUBIC).save(path)


def write_video(path: Path, seed: int, shots: int = 2, frames_per_shot: int = 20, side_px: int = 96) -> list[int]:
    """An H.264 video of `shots` sliding textures; returns the frames at which a new shot starts."""
    rng = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(20))
        stream.width = stream.height = side_px
        stream.pix_fmt = "yuv420p"
        for shot in range(shots):
            # Alternate dark and light shots: a cut that nobody can miss.
            low, high = (140, 240) if shot % 2 else (20, 110)
            small = rng.integers(low, high, (6, 12, 3), dtype=np.uint8)
            wide = np.asarray(Image.fromarray(small).resize((side_px * 2, side_px), Image.Resampling.BICUBIC))
            for index in range(frames_per_shot):
                frame = np.ascontiguousarray(wide[:, index : index + side_px])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return [shot * frames_per_shot for shot in range(1, shots)]
