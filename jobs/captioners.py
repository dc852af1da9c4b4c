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


def whole_captions(
    clips: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """Clips, and captions of them and others -> (clip, captioner) of clips that one captioned whole, with its captions in
    the order of their windows.
    """
    held = {clip["clip_id"]: clip for clip in clips}
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: int(row["window"])):
        if row["clip_id"] in held:
            found.setdefault((row["clip_id"], row["captioner_id"]), []).append(row)
    return {key: captions for key, captions in found.items() if is_whole(held[key[0]], captions)}


def is_whole(clip: Mapping[str, Any], captions: Sequence[Mapping[str, Any]]) -> bool:
    """Whether captions by one captioner, in the order of their windows, reach from a clip's first window to its end."""
    in_order = [caption["window"] for caption in captions] == list(range(len(captions)))
    return bool(captions) and in_order and captions[-1]["window_end_ms"] >= clip["end_ms"]


def captioned_soundly(lake: Lake, clips: pa.Table, but_for: str) -> pa.Array:
    """The clips of which some captioner other than `but_for` has captioned every window without a problem."""
    rows = lake.read(CAPTIONS, ["clip_id", "window", "captioner_id", "problem", "window_end_ms"])
    rows = rows.filter(pc.and_(pc.not_equal(rows["captioner_id"], but_for), pc.is_null(rows["problem"])))
    whole = whole_captions(clips.to_pylist(), rows.to_pylist())
    return pa.array(sorted({clip for clip, _ in whole}), pa.string())
