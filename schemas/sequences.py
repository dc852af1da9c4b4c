"""Sequences: whole documents packed into rows of fixed length, and the sets they belong to."""

import pyarrow as pa

from schemas.columns import RUN_ID, SEQSET_ID, TOKENIZER_ID, WRITTEN_AT
from schemas.table import Column, Table

SEGMENT = pa.struct(
    [
        pa.field("kind", pa.string(), nullable=False),  # image, video, text or chat
        pa.field("item_id", pa.string(), nullable=False),  # clip_id, text_id, or the hash of a conversation
        pa.field("offset", pa.int32(), nullable=False),  # first token in the row
        pa.field("length", pa.int32(), nullable=False),  # tokens
    ]
)

SPAN = pa.struct(
    [
        pa.field("offset", pa.int32(), nullable=False),  # first token in the row
        pa.field("length", pa.int32(), nullable=False),  # tokens
    ]
)

CHAT = pa.struct(
    [
        pa.field("document", pa.int32(), nullable=False),  # which of the row's documents
        pa.field("clip_ids", pa.list_(pa.field("element", pa.string(), nullable=False)), nullable=False),
        pa.field("answers", pa.list_(pa.field("element", SPAN, nullable=False)), nullable=False),
    ]
)

SEQUENCES = Table(
    name="sequences",
    doc="One packed row. `seq_index` is dense from 0: the order of training is a function of it.",
    key=("seqset_id", "seq_index"),
    columns=(
        SEQSET_ID,
        Column("seq_index", pa.int64(), "position in the set, from 0 without gaps"),
        Column("tokens", pa.binary(), "token ids, little-endian uint32, without padding"),
        Column("num_tokens", pa.int32(), "tokens in the row"),
        Column(
            "segments", pa.list_(pa.field("element", SEGMENT, nullable=False)), "the documents of the row, in order"
        ),
        Column("crc32", pa.int64(), "CRC-32 of `tokens`"),
        Column(
            "captioner_ids",
            pa.list_(pa.string()),
            "whose caption each document has, in order; null for texts and documents without a caption",
            nullable=True,
            provenance=True,
        ),
        Column(
            "chats",
            pa.list_(pa.field("element", CHAT, nullable=False)),
            "the conversations among the documents: the clips shown, and the answers, of whose document nothing else is "
            "learnt",
            nullable=True,
        ),
        RUN_ID,
        WRITTEN_AT,
    ),
    properties={
        "write.parquet.row-group-limit": "256",
        "write.parquet.dict-size-bytes": "65536",
        "write.metadata.metrics.column.tokens": "none",
    },
)

SEQUENCE_SETS = Table(
    name="sequence_sets",
    doc="One row per name of a packed set. A name is given once.",
    key=("name",),
    columns=(
        Column("name", pa.string(), "the set's name"),
        SEQSET_ID,
        Column("curated_ids", pa.list_(pa.string()), "the curated sets packed"),
        TOKENIZER_ID,
        Column("recipe", pa.string(), "the resolved pack recipe as canonical JSON"),
        Column("vocabulary", pa.string(), "JSON: sizes of the id space"),
        Column("text_tokenizer", pa.string(), "JSON: the text tokenizer's own serialisation"),
        Column("context_len", pa.int32(), "length of a row, with padding"),
        Column("num_sequences", pa.int64(), "rows"),
        Column("num_tokens", pa.int64(), "tokens without padding"),
        Column("content_sha256", pa.string(), "SHA-256 over the rows in order"),
        RUN_ID,
        WRITTEN_AT,
    ),
)
