"""Texts: where language data enters."""

import pyarrow as pa

from schemas.columns import LICENCE, RUN_ID, WRITTEN_AT
from schemas.table import Column, Table

TEXTS = Table(
    name="texts",
    doc="One row per distinct text.",
    key=("text_id",),
    columns=(
        Column("text_id", pa.string(), "first 16 hex digits of the SHA-256 of the text in UTF-8"),
        Column("text", pa.string(), "the text"),
        Column("uri", pa.string(), "file it was first found in"),
        Column("row", pa.int64(), "row of that file, from 0"),
        LICENCE,
        RUN_ID,
        WRITTEN_AT,
    ),
)
