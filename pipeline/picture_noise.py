"""What coding and sensor add to a picture: edges of coding blocks, and noise. Both need the picture at full size."""

import numpy as np
from numpy.typing import NDArray

BLOCK_GRIDS_PX = (4, 8, 16)  # of JPEG, MPEG and everything since; of pictures that were not scaled after coding
GRIDS_LEAST = 4  # lines of a grid below which any pattern looks like one
LINE_STRIDE = 4  # every fourth line is enough for a mean over lines
FLAT_STEP = 2.0  # grey levels: steps that nobody sees in flat places are no blocks

NOISE_BLOCK_PX = 16
NOISE_QUANTILE = 0.1  # the evenest tenth of blocks shows noise rather than texture
NOISE_KERNEL = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
CLIPPED_MARGIN = 4  # grey levels from either end, where noise is cut off


def blockiness(luma: NDArray[np.uint8]) -> float:
    """Luma [height, width] at full size -> steps across the strongest block grid over steps elsewhere; 1 without one.

    Steps are taken relative to those around them, so that texture and edges of things cancel. Mean of both directions.
    Source: after Muijs and Kirenko, A no-reference blocking artifact measure for adaptive video processing (2005).
    """
    return (_grid_strength(luma[::LINE_STRIDE]) + _grid_strength(luma[:, ::LINE_STRIDE].T)) / 2


def _grid_strength(lines: NDArray[np.uint8]) -> float:
    import cv2

    if lines.shape[1] <= GRIDS_LEAST * min(BLOCK_GRIDS_PX):
        return 1.0
    lines = np.ascontiguousarray(lines)
    steps = cv2.absdiff(lines[:, 1:], lines[:, :-1]).astype(np.float32)
    around = cv2.filter2D(steps, -1, np.array([[1, 1, 0, 1, 1]], np.float32) / 4, borderType=cv2.BORDER_REFLECT)
    profile = (steps / (around + FLAT_STEP)).mean(axis=0, dtype=np.float64)
    return max(1.0, *(_contrast(profile, grid_px) for grid_px in BLOCK_GRIDS_PX))


def _contrast(profile: NDArray[np.float64], grid_px: int) -> float:
    """Mean step per column -> the strongest phase of a grid over the mean of all others."""
    whole = len(profile) // grid_px
    if whole < GRIDS_LEAST:
        return 1.0
    phases = np.sort(profile[: whole * grid_px].reshape(whole, grid_px).mean(axis=0))
    others = phases[:-1].mean()
    return float(phases[-1] / others) if others > 0 else 1.0


def noise_deviation(luma: NDArray[np.uint8]) -> float:
    """Luma [height, width] at full size -> standard deviation of its noise, in grey levels.

    Immerkaer's estimate (Fast noise variance estimation, 1996) by block, of which the evenest count. Blocks near black or
    white are left out: noise is cut off there.
    """
    import cv2

    height, width = luma.shape
    rows, columns = height // NOISE_BLOCK_PX, width // NOISE_BLOCK_PX
    if not rows or not columns:
        return 0.0
    fitted = np.ascontiguousarray(luma[: rows * NOISE_BLOCK_PX, : columns * NOISE_BLOCK_PX])
    response = np.abs(cv2.filter2D(fitted, cv2.CV_32F, NOISE_KERNEL, borderType=cv2.BORDER_REFLECT))
    size = (columns, rows)
    deviations = cv2.resize(response, size, interpolation=cv2.INTER_AREA) * np.float32(np.sqrt(np.pi / 2) / 6)
    means = cv2.resize(fitted, size, interpolation=cv2.INTER_AREA)
    lit = (means > CLIPPED_MARGIN) & (means < 255 - CLIPPED_MARGIN)
    return float(np.quantile(deviations[lit], NOISE_QUANTILE)) if lit.any() else 0.0
