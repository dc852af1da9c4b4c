"""Text score: the share of the picture that text covers."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.samples import Image, SampleSpec
from schemas.errors import ConfigError
from schemas.recipe import Config, short_hash

STRIDE_PX = 32  # the network's sides are multiples of this
NORMAL_MEAN = 0.5
NORMAL_STD = 0.5


class TextConfig(Config):
    """PP-OCR's text detector (DB), from inside the rapidocr wheel. Paper: Emu3 names PaddleOCR, at 2 fps and 256."""

    samples: SampleSpec = SampleSpec()
    model: str = "PP-OCRv6_det_small"
    pixel_threshold: float = Field(0.3, gt=0, lt=1)  # RapidOCR's default
    box_threshold: float = Field(0.5, gt=0, lt=1)  # likewise
    unclip_ratio: float = Field(1.6, gt=0)  # likewise: how far a polygon grows beyond the text's core

    @property
    def scorer_id(self) -> str:
        """Hash of family, version and parameters."""
        return short_hash({"family": "text", "version": 1, **self.model_dump(mode="json")})


@dataclass(frozen=True)
class TextScores:
    """Columns of `score_text`."""

    text_coverage_max: float | None
    text_coverage_mean: float | None
    num_samples: int


class TextScorer:
    """Measures one picture at a time. A picture equal to the one before it is not looked at again."""

    def __init__(self, config: TextConfig) -> None:
        from rapidocr.ch_ppocr_det.utils import DBPostProcess

        self._session = load_detector(config.model)
        self._input = self._session.get_inputs()[0].name
        self._polygons = DBPostProcess(
            thresh=config.pixel_threshold,
            box_thresh=config.box_threshold,
            unclip_ratio=config.unclip_ratio,
            use_dilation=True,
        )
        self._last: tuple[Image, float] | None = None

    def coverage(self, image: Image) -> float:
        """BGR uint8 [height, width, 3] -> share of its pixels inside the union of text polygons, 0 to 1."""
        if self._last is None or not np.array_equal(self._last[0], image):
            self._last = (image, self._measure(image))
        return self._last[1]

    def _measure(self, image: Image) -> float:
        import cv2

        height, width = image.shape[:2]
        probabilities = self._session.run(None, {self._input: network_input(image)})[0]
        polygons, _ = self._polygons(probabilities, (height, width))
        inside = np.zeros((height, width), np.uint8)
        for polygon in polygons:
            cv2.fillPoly(inside, [np.asarray(polygon, np.int32)], 1)
        return float(inside.mean(dtype=np.float64))


def summarise(values: Sequence[float]) -> TextScores:
    """Coverage of every sample of one clip -> its scores."""
    if not values:
        return TextScores(None, None, 0)
    return TextScores(max(values), float(np.mean(values)), len(values))


def network_input(image: Image) -> NDArray[np.float32]:
    """BGR uint8 [height, width, 3] -> float32 [1, 3, H, W] in -1..1 with sides that the network takes.

    Small pictures keep their size: upscaling to the 736 pixels of an OCR run costs 13 times as much, for text that the
    samples do not resolve.
    """
    import cv2

    height, width = (max(STRIDE_PX, round(side / STRIDE_PX) * STRIDE_PX) for side in image.shape[:2])
    fitted = cv2.resize(image, (width, height))
    scaled = (fitted.astype(np.float32) / 255 - NORMAL_MEAN) / NORMAL_STD
    return np.ascontiguousarray(scaled.transpose(2, 0, 1)[np.newaxis], np.float32)


@cache
def load_detector(model: str) -> Any:
    """A model's name -> its ONNX session on one CPU thread, loaded once a process.

    Raises: ConfigError if the installed rapidocr has no such model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(model_path(model)), options, providers=["CPUExecutionProvider"])


def model_path(model: str) -> Path:
    """A model's name -> its file inside the rapidocr wheel. Raises: ConfigError if there is none."""
    spec = importlib.util.find_spec("rapidocr")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("the text scorer needs rapidocr, which is not installed")
    folder = Path(spec.submodule_search_locations[0]) / "models"
    path = folder / f"{model}.onnx"
    if not path.is_file():
        found = ", ".join(sorted(file.stem for file in folder.glob("*det*.onnx"))) or "none"
        raise ConfigError(f"rapidocr has no detector {model!r}; it has: {found}")
    return path
