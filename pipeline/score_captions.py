"""Caption scores: what captions of a clip are like, in numbers, so that thresholds can choose among them."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from pydantic import Field

from pipeline.caption_checks import repetition
from pipeline.caption_windows import WindowConfig, window_frames
from pipeline.clip_model import load_clip
from pipeline.failures import FailureBound
from pipeline.hub_files import local_folder
from pipeline.sandbox import Sandbox
from pipeline.stage import Rows
from schemas.captions import CAPTION_SCORES
from schemas.errors import ConfigError
from schemas.recipe import Config

VERSION = 1


class CaptionScoreConfig(Config):
    """What is scored beyond words. Without `clip` captions are scored alone, and no medium is opened."""

    clip: str | None = None
    """A CLIP model of open_clip: a folder with open_clip_config.json and weights, or `hf-hub:ORG/NAME`."""
    windows: WindowConfig = WindowConfig(num_frames=1, video_area_px=512 * 512, image_area_px=512 * 512)
    num_threads: int = Field(default=1, ge=1)
    failures: FailureBound = FailureBound()


class Similarity(Protocol):
    """Pictures and texts -> how well each text fits its picture, cosine in [-1, 1]."""

    def __call__(self, pictures: Sequence[np.ndarray], texts: Sequence[str]) -> list[float]:
        """Uint8 RGB pictures (H, W, 3) and texts -> cosines."""
        ...


class ClipSimilarity:
    """CLIP from a folder or the hub, on the CPU, or on a GPU that the worker sees."""

    def __init__(self, name: str, num_threads: int) -> None:
        import open_clip

        folder = str(local_folder(name))
        self._model, self._transform, self._device = load_clip(folder, num_threads)
        try:
            self._tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        except Exception as error:  # whatever its files make it raise
            raise ConfigError(f"{folder} has no tokenizer that loads: {type(error).__name__}: {error}") from error

    def __call__(self, pictures: Sequence[np.ndarray], texts: Sequence[str]) -> list[float]:
        """Uint8 RGB pictures (H, W, 3) and texts -> cosines."""
        import torch
        from PIL import Image

        images = torch.stack([self._transform(Image.fromarray(picture)) for picture in pictures]).to(self._device)
        with torch.inference_mode():
            seen = self._model.encode_image(images, normalize=True)
            said = self._model.encode_text(self._tokenizer(list(texts)).to(self._device), normalize=True)
        cosines: list[float] = (seen * said).sum(dim=-1).float().cpu().tolist()
        return cosines


def score_texts(texts: Sequence[str], problems: Sequence[str | None]) -> dict[str, float]:
    """Captions of a clip's windows -> the worst of each: fewest words, most repetition, and how many failed a check."""
    return {
        "words": float(min(len(text.split()) for text in texts)),
        "repetition": max(repetition(text) for text in texts),
        "problems": float(sum(problem is not None for problem in problems)),
    }


class CaptionScoreWorker:
    """Scores clips; with CLIP it reads the middle frame of each window in a child process."""

    def __init__(self, config: CaptionScoreConfig, scorer_id: str, captioner_id: str) -> None:
        self.config, self.scorer_id, self.captioner_id = config, scorer_id, captioner_id
        self.similarity: Similarity | None = ClipSimilarity(config.clip, config.num_threads) if config.clip else None
        self.sandbox = Sandbox(config.windows.timeout_s, config.windows.memory_mb)

    def process(self, item: Mapping[str, Any]) -> Rows:
        """One clip and its captions -> its `score_caption` row."""
        texts = [window["text"] for window in item["windows"]]
        row = {
            "clip_id": item["clip_id"],
            "scorer_id": self.scorer_id,
            "captioner_id": self.captioner_id,
            **score_texts(texts, [window["problem"] for window in item["windows"]]),
            "clip_similarity": self._similarity(item, texts),
        }
        return {CAPTION_SCORES.name: [row]}

    def _similarity(self, item: Mapping[str, Any], texts: list[str]) -> float | None:
        if self.similarity is None:
            return None
        place = {"uri": item["uri"], "kind": item["kind"]}
        pictures = [
            self.sandbox.run(window_frames, {**place, **window}, self.config.windows)[0] for window in item["windows"]
        ]
        return min(self.similarity(pictures, texts))
