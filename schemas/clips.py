"""Clips: spans of media, without copying a byte; and scans: which media were cut, how, and with what result."""

import pyarrow as pa

from schemas.columns import CLIP_ID, KIND, MEDIA_ID, RUN_ID, WRITTEN_AT
from schemas.table import Column, Table

SEGMENTATION_ID = Column("segmentation_id", pa.string(), "hash of the detectors and their settings")
SCAN_ID = Column("scan_id", pa.string(), "hash of the segmentation and of every scorer of the pass")

CLIPS = Table(
    name="clips",
    doc="A span of a video between two cuts, or a whole image.",
    key=("clip_id", "segmentation_id"),
    columns=(
        CLIP_ID,
        SEGMENTATION_ID,
        MEDIA_ID,
        KIND,
        Column("start_ms", pa.int64(), "presentation time of the first frame, rounded"),
        Column("end_ms", pa.int64(), "presentation time at which the last frame ends, rounded"),
        Column("start_frame", pa.int64(), "index of the first frame in presentation order, from 0"),
        Column("end_frame", pa.int64(), "index after the last frame"),
        Column("fps", pa.float64(), "frames over duration of the span; null for images", nullable=True),
        RUN_ID,
        WRITTEN_AT,
    ),
)

SCANS = Table(
    name="scans",
    doc="One row per medium whose scan is complete: written after its clips and scores, so it is the mark that it is done.",
    key=("media_id", "scan_id"),
    columns=(
        MEDIA_ID,
        SCAN_ID,
        SEGMENTATION_ID,
        Column("decoder", pa.string(), "the decoder that served the pass"),
        Column("num_frames", pa.int64(), "frames decoded, each once"),
        Column("num_clips", pa.int64(), "clips found"),
        Column("cuts", pa.list_(pa.int64()), "first frame of every clip but the first"),
        Column("seconds", pa.float64(), "wall seconds of the pass", provenance=True),
        RUN_ID,
        WRITTEN_AT,
    ),
)
