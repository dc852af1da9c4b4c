"""Vision tokens: the codes of a clip on a grid of latent frames, rows and columns; and the tokenizers that made them."""

import pyarrow as pa

from schemas.columns import CHECKPOINT_ID, CLIP_ID, KIND, RUN_ID, TOKENIZER_ID, WRITTEN_AT
from schemas.table import Column, Table

TOKENIZERS = Table(
    name="tokenizers",
    doc="Which weights and which preparation of frames a tokenizer_id stands for.",
    key=("tokenizer_id",),
    columns=(
        TOKENIZER_ID,
        CHECKPOINT_ID,
        Column("preparation", pa.string(), "canonical JSON: size, frame rate and length at which clips are read"),
        Column("uri", pa.string(), "folder of the weights", provenance=True),
        RUN_ID,
        WRITTEN_AT,
    ),
)

VISION_TOKENS = Table(
    name="vision_tokens",
    doc="Codes 0..codebook_size-1 in (t, h, w) order.",
    key=("clip_id", "tokenizer_id"),
    columns=(
        CLIP_ID,
        TOKENIZER_ID,
        KIND,
        Column("t", pa.int32(), "latent frames"),
        Column("h", pa.int32(), "rows of the grid"),
        Column("w", pa.int32(), "columns of the grid"),
        Column("fps", pa.float64(), "frame rate at which the clip was sampled; null for images", nullable=True),
        Column(
            "source_frames",
            pa.int32(),
            "frames of the clip at that rate: beyond 4 t they were left out at its end, below it the last was repeated",
            nullable=True,
            provenance=True,
        ),
        Column("codes", pa.binary(), "t*h*w codes, little-endian uint16"),
        Column("crc32", pa.int64(), "CRC-32 of `codes`"),
        RUN_ID,
        WRITTEN_AT,
    ),
    # Codes do not repeat, so dictionaries and bounds of the cells are wasted work; small row groups make reads by key cheap.
    properties={
        "write.parquet.row-group-limit": "256",
        "write.parquet.dict-size-bytes": "65536",
        "write.metadata.metrics.column.codes": "none",
    },
)
