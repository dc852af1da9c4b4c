"""Captions that came with the media: manifests and sidecars speak for every clip of their medium.

A caption describes a whole file. A video that was cut into several clips has none per clip, so only clips that span their
whole medium are captioned this way; the others wait for a model.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from schemas.recipe import short_hash

ENGINE = "provided"
CAPTIONER_ID = short_hash({"engine": ENGINE, "version": 1})
CAPTIONER = {
    "captioner_id": CAPTIONER_ID,
    "model": ENGINE,
    "model_digest": ENGINE,
    "prompt": "{}",
    "sampling": "[]",
    "windowing": "{}",
    "checks": "{}",
}
PREFERENCE = ("manifest", "sidecar_json", "sidecar_txt")


def provided_caption(locations: Sequence[Mapping[str, Any]]) -> tuple[str, str] | None:
    """A medium's `media_locations` rows -> (caption, origin), or None. Manifests win over sidecars, then the first place."""
    found = [row for row in locations if row["caption"]]
    if not found:
        return None
    best = min(found, key=lambda row: (PREFERENCE.index(row["caption_source"]), row["uri"], row["caption"]))
    return str(best["caption"]), str(best["caption_source"])


def caption_row(clip: Mapping[str, Any], caption: str, origin: str) -> dict[str, object]:
    """One clip and its medium's caption -> the `captions` row, one window over the whole clip."""
    return {
        "clip_id": clip["clip_id"],
        "window": 0,
        "captioner_id": CAPTIONER_ID,
        "text": caption,
        "window_start_ms": clip["start_ms"],
        "window_end_ms": clip["end_ms"],
        "engine": ENGINE,
        "origin": origin,
    }
