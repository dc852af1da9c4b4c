"""Columns that several tables share, written down once."""

import pyarrow as pa

from schemas.table import TIMESTAMP, Column

MEDIA_ID = Column("media_id", pa.string(), "first 16 hex digits of the SHA-256 of the medium's bytes")
CLIP_ID = Column("clip_id", pa.string(), "media_id-start_ms-end_ms; an image spans 0 to 0")
KIND = Column("kind", pa.string(), "video or image")
LICENCE = Column("licence", pa.string(), "licence as the source states it", nullable=True)
SCORER_ID = Column("scorer_id", pa.string(), "hash of the scorer's version, parameters and weights")
TOKENIZER_ID = Column(
    "tokenizer_id", pa.string(), "first 16 hex digits of the vision tokenizer's digest and preparation"
)
CHECKPOINT_ID = Column("checkpoint_id", pa.string(), "first 16 hex digits of the digest of config and weights")
SEQSET_ID = Column("seqset_id", pa.string(), "hash of the packed inputs' content and the pack recipe")
PAIRSET_ID = Column("pairset_id", pa.string(), "hash of the judge, the recipe and what was judged")
CURATED_ID = Column("curated_id", pa.string(), "hash of the recipe and of the content of its input tables")
RUN_ID = Column("run_id", pa.string(), "the run that wrote the row", provenance=True)
WRITTEN_AT = Column("written_at", TIMESTAMP, "when the row was written, UTC", provenance=True)
