"""What a flow field says: how much moves at all, and how much of it is the camera rather than things in the picture."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CELL_PX = 8  # the camera is fitted to one flow vector a cell
TEXTURE_LEAST = 2.0  # standard deviation in grey levels; flow where nothing can be seen to move is a guess
TEXTURE_AREA = 5  # quarter-size pixels
TEXTURED_CELLS_LEAST = 16
STILL_EDGES = 0.002  # half a pixel at the paper's 256
FIT_ROUNDS = 20
FIT_CHANGE_PX = 0.01  # no further round changes the fit by this much anywhere
FIT_SPREAD_LEAST_PX = 0.05
TUKEY = 4.685  # biweight constant of 95 % efficiency
NORMAL_MAD = 1.4826  # standard deviation over median absolute deviation
RESIDUAL_LEAST_PX = 0.25  # what flow misses by under noise and coding is nobody's motion
RESIDUAL_SHARE = 0.1  # likewise under fast pans and zooms, and what depth adds to them

Flow = NDArray[np.float32]


@dataclass(frozen=True)
class PairMotion:
    """Motion between two samples, per sampling step. Lengths are shares of the short edge.

    `motion`: mean flow magnitude over all pixels. `camera_motion`: that of the shift, zoom and turn that fit most of the
    picture. `object_motion`: that of what moves otherwise. `zoom`: growth, 0.1 for a tenth nearer. `rotation_deg`: turn
    of the picture, counter-clockwise as seen. `static_ratio`: share of the picture that moves by less than half a pixel
    in 256.
    """

    motion: float
    camera_motion: float
    object_motion: float
    zoom: float
    rotation_deg: float
    static_ratio: float


STILL = PairMotion(0.0, 0.0, 0.0, 0.0, 0.0, 1.0)


def mean_magnitude(flow: Flow) -> float:
    """Flow [height, width, 2] in pixels -> mean length of its vectors over all pixels, in pixels."""
    squares = np.square(flow)
    return float(np.sqrt(squares[..., 0] + squares[..., 1]).mean(dtype=np.float64))


def pair_motion(flow: Flow, grey: NDArray[np.uint8], steps: float) -> PairMotion:
    """Flow [height, width, 2] in pixels from the picture `grey` [height, width] to one `steps` sampling steps later."""
    height, width = grey.shape
    short_edge = float(min(height, width))
    rows, columns = (np.arange(min(CELL_PX // 2, side - 1), side, CELL_PX) for side in (height, width))
    places = (columns[np.newaxis] - (width - 1) / 2 + 1j * (rows[:, np.newaxis] - (height - 1) / 2)).ravel()
    sampled = flow[np.ix_(rows, columns)].astype(np.float64)
    vectors = (sampled[..., 0] + 1j * sampled[..., 1]).ravel()
    textured = (_texture(grey, (len(columns), len(rows))) >= TEXTURE_LEAST).ravel()
    fitted = textured if np.count_nonzero(textured) >= TEXTURED_CELLS_LEAST else np.ones_like(textured)
    scale, shift = fit_camera(places[fitted], vectors[fitted])
    camera = scale * places + shift
    after = places + camera
    inside = (np.abs(after.real) < width / 2) & (np.abs(after.imag) < height / 2)
    residual = np.abs(vectors - camera)
    moves = textured & inside & (residual > RESIDUAL_LEAST_PX + RESIDUAL_SHARE * np.abs(camera))
    still = np.abs(vectors) < STILL_EDGES * short_edge * steps
    return PairMotion(
        motion=mean_magnitude(flow) / short_edge / steps,
        camera_motion=float(np.abs(camera).mean()) / short_edge / steps,
        object_motion=float((residual * moves).mean()) / short_edge / steps,
        zoom=(abs(1 + scale) - 1) / steps,
        rotation_deg=-float(np.degrees(np.angle(1 + scale))) / steps,
        static_ratio=float(still.mean()),
    )


def fit_camera(places: NDArray[np.complex128], vectors: NDArray[np.complex128]) -> tuple[complex, complex]:
    """Places and the flow there, right + i down -> the (scale, shift) of the similarity `scale * place + shift` that fits
    most of it. Reweighted least squares with Tukey's biweight, from medians: of the scales that pairs of places half the
    list apart suggest, and of the shifts that are then left.
    """
    half = len(places) // 2
    apart = np.roll(places, half) - places
    far = np.abs(apart) > 0
    scale = _median((np.roll(vectors, half) - vectors)[far] / apart[far]) if far.any() else 0j
    shift = _median(vectors - scale * places)
    for _ in range(FIT_ROUNDS):
        distance = np.abs(vectors - scale * places - shift)
        spread = max(NORMAL_MAD * float(np.median(distance)), FIT_SPREAD_LEAST_PX)
        weights = np.square(np.maximum(0.0, 1.0 - np.square(distance / (TUKEY * spread))))
        total = weights.sum()
        centre, mean = (weights * places).sum() / total, (weights * vectors).sum() / total
        around = places - centre
        extent = (weights * np.square(np.abs(around))).sum()
        before = scale * places + shift
        scale = complex((weights * around.conj() * (vectors - mean)).sum() / extent) if extent > 0 else 0j
        shift = complex(mean - scale * centre)
        if np.abs(scale * places + shift - before).max() < FIT_CHANGE_PX:
            break
    return scale, shift


def _median(values: NDArray[np.complex128]) -> complex:
    return complex(np.median(values.real), np.median(values.imag))


def _texture(grey: NDArray[np.uint8], cells: tuple[int, int]) -> NDArray[np.float32]:
    """A picture and its numbers of cells (across, down) -> standard deviation of grey levels around each cell."""
    import cv2

    height, width = grey.shape
    small = cv2.resize(grey, (max(1, width // 4), max(1, height // 4)), interpolation=cv2.INTER_AREA).astype(np.float32)
    area = (TEXTURE_AREA, TEXTURE_AREA)
    variance = cv2.blur(np.square(small), area) - np.square(cv2.blur(small, area))
    nearest = cv2.resize(np.maximum(variance, 0), cells, interpolation=cv2.INTER_NEAREST)
    deviation: NDArray[np.float32] = np.sqrt(nearest)
    return deviation
