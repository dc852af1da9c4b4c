"""From codes to pictures that people look at.

Shapes: T frames, H W pixels; t h w the same in codes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from model.vision_tokenizer.pixels import rgb_from_pixels
from model.vision_tokenizer.tokenizer import VisionTokenizer

Frames = npt.NDArray[np.uint8]


@torch.inference_mode()
def decode_codes(vision: VisionTokenizer, codes: npt.NDArray[Any], kind: str) -> Frames:
    """Codes (t, h, w) -> uint8 RGB frames (T, H, W, 3), one frame for an image."""
    device = vision.quantize.embedding.weight.device
    codes_1thw = torch.from_numpy(np.ascontiguousarray(codes, np.int64)).unsqueeze(0).to(device)
    if kind == "image":
        return rgb_from_pixels(vision.decode(codes_1thw[:, 0]))
    return rgb_from_pixels(vision.decode_chunks(codes_1thw)[0])


def write_png(path: Path, image: Frames, facts: Mapping[str, str]) -> None:
    """An RGB image (H, W, 3) -> a PNG file that says these facts."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in facts.items():
        info.add_itxt(key, value)
    Image.fromarray(image).save(path, pnginfo=info)
