"""Checkpoints: trained weights on disk, and the data that made them."""

import pyarrow as pa

from schemas.columns import CHECKPOINT_ID, RUN_ID, WRITTEN_AT
from schemas.table import Column, Table

CHECKPOINTS = Table(
    name="checkpoints",
    doc="One row per finished training.",
    key=("checkpoint_id",),
    columns=(
        CHECKPOINT_ID,
        Column("objective", pa.string(), "vision_tokenizer, captioner, pretrain or dpo"),
        Column("training_id", pa.string(), "hash of the recipe and of the content of the data"),
        Column("recipe", pa.string(), "the resolved training recipe as canonical JSON"),
        Column("data_id", pa.string(), "curated_id, seqset_id or pairset_id of the data"),
        Column("data_sha256", pa.string(), "content hash of the data"),
        Column("step", pa.int64(), "optimizer steps"),
        Column(
            "start_id",
            pa.string(),
            "the weights that it began with: the first 16 digits of their digest, which is the checkpoint_id if they are of "
            "this lake; null: fresh ones",
            nullable=True,
        ),
        Column("losses", pa.string(), "JSON: list of {step, loss, ...} as logged"),
        Column("uri", pa.string(), "folder of the exported weights", provenance=True),
        RUN_ID,
        WRITTEN_AT,
    ),
)
