"""Technical scores: what light, focus and framing tell without any weights."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.samples import Image, SampleSpec
from schemas.recipe import Config, short_hash


class TechnicalConfig(Config):
    """Where the lines are drawn. All ours."""

    samples: SampleSpec = SampleSpec()
    clip_margin: int = Field(2, ge=0, le=64)  # luma this close to 0 or 255 has lost its detail
    grey_chroma: int = Field(5, ge=1, le=128)  # the largest difference of channels in a pixel without colour
    bar_luma_max: int = Field(24, ge=0, le=255)  # as cropdetect of ffmpeg: bars are black, a dark wall is none
    bar_spread_max: int = Field(12, ge=0, le=255)  # luma differences inside a bar: coding noise
    bars_max: float = Field(0.75, gt=0, le=1)  # a portrait in a landscape frame has 0.68

    @property
    def scorer_id(self) -> str:
        """Hash of family, version and parameters."""
        return short_hash({"family": "technical", "version": 2, **self.model_dump(mode="json")})


@dataclass(frozen=True)
class TechnicalValues:
    """What one picture measures; the score columns but for the count."""

    sharpness: float
    luma_mean: float
    luma_std: float
    clipped_ratio: float
    colourfulness: float
    monochrome_ratio: float
    letterbox_ratio: float


class TechnicalScorer:
    """Measures one picture at a time."""

    def __init__(self, config: TechnicalConfig) -> None:
        self._config = config

    def measure(self, image: Image) -> TechnicalValues:
        """BGR uint8 [height, width, 3] -> its values."""
        import cv2

        config = self._config
        luma: NDArray[np.uint8] = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)  # type: ignore[assignment]  # uint8 in and out
        mean, deviation = cv2.meanStdDev(luma)
        levels = np.bincount(luma.ravel(), minlength=256)
        clipped = levels[: config.clip_margin + 1].sum() + levels[255 - config.clip_margin :].sum()
        blue, green, red = cv2.split(image)
        spread = cv2.subtract(cv2.max(cv2.max(blue, green), red), cv2.min(cv2.min(blue, green), red))
        coloured = np.count_nonzero(spread > config.grey_chroma)
        return TechnicalValues(
            sharpness=float(cv2.meanStdDev(cv2.Laplacian(luma, cv2.CV_32F))[1].item() ** 2),
            luma_mean=float(mean.item()) / 255,
            luma_std=float(deviation.item()) / 255,
            clipped_ratio=float(clipped) / luma.size,
            colourfulness=colourfulness(image),
            monochrome_ratio=1.0 - float(coloured) / luma.size,
            letterbox_ratio=self._letterbox_ratio(luma),
        )

    def _letterbox_ratio(self, luma: NDArray[np.uint8]) -> float:
        """Share of the picture inside bars, which come in pairs: the narrower one counts twice. A picture that would be
        nearly all bars is a dark one.
        """
        height, width = luma.shape
        rows = 2 * min(self._bar(luma), self._bar(luma[::-1]))
        columns = 2 * min(self._bar(luma.T), self._bar(luma.T[::-1]))
        ratio = 1.0 - max(0, height - rows) * max(0, width - columns) / (height * width)
        return ratio if ratio <= self._config.bars_max else 0.0

    def _bar(self, luma: NDArray[np.uint8]) -> int:
        """Rows from the top that make one even, dark bar."""
        dark = luma.max(axis=1) <= self._config.bar_luma_max
        even = np.ptp(luma, axis=1) <= self._config.bar_spread_max
        level = np.abs(luma.mean(axis=1) - luma[0].mean()) <= self._config.bar_spread_max
        outside = np.flatnonzero(~(dark & even & level))
        return int(outside[0]) if outside.size else len(luma)


def colourfulness(image: Image) -> float:
    """BGR [height, width, 3] -> Hasler and Suesstrunk's M3 (2003): 0 grey, 33 moderate, 59 quite, over 100 vivid."""
    import cv2

    blue, green, red = cv2.split(image.astype(np.float32))
    red_green = cv2.meanStdDev(red - green)
    yellow_blue = cv2.meanStdDev((red + green) / 2 - blue)
    distance, deviation = (np.hypot(red_green[index].item(), yellow_blue[index].item()) for index in range(2))
    return float(deviation + 0.3 * distance)


def summarise(values: Sequence[TechnicalValues]) -> dict[str, float | int | None]:
    """Values of every sample of one clip -> their medians and the count, as columns of `score_technical`."""
    names = TechnicalValues.__dataclass_fields__
    if not values:
        return {**dict.fromkeys(names), "num_samples": 0}
    table = np.array([list(asdict(value).values()) for value in values])
    return {**dict(zip(names, np.median(table, axis=0).tolist(), strict=True)), "num_samples": len(values)}
