"""Generations: what a checkpoint drew, with everything needed to draw it again; and preferences between them."""

import pyarrow as pa

from schemas.columns import CHECKPOINT_ID, KIND, PAIRSET_ID, RUN_ID, TOKENIZER_ID, WRITTEN_AT
from schemas.table import Column, Table

GENERATION_ID = Column("generation_id", pa.string(), "hash of prompt, seed, sampling, grid, context and checkpoint")

GENERATIONS = Table(
    name="generations",
    doc="One drawn image or video. The tokens are the very ones sampled.",
    key=("generation_id",),
    columns=(
        GENERATION_ID,
        KIND,
        Column("prompt", pa.string(), "the text asked for"),
        Column("seed", pa.int64(), "seed of this sample"),
        Column("sampling", pa.string(), "canonical JSON of temperature, top-k, top-p, guidance and negative prompt"),
        CHECKPOINT_ID,
        TOKENIZER_ID,
        Column("t", pa.int32(), "latent frames"),
        Column("h", pa.int32(), "rows of the grid"),
        Column("w", pa.int32(), "columns of the grid"),
        Column("fps", pa.float64(), "frame rate; null for images", nullable=True),
        Column("tokens", pa.binary(), "the whole document, little-endian uint32"),
        Column("continued_clip_id", pa.string(), "the clip whose frames were given, if any", nullable=True),
        Column("context_t", pa.int32(), "latent frames that were given rather than drawn"),
        Column("uri", pa.string(), "the PNG or MP4 file", provenance=True),
        RUN_ID,
        WRITTEN_AT,
    ),
)

PREFERENCE_PAIRS = Table(
    name="preference_pairs",
    doc="Two generations for one prompt, the better one first: stored tokens, never re-encoded pixels.",
    key=("pair_id",),
    columns=(
        Column("pair_id", pa.string(), "hash of chosen, rejected and judge"),
        Column("chosen_id", pa.string(), "generation_id of the better one"),
        Column("rejected_id", pa.string(), "generation_id of the other one"),
        Column("judge", pa.string(), "who or what chose: `votes-` and a hash of the votes, or a scorer's name"),
        Column("chosen_score", pa.float64(), "mean vote or score of the better one", nullable=True),
        Column("rejected_score", pa.float64(), "mean vote or score of the other one", nullable=True),
        RUN_ID,
        WRITTEN_AT,
    ),
)

PREFERENCE_SETS = Table(
    name="preference_sets",
    doc="One row per name of a set of pairs. A name is given once.",
    key=("name",),
    columns=(
        Column("name", pa.string(), "the set's name"),
        PAIRSET_ID,
        Column("judge", pa.string(), "who or what chose"),
        Column("recipe", pa.string(), "the resolved recipe as canonical JSON"),
        TOKENIZER_ID,
        Column("vocabulary", pa.string(), "JSON: sizes of the id space of the tokens"),
        Column("text_tokenizer", pa.string(), "JSON: the text tokenizer's own serialisation"),
        Column("pair_ids", pa.list_(pa.field("element", pa.string(), nullable=False)), "the pairs, in order"),
        Column("num_pairs", pa.int64(), "pairs"),
        Column("num_tokens", pa.int64(), "tokens of both documents of all pairs"),
        Column("content_sha256", pa.string(), "SHA-256 over the pairs in order, with the tokens of their generations"),
        RUN_ID,
        WRITTEN_AT,
    ),
)
