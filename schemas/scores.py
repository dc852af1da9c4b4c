"""Scores: numbers, never decisions. One table per family; a changed scorer is a new `scorer_id`, and old rows stay.

A null is a score that does not exist (the motion of an image); it passes no rule that is asked about it.
"""

import re
from collections.abc import Mapping

import pyarrow as pa

from schemas.columns import CLIP_ID, RUN_ID, SCORER_ID, WRITTEN_AT
from schemas.errors import ConfigError
from schemas.table import Column, Table

PREFIX = "score_"
_IDENTIFIER = re.compile(r"[a-z][a-z0-9_]{0,62}", re.ASCII)


def _family(name: str, doc: str, *columns: Column) -> Table:
    return Table(
        name=PREFIX + name,
        doc=doc,
        key=("clip_id", "scorer_id"),
        columns=(CLIP_ID, SCORER_ID, *columns, RUN_ID, WRITTEN_AT),
    )


def _score(name: str, doc: str) -> Column:
    return Column(name, pa.float32(), doc, nullable=True)


def _per_sample(name: str, doc: str) -> Column:
    return Column(name, pa.list_(pa.float32()), doc, nullable=True)


NUM_SAMPLES = Column("num_samples", pa.int32(), "frames the score rests on")
SECONDS = Column(
    "seconds", pa.float64(), "wall seconds of reading and scoring the clip", nullable=True, provenance=True
)

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
    _score(
        "camera_motion", "mean magnitude of the shift, zoom and turn that fit most of the picture, over the short edge"
    ),
    _score("object_motion", "mean magnitude of what moves otherwise, over all pixels, over the short edge"),
    _score("zoom", "growth of the picture from one sample to the next, 0.1 for a tenth nearer; mean of the pairs"),
    _score(
        "rotation_deg", "turn of the picture from one sample to the next, degrees counter-clockwise; mean of the pairs"
    ),
    _score("static_ratio", "share of the picture that moves by less than 1/500 of the short edge; mean of the pairs"),
    NUM_SAMPLES,
)
TEXT = _family(
    "text",
    "Share of the picture inside text polygons.",
    _score("text_coverage_max", "largest share over the samples, 0 to 1"),
    _score("text_coverage_mean", "mean share over the samples, 0 to 1"),
    _score("text_ratio", "share of the samples with text, 0 to 1"),
    _per_sample("sample_s", "when each sample is shown, seconds after the first frame of the medium"),
    _per_sample("sample_text_coverage", "share inside text polygons of each sample, 0 to 1"),
    NUM_SAMPLES,
)
TECHNICAL = _family(
    "technical",
    "Technical quality that needs no weights, inside bars; medians over the samples.",
    _score("sharpness", "variance of the Laplacian of luma at short edge 256 or less"),
    _score("luma_mean", "mean luma, 0 black to 1 white"),
    _score("luma_std", "standard deviation of luma, 0 to 0.5"),
    _score("clipped_ratio", "share of pixels at the ends of the luma range"),
    _score("colourfulness", "Hasler and Suesstrunk's measure, 0 grey to about 100 vivid"),
    _score("monochrome_ratio", "share of pixels without colour, 0 to 1"),
    _score("letterbox_ratio", "share of the picture inside uniform bars, 0 to 1"),
    _score("blockiness", "steps across the grid of coding blocks over steps elsewhere at full size; 1 without a grid"),
    _score("noise", "standard deviation of noise at full size, in grey levels of 255"),
    _score(
        "single_tone_ratio",
        "share of pixels whose colour follows from their luma: grey, sepia and tinted pictures have 1",
    ),
    _score("active_left", "where the picture inside bars begins, share of the width"),
    _score("active_top", "where the picture inside bars begins, share of the height"),
    _score("active_right", "where the picture inside bars ends, share of the width"),
    _score("active_bottom", "where the picture inside bars ends, share of the height"),
    _score("frozen_ratio", "share of consecutive samples without any change; null below two samples"),
    _score("repeated_ratio", "share of frames that repeat the frame before; null for images"),
    _score("bits_per_pixel", "bits of the whole file over the pixels of all its frames"),
    NUM_SAMPLES,
)

