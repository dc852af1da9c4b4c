"""Runs and attempts: every execution, and every item that failed in one."""

import pyarrow as pa

from schemas.columns import RUN_ID
from schemas.table import TIMESTAMP, Column, Table

RUNS = Table(
    name="runs",
    doc="Two rows per execution: one when it starts, one when it ends. A run without an end was killed.",
    key=("run_id", "status"),
    columns=(
        Column("run_id", pa.string(), "unique id of the execution"),
        Column("status", pa.string(), "started, done or failed"),
        Column("job", pa.string(), "ingest, scan, curate, ..."),
        Column("recipe", pa.string(), "resolved options as canonical JSON"),
        Column("inputs", pa.string(), "JSON: what it read, by id"),
        Column("outcome", pa.string(), "JSON: counts, ids and durations; on failure the error"),
        Column("code_version", pa.string(), "version of the code"),
        Column("environment", pa.string(), "JSON: python, platform, versions of what computes"),
        Column("written_at", TIMESTAMP, "when the execution started or ended, UTC"),
    ),
    ledger=True,
)

ATTEMPTS = Table(
    name="attempts",
    doc="Every item that failed, in any stage. `terminal` items are not tried again unless asked for.",
    key=("stage", "stage_id", "item_id", "attempt"),
    columns=(
        Column("stage", pa.string(), "ingest, scan, caption, tokenize, ..."),
        Column("stage_id", pa.string(), "hash of the stage's options"),
        Column("item_id", pa.string(), "media_id, clip_id, or the URI of a file that is no medium"),
        Column("attempt", pa.int32(), "count, from 1"),
        Column("error_class", pa.string(), "short stable name of the reason"),
        Column(
            "message", pa.string(), "what was found, what was expected", provenance=True
        ),  # libraries put times in it
        Column("terminal", pa.bool_(), "whether trying the same bytes again is pointless"),
        Column("uri", pa.string(), "the file concerned", nullable=True),
        Column("host", pa.string(), "where it failed", provenance=True),
        RUN_ID,
        Column("written_at", TIMESTAMP, "when it failed, UTC", provenance=True),
    ),
)
