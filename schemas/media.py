"""Media: one row per distinct content, and one row per place where that content was found."""

import pyarrow as pa

from schemas.columns import KIND, LICENCE, MEDIA_ID, RUN_ID, WRITTEN_AT
from schemas.table import Column, Table

MEDIA = Table(
    name="media",
    doc="One row per distinct content. The bytes stay where they are.",
    key=("media_id",),
    columns=(
        MEDIA_ID,
        Column("digest", pa.string(), "SHA-256 of the bytes, hex"),
        KIND,
        Column("num_bytes", pa.int64(), "size of the file"),
        Column("container", pa.string(), "container or picture format as its reader names it"),
        Column("codec", pa.string(), "video codec, or the picture format"),
        Column("width_px", pa.int32(), "shown width, after rotation"),
        Column("height_px", pa.int32(), "shown height, after rotation"),
        Column("rotation_deg", pa.int32(), "rotation the file asks for, counter-clockwise"),
        Column(
            "fps", pa.float64(), "average frame rate by the header; null for images and where unknown", nullable=True
        ),
        Column("duration_ms", pa.int64(), "duration by the header; null for images and where unknown", nullable=True),
        Column("has_audio", pa.bool_(), "whether there is an audio stream"),
        RUN_ID,
        WRITTEN_AT,
    ),
)

LOCATIONS = Table(
    name="media_locations",
    doc="Where a medium was found and what was said of it there. The same bytes under two names are two rows.",
    key=("location_id",),
    columns=(
        Column("location_id", pa.string(), "hash of medium, place and what was said of it"),
        MEDIA_ID,
        Column("uri", pa.string(), "absolute path or URI of the file"),
        Column("caption", pa.string(), "caption that came with the file", nullable=True),
        Column("caption_source", pa.string(), "manifest, sidecar_json or sidecar_txt", nullable=True),
        LICENCE,
        Column("source", pa.string(), "origin as the manifest states it", nullable=True),
        Column("manifest", pa.string(), "the manifest that listed the file", nullable=True),
        RUN_ID,
        WRITTEN_AT,
    ),
)