AESTHETIC = _family(
    "aesthetic",
    "LAION's aesthetic predictor on open_clip ViT-L/14. Paper: Emu3 report, section 2.1 and appendix on video data.",
    _score("aesthetic", "lowest prediction over three frames of a clip, of an image its own; about 1 to 10"),
    NUM_SAMPLES,
    SECONDS,
)
BETTER = (
    Column("duplicate_of", pa.string(), "the better clip most like it; null if none comes near", nullable=True),
    Column("rank", pa.int32(), "place by quality among the clips compared, the best 0", nullable=True),
    Column("rank_of_better", pa.int32(), "the rank of `duplicate_of`", nullable=True),
)
DUPLICATE = _family(
    "duplicate",
    "How like a better clip each is: of two clips the one with more pixels, then the sharper, then the first by id is better.",
    _score("exact", "1 if all its frames decode to the pixels of a better clip's, else 0"),
    _score("near", "share of equal bits of perceptual hashes over time, 0.5 by chance; 0 if no better clip comes near"),
    *BETTER,
)
SEMANTIC = _family(
    "semantic",
    "How like a better clip each is in what it shows, by the embeddings of its frames. Better is as in `score_duplicate`.",
    _score("semantic", "cosine of the mean embeddings of it and the better clip most like it; -1 if none was compared"),
    *BETTER,
)
CONTINUITY = _family(
    "continuity",
    "Whether a clip goes on with what the clip before it in its medium shows, by the embeddings of their frames.",
    _score(
        "continuity",
        "largest cosine of one of the two frames nearest to the cut on one side with one on the other; -1 for the first clip",
    ),
    Column("continues", pa.string(), "the clip before it; null for the first of a medium", nullable=True),
)
COMPARING = {DUPLICATE.name: ("exact", "near"), SEMANTIC.name: ("semantic",)}
"""Families that compare all clips with each other, and their scores of likeness: rules over these keep one clip of a group."""

FAMILIES = (RESOLUTION, MOTION, TEXT, TECHNICAL)


def own_family(name: str, doc: str, columns: Mapping[str, str]) -> Table:
    """The table of a scorer that a user wrote: its name, what it measures, and its scores with the meaning of each.

    Raises: ConfigError if a name is no identifier, is one of the columns that every family has, or has no meaning.
    """
    for what, word in (("family", name), *(("column", column) for column in columns)):
        if not isinstance(word, str) or not _IDENTIFIER.fullmatch(word):
            raise ConfigError(
                f"{what} {word!r} of a scorer: expected lower-case letters, digits and '_', a letter first, 63 at most"
            )
    if not columns or not doc.strip() or not all(meaning.strip() for meaning in columns.values()):
        raise ConfigError(f"family {name!r}: give what it measures, and at least one column, each with its meaning")
    table = Table(
        name=PREFIX + name,
        doc=doc,
        key=("clip_id", "scorer_id"),
        columns=(
            CLIP_ID,
            SCORER_ID,
            *(_score(column, meaning) for column, meaning in columns.items()),
            NUM_SAMPLES,
            SECONDS,
            RUN_ID,
            WRITTEN_AT,
        ),
        properties={"comment": doc},
    )
    if len(set(table.names)) < len(table.names):
        raise ConfigError(f"family {name!r}: its columns are {list(columns)}, and every family has {OWN_COMMON}")
    return table


OWN_COMMON = (CLIP_ID.name, SCORER_ID.name, NUM_SAMPLES.name, SECONDS.name, RUN_ID.name, WRITTEN_AT.name)
"""The columns that every family of a user's has beside its scores."""
