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

from pipeline.changed_region import STRIDE_PX, Region
from pipeline.samples import Image, SampleSpec, block_means
from schemas.errors import ConfigError
from schemas.recipe import Config, short_hash

PART_MAX = 0.8  # of the picture: a part that is larger costs as much as all of it
MARGIN_PX = 16  # of what did not change around what did: letters are found by their surroundings
NORMAL_MEAN = np.float32(0.5)
NORMAL_STD = np.float32(0.5)
LINE_HEIGHT_PX = 48  # the recogniser's input
LINE_WIDTH_PX = 320
LINE_WIDTH_MAX_PX = 960
UPRIGHT_RATIO = 1.5  # a polygon this much taller than wide is a line that runs upwards
CTC_BLANK = 0
EDGE_STEP = 12  # change of brightness over two pixels: faint letters have more
COLOUR_STEP = 32  # change of one channel, for letters as bright as their ground


Polygon = NDArray[np.float32]
"""Four corners [4, (right, down)] in pixels, clockwise from the top left."""


class TextConfig(Config):
    """PP-OCR's text detector (DB), from inside the rapidocr wheel. Paper: Emu3 names PaddleOCR, at 2 fps and 256."""

    samples: SampleSpec = SampleSpec()
    detector: str = "PP-OCRv6_det_small"
    recogniser: str = "PP-OCRv6_rec_small"
    pixel_threshold: float = Field(0.3, gt=0, lt=1)  # RapidOCR's default
    box_threshold: float = Field(0.5, gt=0, lt=1)  # likewise
    unclip_ratio: float = Field(1.6, gt=0)  # likewise: how far a polygon grows beyond the text's core
    line_height_max: float = Field(0.15, gt=0)  # ours: of the short edge; what is thicker must be readable
    characters_min: int = Field(3, ge=1)  # ours
    unread_max: float = Field(0.1, gt=0)  # ours: more of the picture counts in whatever script
    readings: int = Field(2, ge=1)  # ours: lines read, the longest first, until one is readable
    confidence_min: float = Field(0.5, ge=0, le=1)  # RapidOCR drops lines below it
    edges_min: int = Field(6, ge=0)  # ours: two to a stroke, three strokes to the shortest word; 0 looks everywhere
    still_tolerance: int = Field(8, ge=0, le=255)  # ours: change of a block's colour that leaves it the same
    waits: int = Field(1, ge=0)  # ours: samples not looked at after one without text
    present_min: float = Field(0.015, ge=0, le=1)  # ours, measured (docs/experiments/text.md): less is mostly no text
    scene_change: float = Field(32.0, ge=0)  # ours: mean change of colours that ends such a wait

    @property
    def scorer_id(self) -> str:
        """Hash of family, version and parameters."""
        return short_hash({"family": "text", "version": 4, **self.model_dump(mode="json")})


@dataclass(frozen=True)
class SampleCoverage:
    """The share of one sample inside text polygons, and when the sample is shown, in seconds."""

    seconds: float
    coverage: float


@dataclass(frozen=True)
class TextScores:
    """Columns of `score_text`."""

    text_coverage_max: float | None
    text_coverage_mean: float | None
    text_ratio: float | None
    sample_s: list[float]
    sample_text_coverage: list[float]
    num_samples: int


