"""Fingerprints: what a clip looks like over time in a few bytes, so that duplicates are found without reading it again."""

import pyarrow as pa

from schemas.columns import CLIP_ID, RUN_ID, WRITTEN_AT
from schemas.table import Column, Table

FINGERPRINT_ID = Column("fingerprint_id", pa.string(), "hash of the fingerprint's version and samples")

FINGERPRINTS = Table(
    name="fingerprints",
    doc="Perceptual hashes of a clip's frames, spread evenly from its first to its last, and a hash of all its pixels.",
    key=("clip_id", "fingerprint_id"),
    columns=(
        CLIP_ID,
        FINGERPRINT_ID,
        Column("hashes", pa.binary(), "a 64-bit pHash a frame, little-endian, in order; an image repeats its one"),
        Column("blank", pa.int32(), "frames without a picture, whose hash is 0: it would be that of noise"),
        Column(
            "pixels_sha256", pa.string(), "SHA-256 of the decoded pixels of every frame of the span, at full size, hex"
        ),
        Column("sharpness", pa.float32(), "median over the frames of the variance of the Laplacian of luma"),
        RUN_ID,
        WRITTEN_AT,
    ),
)
