"""Checkpoints of the lake by name: an id, the beginning of one, or the latest of an objective."""

from schemas.catalog import Lake
from schemas.checkpoints import CHECKPOINTS
from schemas.errors import ConfigError


def checkpoint_row(lake: Lake, checkpoint: str, objective: str) -> dict[str, object]:
    """The `checkpoints` row of an id or a unique beginning of one; `latest` is the newest of its objective.

    Raises: ConfigError if none or several fit.
    """
    rows = [row for row in lake.read(CHECKPOINTS).to_pylist() if row["objective"] == objective]
    if checkpoint == "latest":
        found = sorted(rows, key=lambda row: row["written_at"])[-1:]
    else:
        found = [row for row in rows if str(row["checkpoint_id"]).startswith(checkpoint)]
    if len(found) != 1:
        known = [row["checkpoint_id"] for row in rows]
        raise ConfigError(f"{checkpoint!r} names {len(found)} {objective} checkpoints; there are {known}")
    return dict(found[0])
