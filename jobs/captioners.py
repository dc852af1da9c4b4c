"""Captioners of the lake by name, and the clips that one has captioned whole."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.caption_provided import CAPTIONER_ID as PROVIDED_ID
from schemas.captions import CAPTIONS
from schemas.catalog import Lake
from schemas.errors import ConfigError

PROVIDED = "provided"


def find_captioner(lake: Lake, name: str) -> str:
    """`provided`, an id, or the beginning of one -> the id. Raises: ConfigError if no or several captioners fit."""
    if name == PROVIDED:
        return PROVIDED_ID
    known = sorted(pc.unique(lake.read(CAPTIONS, ["captioner_id"])["captioner_id"]).to_pylist())
    found = [captioner_id for captioner_id in known if captioner_id.startswith(name)]
    if len(found) != 1:
        raise ConfigError(f"{len(found)} captioners fit {name!r}, expected one; there are {known}, and {PROVIDED!r}")
    return str(found[0])


def is_whole(clip: Mapping[str, Any], captions: Sequence[Mapping[str, Any]]) -> bool:
    """Whether captions by one captioner, in the order of their windows, reach from a clip's first window to its end."""
    in_order = [caption["window"] for caption in captions] == list(range(len(captions)))
    return bool(captions) and in_order and captions[-1]["window_end_ms"] >= clip["end_ms"]


def captioned_soundly(lake: Lake, clips: pa.Table, but_for: str) -> pa.Array:
    """The clips of which some captioner other than `but_for` has captioned every window without a problem."""
    columns = ["clip_id", "window", "captioner_id", "problem", "window_end_ms"]
    rows = lake.read(CAPTIONS, columns)
    rows = rows.filter(pc.and_(pc.not_equal(rows["captioner_id"], but_for), pc.is_null(rows["problem"])))
    windows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows.sort_by([("clip_id", "ascending"), ("window", "ascending")]).to_pylist():
        windows.setdefault((row["clip_id"], row["captioner_id"]), []).append(row)
    held = {clip["clip_id"]: clip for clip in clips.to_pylist()}
    found = {clip for (clip, _), captions in windows.items() if clip in held and is_whole(held[clip], captions)}
    return pa.array(sorted(found), pa.string())
