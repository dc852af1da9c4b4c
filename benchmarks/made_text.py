"""Samples of made videos with and without text, where what is on every sample is known by construction.

Surfaces are those that a detector of text may take for it: stripes, grids, walls of brick, windows, leaves, posts, grain. Words
are small or large, still, moving or scrolled, in one line or a page, all of the time or for a part of it.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from pipeline.samples import Image

WIDTH, HEIGHT = 456, 256
NUM_SAMPLES = 16
WORDS = [
    "river",
    "stone",
    "bridge",
    "market",
    "window",
    "garden",
    "Tuesday",
    "14:30",
    "open",
    "closed",
    "station",
    "ticket",
    "please",
    "mind",
    "the",
    "gap",
    "sale",
    "50%",
    "welcome",
    "to",
    "north",
    "street",
    "exit",
    "only",
    "Dr.",
    "Miller",
    "www.example.com",
    "news",
    "weather",
    "live",
    "number",
    "7",
    "chapter",
    "one",
    "the",
    "end",
]

Surface = Callable[[np.random.Generator], NDArray[np.uint8]]


@dataclass(frozen=True)
class MadeSample:
    """One sample of a made video: its picture, and whether it has text; None where all lines are cut by the picture's edge."""

    has_text: bool | None
    image: Image


def made_videos(num_of_each: int, seed: int = 0) -> Iterator[tuple[str, list[MadeSample]]]:
    """How many of each surface -> names and samples of that many videos without text and of as many with text."""
    for index, (name, surface) in enumerate(SURFACES.items()):
        for number in range(num_of_each):
            rng = _random(seed, index, number)
            yield f"{name} {number}", _video(rng, surface, writing=None)
            yield f"{name} {number} with text", _video(rng, surface, writing=_writing(rng))


def plain_video(name: str, number: int, seed: int = 0) -> list[MadeSample]:
    """A surface -> that very video of it without text."""
    return _video(_random(seed, list(SURFACES).index(name), number), SURFACES[name], writing=None)


def _random(seed: int, index: int, number: int) -> np.random.Generator:
    return np.random.default_rng([seed, index, number])


def _video(rng: np.random.Generator, surface: Surface, writing: "_Writing | None") -> list[MadeSample]:
    """Samples of a surface twice as wide and high as the picture, past which the camera moves or not."""
    ground = surface(rng)
    step = rng.uniform(-16, 16, 2) * rng.choice([0, 0.1, 1])
    grain, quality = rng.choice([0, 3, 10]), int(rng.integers(40, 95))
    samples = []
    for index in range(NUM_SAMPLES):
        left, top = (int(value) for value in np.clip((WIDTH / 2, HEIGHT / 2) + step * index, 0, (WIDTH, HEIGHT)))
        image = ground[top : top + HEIGHT, left : left + WIDTH].astype(np.float32)
        image += rng.normal(0, grain, image.shape)
        picture = Pillow.fromarray(np.clip(image, 0, 255).astype(np.uint8))
        has_text = False if writing is None else writing.write(picture, index)
        packed = io.BytesIO()
        picture.save(packed, "jpeg", quality=quality)
        samples.append(MadeSample(has_text, np.asarray(Pillow.open(packed).convert("RGB"))[..., ::-1].copy()))
    return samples


