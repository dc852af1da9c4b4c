"""Curated sets: a recipe over pinned inputs, named once and never changed."""

import pyarrow as pa

from schemas.columns import CLIP_ID, CURATED_ID, RUN_ID, WRITTEN_AT
from schemas.table import Column, Table

RECIPE_ID = Column("recipe_id", pa.string(), "hash of the resolved recipe")

RECIPES = Table(
    name="recipes",
    doc="Every curation recipe that made a set, resolved.",
    key=("recipe_id",),
    columns=(
        RECIPE_ID,
        Column("recipe", pa.string(), "the resolved recipe as canonical JSON"),
        RUN_ID,
        WRITTEN_AT,
    ),
)

CURATED = Table(
    name="curated",
    doc="Which clips a set holds.",
    key=("curated_id", "clip_id"),
    columns=(CURATED_ID, CLIP_ID, RUN_ID, WRITTEN_AT),
)

CURATED_SETS = Table(
    name="curated_sets",
    doc="One row per name. A name is given once.",
    key=("name",),
    columns=(
        Column("name", pa.string(), "the set's name"),
        CURATED_ID,
        RECIPE_ID,
        Column("inputs", pa.string(), "JSON: per input table the SHA-256 of the content that was read"),
        Column("pins", pa.string(), "JSON: per input table its UUID and snapshot id", provenance=True),
        Column(
            "funnel", pa.string(), "JSON: clips left after each rule, in order, with examples of what each rejected"
        ),
        Column("num_clips", pa.int64(), "clips in the set"),
        Column("content_sha256", pa.string(), "SHA-256 over the clip ids in order"),
        RUN_ID,
        WRITTEN_AT,
    ),
)
