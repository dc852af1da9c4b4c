"""Answers: what a checkpoint said about clips, or to a plain question, with everything needed to ask again."""

import pyarrow as pa

from schemas.columns import CHECKPOINT_ID, RUN_ID, TOKENIZER_ID, WRITTEN_AT
from schemas.table import Column, Table

ANSWERS = Table(
    name="answers",
    doc="One answer. The tokens are the very ones the model read and chose.",
    key=("answer_id",),
    columns=(
        Column("answer_id", pa.string(), "hash of question, clips, seed, sampling and checkpoint"),
        Column("question", pa.string(), "what was asked; null where the model was to describe a clip", nullable=True),
        Column("clip_ids", pa.list_(pa.field("element", pa.string(), nullable=False)), "the clips shown, in order"),
        Column("seed", pa.int64(), "seed of this answer"),
        Column("sampling", pa.string(), "canonical JSON of temperature, top-k, top-p and the longest answer"),
        CHECKPOINT_ID,
        TOKENIZER_ID,
        Column("text", pa.string(), "the answer"),
        Column("is_complete", pa.bool_(), "whether the model ended it, and not the limit"),
        Column("tokens", pa.binary(), "prompt and answer, little-endian uint32"),
        RUN_ID,
        WRITTEN_AT,
    ),
)