@dataclass(frozen=True)
class _Writing:
    """Lines of words, and where and when they are seen."""

    lines: list[str]
    height_px: int
    place: tuple[float, float]
    step: tuple[float, float]
    first: int
    after_last: int
    plate: bool
    bright: bool

    def write(self, picture: Pillow.Image, index: int) -> bool | None:
        """Write what is seen in a sample; returns whether there is any, and None if every line is cut."""
        if not self.first <= index < self.after_last:
            return False
        draw, font = ImageDraw.Draw(picture), ImageFont.load_default(self.height_px)
        left, top = (start + step * index for start, step in zip(self.place, self.step, strict=True))
        inside = touching = False
        for number, line in enumerate(self.lines):
            box = draw.textbbox((left, top + number * 1.5 * self.height_px), line, font=font)
            if self.plate:
                draw.rectangle(
                    (box[0] - 4, box[1] - 4, box[2] + 4, box[3] + 4), fill="black" if self.bright else "white"
                )
            draw.text(
                (left, top + number * 1.5 * self.height_px),
                line,
                font=font,
                fill="white" if self.bright else "black",
                stroke_width=0 if self.plate else max(1, self.height_px // 16),
                stroke_fill="black" if self.bright else "white",
            )
            inside |= box[0] >= 0 and box[2] <= WIDTH and box[1] >= 0 and box[3] <= HEIGHT
            touching |= box[0] < WIDTH and box[2] > 0 and box[1] < HEIGHT and box[3] > 0
        return inside or (None if touching else False)


def _writing(rng: np.random.Generator) -> _Writing:
    height_px = int(rng.choice([11, 14, 18, 24, 36, 56]))
    num_lines = int(rng.integers(1, max(2, min(9, 150 // height_px))))
    words = max(2, min(6, 380 // (height_px * 4)))
    lines = [" ".join(rng.choice(WORDS, int(rng.integers(2, words + 1)))) for _ in range(num_lines)]
    way = rng.choice(["still", "moving", "scrolled"])
    first = int(rng.choice([0, 0, 4]))
    return _Writing(
        lines=lines,
        height_px=height_px,
        place=(float(rng.uniform(4, 60)), float(rng.uniform(4, 200 - 20 * min(num_lines, 8)))),
        step={"still": (0.0, 0.0), "moving": (float(rng.uniform(-3, 8)), 2.0), "scrolled": (0.0, -12.0)}[str(way)],
        first=first,
        after_last=int(rng.choice([NUM_SAMPLES, NUM_SAMPLES, first + 6])),
        plate=bool(rng.random() < 0.3),
        bright=bool(rng.random() < 0.6),
    )


def _coloured(grey: NDArray[np.floating[Any]], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Values 0 to 1 [height, width] -> a picture between two colours."""
    low, high = rng.uniform(0, 110, 3), rng.uniform(110, 255, 3)
    picture = low + np.clip(grey, 0, 1)[..., np.newaxis] * (high - low)
    return cv2.GaussianBlur(picture.astype(np.uint8), (0, 0), float(rng.uniform(0.4, 1.5))).astype(np.uint8)


def _noise(rng: np.random.Generator, octaves: int = 6, weight: float = 0.6) -> NDArray[np.float32]:
    """Noise of several sizes, 0 to 1."""
    total = np.zeros((2 * HEIGHT, 2 * WIDTH), np.float32)
    for octave in range(octaves):
        size = (2 * WIDTH >> (octaves - octave), 2 * HEIGHT >> (octaves - octave))
        layer = rng.random((max(2, size[1]), max(2, size[0])), dtype=np.float32)
        total += weight**octave * cv2.resize(layer, (2 * WIDTH, 2 * HEIGHT), interpolation=cv2.INTER_CUBIC)
    return np.asarray((total - total.min()) / (total.max() - total.min()), np.float32)


def _axes() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    down, right = np.mgrid[0 : 2 * HEIGHT, 0 : 2 * WIDTH].astype(np.float32)
    return down, right


def _stripes(rng: np.random.Generator) -> NDArray[np.uint8]:
    down, right = _axes()
    angle, period = rng.uniform(0, np.pi), rng.uniform(4, 40)
    return _coloured(
        (np.sin((right * np.cos(angle) + down * np.sin(angle)) * 2 * np.pi / period) > 0) * np.float32(1), rng
    )


def _grid(rng: np.random.Generator) -> NDArray[np.uint8]:
    down, right = _axes()
    period, line = rng.uniform(8, 40), rng.uniform(1, 4)
    return _coloured(np.asarray((right % period < line) | (down % period < line), np.float32), rng)


def _bricks(rng: np.random.Generator) -> NDArray[np.uint8]:
    down, right = _axes()
    height = rng.uniform(8, 24)
    shifted = right + (down // height % 2) * height
    mortar = ((down % height) < 2) | ((shifted % (2 * height)) < 2)
    return _coloured(np.where(mortar, np.float32(0.9), 0.5 * _noise(rng)), rng)


def _windows(rng: np.random.Generator) -> NDArray[np.uint8]:
    down, right = _axes()
    period, share = rng.uniform(12, 48), rng.uniform(0.4, 0.8)
    lit = rng.random((2 * HEIGHT, 2 * WIDTH), dtype=np.float32)
    lit = lit[(down // period).astype(int), (right // (0.7 * period)).astype(int)]
    inside = ((right % (0.7 * period)) < share * 0.7 * period) & ((down % period) < share * period)
    return _coloured(np.where(inside, lit, np.float32(0.5)), rng)


def _leaves(rng: np.random.Generator) -> NDArray[np.uint8]:
    picture = _noise(rng, octaves=7, weight=0.9)
    return _coloured((picture - 0.5) * 3 + 0.5, rng)


def _posts(rng: np.random.Generator) -> NDArray[np.uint8]:
    """Short strokes in rows, as in a fence, a shelf or a keyboard."""
    picture = Pillow.new("L", (2 * WIDTH, 2 * HEIGHT), 60)
    draw = ImageDraw.Draw(picture)
    height, gap = int(rng.integers(10, 60)), int(rng.integers(4, 16))
    for top in range(0, 2 * HEIGHT, height + int(rng.integers(6, 60))):
        for left in range(0, 2 * WIDTH, gap):
            lean, wide = int(rng.integers(-3, 4)), int(rng.integers(1, max(2, gap - 2)))
            draw.line(
                (left, top + int(rng.integers(0, 4)), left + lean, top + height),
                fill=int(rng.integers(120, 255)),
                width=wide,
            )
    return _coloured(np.asarray(picture, np.float32) / 255, rng)


def _things(rng: np.random.Generator) -> NDArray[np.uint8]:
    """Rings, boxes and lines over something soft."""
    picture = cv2.cvtColor(_coloured(_noise(rng, 4), rng), cv2.COLOR_BGR2RGB)
    for _ in range(60):
        place = tuple(int(value) for value in rng.uniform(0, (2 * WIDTH, 2 * HEIGHT)))
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        size, thick = int(rng.integers(3, 50)), int(rng.choice([-1, 1, 2, 4]))
        if rng.random() < 0.5:
            cv2.circle(picture, place, size, colour, thick, cv2.LINE_AA)
        else:
            cv2.rectangle(
                picture, place, (place[0] + size, place[1] + int(rng.integers(3, 50))), colour, thick, cv2.LINE_AA
            )
    return picture.astype(np.uint8)


def _soft(rng: np.random.Generator) -> NDArray[np.uint8]:
    return _coloured(_noise(rng, octaves=5, weight=0.4), rng)


SURFACES: dict[str, Surface] = {
    "stripes": _stripes,
    "grid": _grid,
    "bricks": _bricks,
    "windows": _windows,
    "leaves": _leaves,
    "posts": _posts,
    "things": _things,
    "soft": _soft,
}
