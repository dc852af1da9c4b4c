"""Captions: text about a window of a clip, by a captioner. A second captioner adds rows."""

import pyarrow as pa

from schemas.columns import CLIP_ID, RUN_ID, WRITTEN_AT
from schemas.table import Column, Table

CAPTIONER_ID = Column("captioner_id", pa.string(), "hash of engine, model digest, prompt, sampling and windowing")

CAPTIONS = Table(
    name="captions",
    doc="One row per clip, window and captioner.",
    key=("clip_id", "window", "captioner_id"),
    columns=(
        CLIP_ID,
        Column("window", pa.int32(), 'index of the window inside the clip, from 0; in SQL written "window"'),
        CAPTIONER_ID,
        Column("text", pa.string(), "the caption"),
        Column("window_start_ms", pa.int64(), "start of the window inside the medium"),
        Column("window_end_ms", pa.int64(), "end of the window inside the medium"),
        Column("engine", pa.string(), "what wrote it: `provided` came with the medium"),
        Column("origin", pa.string(), "for provided captions: manifest, sidecar_json or sidecar_txt", nullable=True),
        RUN_ID,
        WRITTEN_AT,
    ),
)
