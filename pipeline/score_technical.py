"""Technical scores: what light, focus, coding and framing tell without any weights."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.picture_noise import blockiness, noise_deviation
from pipeline.samples import Image, Sample, SampleSpec, block_means
from schemas.recipe import Config, short_hash

REPEAT_LINES, REPEAT_COLUMNS = 64, 256  # pixels of a frame that are compared with those of the frame before
RUNS_PER_LINE = 32
REPEAT_TOLERANCE = 8  # change of a run's colour: what coders refine in a frame they repeat
RIM_SHARE = 32  # of each side; edges of frames and bars are sharp in the softest film
TONE_ROUNDS = 3
Lines = list[NDArray[np.int16]]
"""The lowest, the highest and the mean luma of every row, or of every column, of a picture."""

FRAMED_PERCENTILE = 99  # of the luma inside bars: how light the picture gets
TONE_STRIDE = 4  # every fourth pixel each way is enough to fit a tone to


class TechnicalConfig(Config):
    """Where the lines are drawn. All ours."""

    samples: SampleSpec = SampleSpec()
    clip_margin: int = Field(2, ge=0, le=64)  # luma this close to 0 or 255 has lost its detail
    grey_chroma: int = Field(5, ge=1, le=128)  # the largest difference of channels in a pixel without colour
    tone_chroma: int = Field(3, ge=1, le=128)  # chroma this near to the picture's one tone is of that tone
    bar_luma_max: int = Field(24, ge=0, le=255)  # as cropdetect of ffmpeg: bars are black, a dark wall is none
    bar_spread_max: int = Field(12, ge=0, le=255)  # luma differences inside a bar: coding noise
    bars_max: float = Field(0.75, gt=0, le=1)  # a portrait in a landscape frame has 0.68
    frozen_tolerance: int = Field(2, ge=0, le=255)  # change of a block's colour that leaves a picture the same

    @property
    def scorer_id(self) -> str:
        """Hash of family, version and parameters."""
        return short_hash({"family": "technical", "version": 3, **self.model_dump(mode="json")})


@dataclass(frozen=True)
class Area:
    """The part of a picture inside its bars, in pixels: columns [left, right), rows [top, bottom)."""

    left: int
    top: int
    right: int
    bottom: int

    def of(self, image: Image) -> Image:
        """A picture -> that part of it."""
        return image[self.top : self.bottom, self.left : self.right]


@dataclass(frozen=True)
class TechnicalValues:
    """What one sample measures. `frozen` is 1 where nothing changed since the sample before, None without one."""

    sharpness: float
    blockiness: float
    noise: float
    luma_mean: float
    luma_std: float
    clipped_ratio: float
    colourfulness: float
    monochrome_ratio: float
    single_tone_ratio: float
    letterbox_ratio: float
    active_left: float
    active_top: float
    active_right: float
    active_bottom: float
    frozen: float | None


class TechnicalScorer:
    """Measures one sample at a time, inside its bars: those say nothing about the light or colour of what is shown.

    Sharpness, light and colour are measured at the samples' size, so that they do not depend on that of the medium;
    coding blocks and noise, which shrinking takes away, on the middle of the frame at full size.
    """

    def __init__(self, config: TechnicalConfig) -> None:
        self._config = config
        self._last_blocks: tuple[Sample, Image] | None = None  # of the sample that is the next one's `before`

    def measure(self, sample: Sample, before: Sample | None) -> TechnicalValues:
        """A sample, and the one before if any -> its values."""
        import cv2

        config = self._config
        if sample.detail is None:
            raise ValueError("coding blocks and noise are measured at full size: the sample needs its detail")
        height, width = sample.image.shape[:2]
        area = self._active_area(_luma(sample.image))
        image = area.of(sample.image)
        luma = _luma(image)
        mean, deviation = cv2.meanStdDev(luma)
        levels = np.bincount(luma.ravel(), minlength=256)
        clipped = levels[: config.clip_margin + 1].sum() + levels[255 - config.clip_margin :].sum()
        blue, green, red = cv2.split(image)
        spread = cv2.subtract(cv2.max(cv2.max(blue, green), red), cv2.min(cv2.min(blue, green), red))
        coloured = np.count_nonzero(spread > config.grey_chroma)
        detail = _luma(sample.detail)
        return TechnicalValues(
            sharpness=sharpness(luma),
            blockiness=blockiness(detail),
            noise=noise_deviation(detail),
            luma_mean=float(mean.item()) / 255,
            luma_std=float(deviation.item()) / 255,
            clipped_ratio=float(clipped) / luma.size,
            colourfulness=colourfulness(image),
            monochrome_ratio=1.0 - float(coloured) / luma.size,
            single_tone_ratio=max(1.0 - float(coloured) / luma.size, single_tone_ratio(image, config.tone_chroma)),
            letterbox_ratio=1.0 - luma.size / (height * width),
            active_left=area.left / width,
            active_top=area.top / height,
            active_right=area.right / width,
            active_bottom=area.bottom / height,
            frozen=None if before is None else float(self._is_frozen(before, sample)),
        )

    def _active_area(self, luma: NDArray[np.uint8]) -> Area:
        """The picture inside its bars, which come in pairs: of each pair the narrower one counts twice. A picture that
        would be nearly all bars is a dark one, and so is one that is hardly lighter than they: which of its edges are
        even is chance there, and another with every codec.
        """
        import cv2

        height, width = luma.shape
        lines: list[Lines] = []
        for axis in (0, 1):  # along columns, then along rows
            means = cv2.reduce(luma, axis, cv2.REDUCE_AVG).ravel()
            lines.append([values.astype(np.int16) for values in (luma.min(axis=axis), luma.max(axis=axis), means)])
        across, down = (min(self._bar(side), self._bar([part[::-1] for part in side])) for side in lines)
        area = Area(across, down, width - across, height - down)
        framed = area.of(luma)
        if across + down and (
            not framed.size
            or 1 - framed.size / luma.size > self._config.bars_max
            or np.percentile(framed, FRAMED_PERCENTILE) <= self._config.bar_luma_max + self._config.bar_spread_max
        ):
            return Area(0, 0, width, height)
        return area

    def _bar(self, lines: Lines) -> int:
        """Lines from the first that make one even, dark bar."""
        lowest, highest, mean = lines
        even = highest - lowest <= self._config.bar_spread_max
        level = np.abs(mean - mean[0]) <= self._config.bar_spread_max
        outside = np.flatnonzero(~((highest <= self._config.bar_luma_max) & even & level))
        return int(outside[0]) if outside.size else len(mean)

    def _is_frozen(self, before: Sample, after: Sample) -> bool:
        import cv2

        known, blocks = self._last_blocks or (None, None)
        old = blocks if blocks is not None and known is before else block_means(before.image)
        new = block_means(after.image)
        self._last_blocks = after, new
        return old.shape == new.shape and int(cv2.absdiff(old, new).max()) <= self._config.frozen_tolerance


def repeat_lines(image: Image) -> Image:
    """A frame, BGR at full size, or a smaller picture of it -> those of its pixels by which repeated frames are told."""
    import cv2

    size = min(image.shape[1], REPEAT_COLUMNS), min(image.shape[0], REPEAT_LINES)
    return cv2.resize(image, size, interpolation=cv2.INTER_NEAREST)  # type: ignore[return-value]  # uint8 in, uint8 out


def is_repeat(before: Image, after: Image) -> bool:
    """`repeat_lines` of two frames -> whether they show the same, but for what a coder refines."""
    import cv2

    if before.shape != after.shape:
        return False
    run_px = max(1, after.shape[1] // RUNS_PER_LINE)
    return int(cv2.blur(cv2.absdiff(before, after), (run_px, 1)).max()) <= REPEAT_TOLERANCE


def repeated_ratio(repeats: Sequence[bool]) -> float | None:
    """For each frame of one clip whether it repeats the one before: slowed footage, screens, streams that hang -> their
    share, without the first frame.
    """
    return sum(repeats[1:]) / (len(repeats) - 1) if len(repeats) > 1 else None


def sharpness(luma: NDArray[np.uint8]) -> float:
    """Luma [height, width] -> variance of its Laplacian, away from the rim."""
    import cv2

    rim, edge = (side // RIM_SHARE for side in luma.shape)
    response = cv2.Laplacian(luma, cv2.CV_32F)[rim : luma.shape[0] - rim, edge : luma.shape[1] - edge]
    return float(cv2.meanStdDev(response)[1].item() ** 2)


def colourfulness(image: Image) -> float:
    """BGR [height, width, 3] -> Hasler and Suesstrunk's M3 (2003): 0 grey, 33 moderate, 59 quite, over 100 vivid."""
    import cv2

    blue, green, red = cv2.split(image.astype(np.float32))
    red_green = cv2.meanStdDev(red - green)
    yellow_blue = cv2.meanStdDev((red + green) / 2 - blue)
    distance, deviation = (np.hypot(red_green[index].item(), yellow_blue[index].item()) for index in range(2))
    return float(deviation + 0.3 * distance)


