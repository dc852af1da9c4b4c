"""Resolution scores: the size of a clip as shown, and its length."""

from dataclasses import dataclass

from schemas.recipe import short_hash

SCORER_ID = short_hash({"family": "resolution", "version": 1})


@dataclass(frozen=True)
class ResolutionScores:
    """Columns of `score_resolution`."""

    short_edge_px: float
    long_edge_px: float
    aspect_ratio: float
    duration_s: float | None


def score_resolution(width_px: int, height_px: int, duration_s: float | None) -> ResolutionScores:
    """Shown size and length (None for an image) -> scores."""
    short, long = sorted((width_px, height_px))
    return ResolutionScores(float(short), float(long), long / short, duration_s)
