"""Embeddings: what a model makes of single frames, kept for search, near duplicates and the stitching of scenes."""

import pyarrow as pa

from schemas.columns import CLIP_ID, RUN_ID, WRITTEN_AT
from schemas.table import Column, Table

EMBEDDINGS = Table(
    name="embeddings",
    doc="Frames as vectors of unit length, by the models whose embeddings a scorer computed on its way.",
    key=("clip_id", "frame_ms", "model_id"),
    columns=(
        CLIP_ID,
        Column("frame_ms", pa.int64(), "moment of the frame in its medium, milliseconds, rounded; 0 for an image"),
        Column("model_id", pa.string(), "hash of the model's files"),
        Column("dim", pa.int32(), "numbers of the vector"),
        Column("embedding", pa.binary(), "the vector, float16, little-endian"),
        RUN_ID,
        WRITTEN_AT,
    ),
)