def single_tone_ratio(image: Image, tolerance: int) -> float:
    """BGR [height, width, 3] -> share of pixels whose chroma follows from their luma, as in grey, sepia and tinted pictures.

    Both chroma channels are fitted by parabolas of luma, reweighted to near the least absolute error.
    """
    import cv2

    pixels = np.ascontiguousarray(image[::TONE_STRIDE, ::TONE_STRIDE])
    luma, *chroma = cv2.split(cv2.cvtColor(pixels, cv2.COLOR_BGR2YCrCb).astype(np.float64))
    light = luma.ravel() / 255 - 0.5
    powers = np.stack([light**power for power in range(5)])
    toned = np.ones(light.shape, bool)
    for values in chroma:
        weights, level = np.ones_like(light), values.ravel()
        for _ in range(TONE_ROUNDS):
            moments = (powers * weights).sum(axis=1)
            matrix = np.array([[moments[row + column] for column in range(3)] for row in range(3)])
            target = (powers[:3] * (weights * level)).sum(axis=1)
            fit = np.linalg.lstsq(matrix, target, rcond=1e-9)[0]
            distance = np.abs(level - (fit[:, np.newaxis] * powers[:3]).sum(axis=0))
            weights = 1 / np.maximum(distance, 1.0)
        toned &= distance <= tolerance
    return float(toned.mean())


def summarise(values: Sequence[TechnicalValues]) -> dict[str, float | int | None]:
    """Values of every sample of one clip -> their medians, the share of frozen pairs and the count, as columns of
    `score_technical`. The first sample's `frozen` reaches into the clip before.
    """
    names = [name for name in TechnicalValues.__dataclass_fields__ if name != "frozen"]
    pairs = [value.frozen for value in values[1:] if value.frozen is not None]
    frozen = float(np.mean(pairs)) if pairs else None
    if not values:
        return {**dict.fromkeys(names), "frozen_ratio": frozen, "num_samples": 0}
    table = np.array([[getattr(value, name) for name in names] for value in values])
    medians = dict(zip(names, np.median(table, axis=0).tolist(), strict=True))
    return {**medians, "frozen_ratio": frozen, "num_samples": len(values)}


def _luma(image: Image) -> NDArray[np.uint8]:
    import cv2

    return cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)  # type: ignore[return-value]  # uint8 in and out