class TextScorer:
    """Measures one picture at a time, in order: what did not change since it was last looked at is not looked at again.

    Of a picture that changed in part, only that part is given to the detector, and polygons elsewhere stay. After a picture
    without text the next one waits, unless it shows another scene: text that nobody could read in half a second may be
    missed, for half the cost of film without text.

    The detector also marks posts, windows and large soft blobs. So a little of what it finds counts only if the recogniser
    reads at least a short word in one of the longest lines, or if lines that counted lay in the same place when it was last
    looked at. A lot counts unread, for the recogniser does not know every script. A polygon thicker than a line must be
    readable by itself. A picture without edges enough for a word in any line is not looked at: a proof of absence that costs
    a hundredth of the detector.
    """

    def __init__(self, config: TextConfig) -> None:
        from rapidocr.ch_ppocr_det.utils import DBPostProcess

        self._config = config
        self._detector = load_model(config.detector)
        self._polygons_of = DBPostProcess(
            thresh=config.pixel_threshold,
            box_thresh=config.box_threshold,
            unclip_ratio=config.unclip_ratio,
            use_dilation=True,
        )
        self._seen: Image | None = None  # mean colours of every block when it was last looked at
        self._polygons: list[Polygon] = []
        self._waited = 0

    def coverage(self, image: Image) -> float:
        """BGR uint8 [height, width, 3] -> share of its pixels inside the union of text polygons, 0 to 1."""
        blocks = block_means(image)
        region = self._region(blocks, image)
        if region is not None and not self._waits(blocks):
            self._look(image, blocks, region)
        return covered_share(self._polygons, image)

    def _region(self, blocks: Image, image: Image) -> Region | None:
        """The part of a picture that changed; None if there is none."""
        height, width = image.shape[:2]
        whole = Region(0, 0, width, height)
        if self._seen is None or self._seen.shape != blocks.shape:
            self._seen, self._polygons, self._waited = None, [], 0
            return whole
        changed = Region.around(_change(self._seen, blocks) > self._config.still_tolerance)
        if changed is None:
            return None
        changed = changed.with_margin(MARGIN_PX)
        for polygon in self._polygons:
            if changed.touches(polygon):
                changed = changed.including(polygon)
        changed = changed.on_strides(width, height)
        return changed if changed.num_pixels <= PART_MAX * whole.num_pixels else whole

    def _waits(self, blocks: Image) -> bool:
        if self._seen is None or self._polygons or self._waited >= self._config.waits:
            return False
        waits = float(_change(self._seen, blocks).mean()) < self._config.scene_change
        self._waited += waits
        return waits

    def _look(self, image: Image, blocks: Image, region: Region) -> None:
        kept = [polygon for polygon in self._polygons if not region.touches(polygon)]
        origin = np.array([region.left, region.top], np.float32)
        found = [
            polygon + origin for polygon in self._detect(np.ascontiguousarray(region.of(image)), min(image.shape[:2]))
        ]
        same_scene = self._seen is not None and float(_change(self._seen, blocks).mean()) < self._config.scene_change
        known = same_scene and any(_meet(before, now) for before in self._polygons for now in found)
        counts = known or covered_share(found, image) >= self._config.unread_max or self._any_readable(image, found)
        self._polygons = kept + (found if counts else [])
        if self._seen is None:
            self._seen = blocks.copy()
        region.of_blocks(self._seen)[:] = region.of_blocks(blocks)
        self._waited = 0

    def _detect(self, image: Image, short_edge_px: int) -> list[Polygon]:
        """A picture, or a part of one whose short edge is given -> corners of its lines of text."""
        if most_edges(image) < self._config.edges_min:
            return []
        probabilities = _run(self._detector, network_input(image))
        polygons, _ = self._polygons_of(probabilities, image.shape[:2])
        corners = [np.asarray(polygon, np.float32) for polygon in polygons]
        return [one for one in corners if self._is_line(one, short_edge_px) or self._is_readable(image, one)]

    def _any_readable(self, image: Image, polygons: list[Polygon]) -> bool:
        longest = sorted(polygons, key=lambda corners: -max(_sides(corners)))[: self._config.readings]
        return any(self._is_readable(image, corners) for corners in longest)

    def _is_line(self, corners: Polygon, short_edge_px: int) -> bool:
        return min(_sides(corners)) <= self._config.line_height_max * short_edge_px

    def _is_readable(self, image: Image, corners: Polygon) -> bool:
        num_characters, confidence = read_line(load_model(self._config.recogniser), straightened(image, corners))
        return num_characters >= self._config.characters_min and confidence >= self._config.confidence_min


def covered_share(polygons: Sequence[Polygon], image: Image) -> float:
    """Polygons and the picture they lie in -> share of its pixels inside their union."""
    import cv2

    if not polygons:
        return 0.0
    inside = np.zeros(image.shape[:2], np.uint8)
    for polygon in polygons:
        cv2.fillPoly(inside, [polygon.astype(np.int32)], 1)
    return float(inside.mean(dtype=np.float64))


def summarise(values: Sequence[SampleCoverage], present_min: float) -> TextScores:
    """Every sample of one clip, in order -> its scores. `present_min` is the coverage from which a sample has text."""
    seconds, coverages = [value.seconds for value in values], [value.coverage for value in values]
    if not values:
        return TextScores(None, None, None, [], [], 0)
    present = [coverage >= present_min for coverage in coverages]
    return TextScores(
        max(coverages), float(np.mean(coverages)), float(np.mean(present)), seconds, coverages, len(values)
    )


def _change(before: Image, after: Image) -> NDArray[np.uint8]:
    """Mean colours of blocks -> the largest change of a channel in each."""
    import cv2

    return cv2.absdiff(before, after).max(axis=2)  # type: ignore[no-any-return]


def network_input(image: Image) -> NDArray[np.float32]:
    """BGR uint8 [height, width, 3] -> float32 [1, 3, H, W] in -1..1 with sides that the network takes.

    Small pictures keep their size: upscaling to the 736 pixels of an OCR run costs 13 times as much, for text that the
    samples do not resolve.
    """
    import cv2

    height, width = (max(STRIDE_PX, round(side / STRIDE_PX) * STRIDE_PX) for side in image.shape[:2])
    fitted = _normalised(cv2.resize(image, (width, height)))
    return np.ascontiguousarray(fitted.transpose(2, 0, 1)[np.newaxis])


