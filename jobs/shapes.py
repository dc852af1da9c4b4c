"""A world small enough to learn in minutes and to judge by rule: one coloured shape, resting or moving, on dark grey.

The demo renders its corpus from this world, trains on it, asks for shapes in words, and `judge_*` say from the pixels
alone what was drawn. The judge is a fixed rule, so a trained model cannot flatter it; what it is worth is measured on
true renderings and on shuffled prompts (`score_images`, `score_videos`).

Lengths are in fractions of the frame edge, so that one scene has the same look at any size.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (250, 70, 60),
    "green": (50, 200, 75),
    "blue": (70, 125, 255),
    "yellow": (245, 220, 50),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

# What can be asked about a shape, by the name of the fact that answers it.
QUESTIONS = {"colour": "What colour is it?", "shape": "What shape is it?", "direction": "Where does it move?"}

# Places and sizes are steps, so that a few hundred pictures tell enough of this world. A step is what a code of a 64 x 64
# picture covers, and how far a moving shape goes in the four frames of a code at 8 frames per second.
STEPS_PER_EDGE = 8
SPEED_PER_S = 0.25  # frame edges: a two-second clip crosses almost half of the frame
MAX_TRAVEL = 0.48
GROUND = 52  # and a trace of tint, so that no two files are the same bytes
MARGIN = 0.02  # smallest gap between the shape and the edge of the frame
STILL_RADII = (0.26, 0.30, 0.34)  # 17 to 22 px at 64x64
MOVING_RADII = (0.21, 0.23)  # smaller, so that the shape has room to travel

JUDGE_EDGE_PX = 64
MIN_CHROMA = 60.0  # largest minus smallest channel; the dark grey ground has about 0
MIN_AREA_RATIO = 0.03
MIN_OVERLAP = 0.70  # intersection over union with the best ideal shape; below it the blob is no shape
MAX_HUE_ERROR_DEG = 40.0
MIN_TRAVEL = 0.02


@dataclass(frozen=True)
class ShapeFacts:
    """What a caption says: the colour and the shape, and where it moves to if it moves."""

    colour: str
    shape: str
    direction: str | None = None


@dataclass(frozen=True)
class Place:
    """Where a shape is, or starts, and how large it is, in fractions of the frame edge."""

    centre: tuple[float, float]
    radius: float


@dataclass(frozen=True)
class ShapeScene:
    """Everything a rendering needs. Position and radius in fractions of the frame edge; `centre` is where it starts."""

    facts: ShapeFacts
    centre: tuple[float, float]
    radius: float
    ground: tuple[int, int, int]


@dataclass(frozen=True)
class ShapeScore:
    """Share of pictures that show what was asked, and the same share had the prompts been dealt out at random.

    `exact` counts pictures with every fact right. `direction` figures are None for still images.
    """

    num_judged: int
    colour: float
    shape: float
    exact: float
    shuffled_colour: float
    shuffled_shape: float
    shuffled_exact: float
    direction: float | None = None
    shuffled_direction: float | None = None


def make_scene(facts: ShapeFacts, seed: int, place: Place | None = None) -> ShapeScene:
    """Facts and a seed -> a scene whose place, unless it is given, and ground vary with the seed and fit the frame.

    Raises: ValueError if a fact is not of this world.
    """
    places = all_places(facts)
    rng = np.random.default_rng([seed, 0x5A9E])
    drawn = places[int(rng.integers(len(places)))]
    place = place or drawn
    ground = tuple(int(GROUND + rng.integers(-2, 3)) for _ in range(3))
    return ShapeScene(facts, place.centre, place.radius, (ground[0], ground[1], ground[2]))


def all_places(facts: ShapeFacts) -> list[Place]:
    """Every place that fits the frame, for a moving shape from start to end, in a fixed order.

    Raises: ValueError if a fact is not of this world.
    """
    if facts.colour not in COLOURS or facts.shape not in SHAPES:
        raise ValueError(f"{facts} is not of this world: colours {', '.join(COLOURS)}; shapes {', '.join(SHAPES)}")
    if facts.direction is not None and facts.direction not in DIRECTIONS:
        raise ValueError(f"direction {facts.direction!r} is not one of {', '.join(DIRECTIONS)}")
    found = []
    for radius in STILL_RADII if facts.direction is None else MOVING_RADII:
        low, high = [radius + MARGIN] * 2, [1.0 - radius - MARGIN] * 2
        if facts.direction is not None:
            step = DIRECTIONS[facts.direction]
            axis = 0 if step[0] else 1
            low[axis] -= min(0, step[axis]) * MAX_TRAVEL
            high[axis] -= max(0, step[axis]) * MAX_TRAVEL
        columns, rows = (_steps(*bounds) for bounds in zip(low, high, strict=True))
        found += [Place((x, y), radius) for y in rows for x in columns]
    return found


def _steps(low: float, high: float) -> list[float]:
    """The steps between two bounds, in fractions of the edge."""
    first, last = math.ceil(low * STEPS_PER_EDGE - 1e-9), math.floor(high * STEPS_PER_EDGE + 1e-9)
    return [step / STEPS_PER_EDGE for step in range(first, last + 1)]


def all_facts(moving: bool) -> list[ShapeFacts]:
    """Every colour and shape, and every direction if `moving`, in a fixed order: 12 still facts or 48 moving ones."""
    directions: Sequence[str | None] = tuple(DIRECTIONS) if moving else (None,)
    return [ShapeFacts(colour, shape, to) for to in directions for shape in SHAPES for colour in COLOURS]


def write_caption(facts: ShapeFacts) -> str:
    """Facts -> a caption."""
    moves = f" moving {facts.direction}" if facts.direction is not None else ""
    return f"a {facts.colour} {facts.shape}{moves}"


def parse_caption(text: str) -> ShapeFacts | None:
    """A caption of the grammar -> its facts; None for any other text."""
    match = _CAPTION.fullmatch(" ".join(text.lower().split()).rstrip("."))
    return ShapeFacts(match["colour"], match["shape"], match["direction"]) if match else None


def _caption_pattern() -> re.Pattern[str]:
    shape = rf"(?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)})"
    move = rf"( moving (?P<direction>{'|'.join(DIRECTIONS)}))?"
    return re.compile(rf"a {shape}{move}")


_CAPTION = _caption_pattern()


def render_image(scene: ShapeScene, size_px: int = 512) -> Pixels:
    """A scene -> uint8 RGB pixels (size_px, size_px, 3); a moving scene at its start."""
    return _draw(scene, scene.centre, _ground(scene, size_px))


def render_video(scene: ShapeScene, num_frames: int, fps: float, size_px: int = 512) -> Pixels:
    """A scene -> uint8 RGB frames (num_frames, size_px, size_px, 3), moving evenly and never leaving the frame.

    The speed is the same in every clip up to two seconds; longer clips are slower, so that the shape stays inside.
    """
    step = DIRECTIONS[scene.facts.direction] if scene.facts.direction else (0, 0)
    duration_s = max(num_frames - 1, 1) / fps
    speed = min(SPEED_PER_S, MAX_TRAVEL / duration_s)
    frames = np.repeat(_ground(scene, size_px)[None], num_frames, axis=0)
    for index in range(num_frames):
        gone = speed * index / fps
        _draw(scene, (scene.centre[0] + step[0] * gone, scene.centre[1] + step[1] * gone), frames[index])
    return frames


def judge_shape(pixels: Pixels) -> tuple[str | None, str | None]:
    """uint8 RGB pixels (H, W, 3) -> (colour, shape), each None where the picture shows none of them.

    The foreground is the largest blob of colour: chroma above half of its peak, which stays on the true edge under
    blur. Its mean hue names the colour; of the ideal shapes of its area and centre, the one that overlaps it most names
    the shape.
    """
    small = _judged_size(pixels)
    mask = _foreground(small)
    if mask is None:
        return None, None
    return _nearest_colour(small[mask].mean(axis=0)), _nearest_shape(mask)


def judge_direction(frames: Pixels) -> str | None:
    """uint8 RGB frames (T, H, W, 3) -> the direction that the coloured blob moves in, None if it hardly moves."""
    times: list[int] = []
    centres: list[tuple[float, float]] = []
    for index, frame in enumerate(frames):
        mask = _foreground(_judged_size(frame))
        if mask is not None:
            rows, columns = np.nonzero(mask)
            times.append(index)
            centres.append((float(columns.mean()) / mask.shape[1], float(rows.mean()) / mask.shape[0]))
    if len(times) < 2:
        return None
    slope_x, slope_y = np.polyfit(times, np.asarray(centres), 1)[0] * (times[-1] - times[0])
    if max(abs(slope_x), abs(slope_y)) < MIN_TRAVEL:
        return None
    if abs(slope_x) >= abs(slope_y):
        return "right" if slope_x > 0 else "left"
    return "down" if slope_y > 0 else "up"


def score_images(pairs: Sequence[tuple[str, Pixels]]) -> ShapeScore:
    """(prompt, uint8 RGB pixels (H, W, 3)) pairs -> how many show the asked colour and shape.

    The shuffled figures are exact: each picture against every prompt of the list, which is what dealing the prompts
    out at random gives on average.

    Raises: ValueError if there is no pair, or a prompt is not of the grammar.
    """
    return _score([_asked(prompt) for prompt, _ in pairs], [ShapeSeen(*judge_shape(image)) for _, image in pairs])


def score_videos(pairs: Sequence[tuple[str, Pixels]]) -> ShapeScore:
    """(prompt, uint8 RGB frames (T, H, W, 3)) pairs -> the same for clips, with the direction of the motion.

    Colour and shape are judged on the middle frame.

    Raises: ValueError if there is no pair, or a prompt is not of the grammar or names no direction.
    """
    asked = [_asked(prompt) for prompt, _ in pairs]
    for facts in asked:
        if facts.direction is None:
            raise ValueError(f"{write_caption(facts)!r} names no direction; a video prompt ends in 'moving left'")
    seen = [ShapeSeen(*judge_shape(frames[len(frames) // 2]), judge_direction(frames)) for _, frames in pairs]
    return _score(asked, seen)


def score_captions(pairs: Sequence[tuple[str, ShapeFacts]]) -> ShapeScore:
    """(caption, what the clip shows) pairs -> how many name its colour, shape and direction. A caption that is not of the
    grammar names nothing.

    Raises: ValueError if there is no pair.
    """
    said = [parse_caption(caption) for caption, _ in pairs]
    return _score(
        [facts for _, facts in pairs],
        [ShapeSeen(s.colour, s.shape, s.direction) if s is not None else ShapeSeen(None, None) for s in said],
    )


def score_drawing(prompt: str, frames: Pixels) -> float:
    """A prompt and uint8 RGB frames (T, H, W, 3), one for an image -> the share of what was asked for that they show, 0..1.

    Raises: ValueError if the prompt is not of the grammar.
    """
    asked = _asked(prompt)
    colour, shape = judge_shape(frames[len(frames) // 2])
    right = [colour == asked.colour, shape == asked.shape]
    if asked.direction is not None:
        right.append(judge_direction(frames) == asked.direction)
    return sum(right) / len(right)


def score_height(prompt: str, frames: Pixels) -> float:
    """Uint8 RGB frames (T, H, W, 3) -> how high the middle of the first one's shape stands: 0 at the bottom, 1 at the top. No
    prompt of this world asks for it.

    Raises: ValueError if the picture shows no shape.
    """
    mask = _foreground(_judged_size(frames[0]))
    if mask is None:
        raise ValueError("found no shape in the drawing")
    rows = np.flatnonzero(mask.any(axis=1))
    return 1.0 - float(rows[0] + rows[-1] + 1) / (2 * len(mask))


@dataclass(frozen=True)
class ShapeSeen:
    """What the judge saw; None where it saw nothing of the kind."""

    colour: str | None
    shape: str | None
    direction: str | None = None


def _score(asked: Sequence[ShapeFacts], seen: Sequence[ShapeSeen]) -> ShapeScore:
    if not asked:
        raise ValueError("there is no picture to judge")
    moving = asked[0].direction is not None

    def hits(prompts: Sequence[ShapeFacts], pictures: Sequence[ShapeSeen]) -> npt.NDArray[np.float64]:
        rows = [
            (p.colour == s.colour, p.shape == s.shape, p.direction == s.direction)
            for p, s in zip(prompts, pictures, strict=True)
        ]
        table = np.asarray(rows, np.float64)
        return np.append(table.mean(axis=0), table.all(axis=1).mean())

    own = hits(asked, seen)
    dealt = hits([p for p in asked for _ in seen], [s for _ in asked for s in seen])
    return ShapeScore(
        num_judged=len(asked),
        colour=float(own[0]),
        shape=float(own[1]),
        exact=float(own[3]),
        shuffled_colour=float(dealt[0]),
        shuffled_shape=float(dealt[1]),
        shuffled_exact=float(dealt[3]),
        direction=float(own[2]) if moving else None,
        shuffled_direction=float(dealt[2]) if moving else None,
    )


def _asked(prompt: str) -> ShapeFacts:
    facts = parse_caption(prompt)
    if facts is None:
        raise ValueError(f"prompt {prompt!r} is not of the grammar, like {write_caption(all_facts(False)[0])!r}")
    return facts


def _ground(scene: ShapeScene, size_px: int) -> Pixels:
    canvas = np.empty((size_px, size_px, 3), np.uint8)
    cv2.rectangle(canvas, (0, 0), (size_px, size_px), scene.ground, cv2.FILLED)
    return canvas


def _draw(scene: ShapeScene, centre: tuple[float, float], canvas: Pixels) -> Pixels:
    """Draws the shape into `canvas` and returns it."""
    size_px = canvas.shape[0]
    colour = COLOURS[scene.facts.colour]
    x, y, radius = centre[0] * size_px, centre[1] * size_px, scene.radius * size_px
    bits = 4  # cv2 takes fixed-point coordinates: sixteenths of a pixel keep slow motion smooth
    if scene.facts.shape == "circle":
        at = (round((x - 0.5) * 2**bits), round((y - 0.5) * 2**bits))
        cv2.circle(canvas, at, round(radius * 2**bits), colour, cv2.FILLED, cv2.LINE_AA, bits)
    else:
        corners = _corners(scene.facts.shape, radius) + np.array([x - 0.5, y - 0.5])
        cv2.fillPoly(canvas, [np.rint(corners * 2**bits).astype(np.int32)], colour, cv2.LINE_AA, bits)
    return canvas


def _corners(shape: str, radius: float) -> npt.NDArray[np.float64]:
    """Corners of an upright square or triangle that fits a circle of `radius` about (0, 0), filling it well."""
    if shape == "square":
        half = 0.86 * radius
        return np.array([(-half, -half), (half, -half), (half, half), (-half, half)])
    return np.array([(0.0, -radius), (radius, 0.8 * radius), (-radius, 0.8 * radius)])


def _judged_size(pixels: Pixels) -> Pixels:
    height, width = pixels.shape[:2]
    if (height, width) == (JUDGE_EDGE_PX, JUDGE_EDGE_PX):
        return pixels
    shrinks = min(height, width) > JUDGE_EDGE_PX
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(pixels, (JUDGE_EDGE_PX, JUDGE_EDGE_PX), interpolation=how), np.uint8)


def _foreground(small: Pixels) -> Mask | None:
    calm = cv2.GaussianBlur(small, (3, 3), 0).astype(np.float32)
    chroma = calm.max(axis=2) - calm.min(axis=2)
    peak = float(np.percentile(chroma, 98))
    if peak < MIN_CHROMA:
        return None
    count, labels, stats, _ = cv2.connectedComponentsWithStats((chroma > peak / 2).astype(np.uint8))
    if count < 2:
        return None
    largest = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    mask: Mask = labels == largest
    return mask if mask.mean() >= MIN_AREA_RATIO else None


def _nearest_colour(mean_rgb: npt.NDArray[np.float64]) -> str | None:
    seen = _hue_deg(mean_rgb)

    def error(name: str) -> float:
        gap = abs(seen - _hue_deg(np.asarray(COLOURS[name], np.float64))) % 360.0
        return min(gap, 360.0 - gap)

    best = min(COLOURS, key=error)
    return best if error(best) <= MAX_HUE_ERROR_DEG else None


def _hue_deg(rgb: npt.NDArray[np.float64]) -> float:
    red, green, blue = (float(channel) for channel in rgb)
    return math.degrees(math.atan2(math.sqrt(3.0) * (green - blue), 2.0 * red - green - blue)) % 360.0


def _nearest_shape(mask: Mask) -> str | None:
    overlaps = {shape: _overlap(mask, shape) for shape in SHAPES}
    best = max(overlaps, key=lambda shape: overlaps[shape])
    return best if overlaps[best] >= MIN_OVERLAP else None


def _overlap(mask: Mask, shape: str) -> float:
    """Intersection over union of the mask with the ideal shape of the same area and centre of mass."""
    rows, columns = np.indices(mask.shape)
    y, x = rows - rows[mask].mean(), columns - columns[mask].mean()
    area = float(mask.sum())
    if shape == "circle":
        ideal = x**2 + y**2 <= area / math.pi
    elif shape == "square":
        half = math.sqrt(area) / 2
        ideal = np.maximum(abs(x), abs(y)) <= half
    else:
        radius = math.sqrt(area / 1.8)  # its base is 2 radii and its height 1.8: the area is 1.8 radii squared
        from_top = y + 1.2 * radius  # the centre of mass lies two thirds of the height below the top
        ideal = (from_top >= 0) & (from_top <= 1.8 * radius) & (abs(x) * 1.8 <= from_top)
    return float((ideal & mask).sum() / (ideal | mask).sum())
