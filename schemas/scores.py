"""Scores: numbers, never decisions. One table per family; a changed scorer is a new `scorer_id`, and old rows stay.

A null is a score that does not exist (the motion of an image); it passes no rule that is asked about it.
"""

import pyarrow as pa

from schemas.columns import CLIP_ID, RUN_ID, SCORER_ID, WRITTEN_AT
from schemas.table import Column, Table


def _family(name: str, doc: str, *columns: Column) -> Table:
    return Table(
        name=f"score_{name}",
        doc=doc,
        key=("clip_id", "scorer_id"),
        columns=(CLIP_ID, SCORER_ID, *columns, RUN_ID, WRITTEN_AT),
    )


def _score(name: str, doc: str) -> Column:
    return Column(name, pa.float32(), doc, nullable=True)


NUM_SAMPLES = Column("num_samples", pa.int32(), "frames the score rests on")

RESOLUTION = _family(
    "resolution",
    "Size and length of a clip as shown.",
    _score("short_edge_px", "shorter side"),
    _score("long_edge_px", "longer side"),
    _score("aspect_ratio", "longer side over shorter side"),
    _score("duration_s", "length; null for images"),
)
MOTION = _family(
    "motion",
    "Optical flow between samples. Paper: Emu3 report, appendix on video data.",
    _score("motion", "mean flow magnitude over all pixels and pairs, over the short edge; null below two samples"),
    _score("motion_max", "the largest pair's mean flow magnitude, over the short edge"),
    NUM_SAMPLES,
)
TEXT = _family(
    "text",
    "Share of the picture inside text polygons.",
    _score("text_coverage_max", "largest share over the samples, 0 to 1"),
    _score("text_coverage_mean", "mean share over the samples, 0 to 1"),
    NUM_SAMPLES,
)
TECHNICAL = _family(
    "technical",
    "Technical quality that needs no weights; medians over the samples.",
    _score("sharpness", "variance of the Laplacian of luma at short edge 256 or less"),
    _score("luma_mean", "mean luma, 0 black to 1 white"),
    _score("luma_std", "standard deviation of luma, 0 to 0.5"),
    _score("clipped_ratio", "share of pixels at the ends of the luma range"),
    _score("colourfulness", "Hasler and Suesstrunk's measure, 0 grey to about 100 vivid"),
    _score("monochrome_ratio", "share of pixels without colour, 0 to 1"),
    _score("letterbox_ratio", "share of the picture inside uniform bars, 0 to 1"),
    NUM_SAMPLES,
)

AESTHETIC = _family(
    "aesthetic",
    "LAION's aesthetic predictor on open_clip ViT-L/14. Paper: Emu3 report, section 2.1 and appendix on video data.",
    _score("aesthetic", "lowest prediction over three frames of a clip, of an image its own; about 1 to 10"),
    NUM_SAMPLES,
)
DUPLICATE = _family(
    "duplicate",
    "How like a better clip each is: of two clips the one with more pixels, then the sharper, then the first by id is better.",
    _score("exact", "1 if all pixels of its sampled frames are those of a better clip, else 0"),
    _score("near", "share of equal bits of perceptual hashes over time, 0.5 by chance; 0 if no better clip comes near"),
    Column("duplicate_of", pa.string(), "the better clip most like it; null if none comes near", nullable=True),
)

FAMILIES = (RESOLUTION, MOTION, TEXT, TECHNICAL)