def most_edges(image: Image) -> int:
    """BGR uint8 [height, width, 3] -> the most edges, light to dark or dark to light, along any row or column of pixels."""
    import cv2

    grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    planes = [(grey, EDGE_STEP), *((image[..., channel], COLOUR_STEP) for channel in range(3))]
    return max(
        _edges_along_rows(np.ascontiguousarray(lines), step) for plane, step in planes for lines in (plane, plane.T)
    )


def _edges_along_rows(plane: NDArray[Any], step: int) -> int:
    """uint8 [rows, columns] -> the most places in a row where a change of at least `step` over two pixels begins."""
    if plane.shape[1] < 3:
        return 0
    change = plane[:, 2:].astype(np.int16) - plane[:, :-2]
    rising, falling = change >= step, change <= -step
    begins = [side[:, 0] + (side[:, 1:] & ~side[:, :-1]).sum(axis=1) for side in (rising, falling)]
    return int((begins[0] + begins[1]).max())


def straightened(image: Image, corners: NDArray[np.float32]) -> Image:
    """A picture and the corners of a polygon in it, clockwise from the top left -> that part, upright."""
    import cv2

    width, height = (max(1, round(side)) for side in _sides(corners))
    target = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
    part = cv2.warpPerspective(
        image, cv2.getPerspectiveTransform(corners, target), (width, height), borderMode=cv2.BORDER_REPLICATE
    )
    upright = np.rot90(part) if height >= UPRIGHT_RATIO * width else part
    return np.ascontiguousarray(upright, np.uint8)


def read_line(recogniser: Any, line: Image) -> tuple[int, float]:
    """A recogniser and a picture of one line -> how many characters it reads, and its mean confidence in them."""
    import cv2

    width = round(min(max(line.shape[1] * LINE_HEIGHT_PX / line.shape[0], LINE_HEIGHT_PX), LINE_WIDTH_MAX_PX))
    fitted = _normalised(cv2.resize(line, (width, LINE_HEIGHT_PX)))
    padded = np.pad(fitted, ((0, 0), (0, max(0, LINE_WIDTH_PX - width)), (0, 0)))
    steps = _run(recogniser, np.ascontiguousarray(padded.transpose(2, 0, 1)[np.newaxis]))[0]  # [steps, characters]
    best = steps.argmax(axis=1)
    new = np.concatenate(([True], best[1:] != best[:-1])) & (best != CTC_BLANK)
    return int(new.sum()), float(steps.max(axis=1)[new].mean()) if new.any() else 0.0


def _meet(one: Polygon, other: Polygon) -> bool:
    """Whether the upright boxes of two polygons share a point."""
    return bool((one.min(axis=0) <= other.max(axis=0)).all() and (other.min(axis=0) <= one.max(axis=0)).all())


def _sides(corners: NDArray[np.float32]) -> tuple[float, float]:
    width = max(np.linalg.norm(corners[0] - corners[1]), np.linalg.norm(corners[3] - corners[2]))
    height = max(np.linalg.norm(corners[0] - corners[3]), np.linalg.norm(corners[1] - corners[2]))
    return float(width), float(height)


def _normalised(image: NDArray[Any]) -> NDArray[np.float32]:
    return (image.astype(np.float32) / np.float32(255) - NORMAL_MEAN) / NORMAL_STD


def _run(model: Any, values: NDArray[np.float32]) -> NDArray[np.float32]:
    outputs: list[NDArray[np.float32]] = model.run(None, {model.get_inputs()[0].name: values})
    return outputs[0]


@cache
def load_model(name: str) -> Any:
    """The name of a model of the rapidocr wheel -> its ONNX session on one CPU thread, loaded once a process.

    Raises: ConfigError if the installed rapidocr has no such model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(model_path(name)), options, providers=["CPUExecutionProvider"])


def model_path(name: str) -> Path:
    """The name of a model -> its file inside the rapidocr wheel. Raises: ConfigError if there is none."""
    spec = importlib.util.find_spec("rapidocr")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("the text scorer needs rapidocr, which is not installed")
    folder = Path(spec.submodule_search_locations[0]) / "models"
    path = folder / f"{name}.onnx"
    if not path.is_file():
        found = ", ".join(sorted(file.stem for file in folder.glob("*.onnx"))) or "none"
        raise ConfigError(f"rapidocr has no model {name!r}; it has: {found}")
    return path
