"""The clips of a set, each with a place where its medium can be read: what every stage after curation starts from."""

from pathlib import Path

import pyarrow as pa

from jobs.curate import read_set
from schemas.catalog import Lake
from schemas.media import LOCATIONS

COLUMNS = ["clip_id", "media_id", "kind", "start_ms", "end_ms"]


def clip_items(lake: Lake, set_name: str) -> pa.Table:
    """The clips of a set with a place of their medium, as `uri`."""
    return with_places(lake, read_set(lake, set_name).select(COLUMNS))


def with_places(lake: Lake, clips: pa.Table) -> pa.Table:
    """Clips with their `media_id` -> the same by clip id, with a place of their medium as `uri`."""
    media = sorted(set(clips["media_id"].to_pylist()))
    places: dict[str, str] = {}
    for row in lake.read_where(LOCATIONS, "media_id", media, ["media_id", "uri"]).sort_by("uri").to_pylist():
        # The first name that still leads somewhere; if none does, the first, so that the failure names it.
        if row["media_id"] not in places or (not Path(places[row["media_id"]]).exists() and Path(row["uri"]).exists()):
            places[row["media_id"]] = row["uri"]
    ids = clips["media_id"].to_pylist()
    clips = clips.append_column("uri", pa.array([places[item] for item in ids], pa.string()))
    return clips.sort_by("clip_id")
