"""Caption: gives the clips of a set the captions that came with their media."""

from dataclasses import dataclass

from jobs.curate import read_set
from jobs.run import recorded
from pipeline.caption_clips import CAPTIONER_ID, caption_row, provided_caption
from schemas.captions import CAPTIONS
from schemas.catalog import Lake
from schemas.clips import CLIPS
from schemas.media import LOCATIONS


@dataclass(frozen=True)
class CaptionReport:
    """Clips of the set, how many carry a caption now, how many of those are new, and how many have none to give."""

    set_name: str
    captioner_id: str
    num_clips: int
    num_new: int
    num_captioned: int
    num_without: int


def caption(lake: Lake, set_name: str) -> CaptionReport:
    """Write a caption for every clip of the set that spans a medium with one; write nothing when all are there."""
    clips = read_set(lake, set_name).to_pylist()
    media = sorted({clip["media_id"] for clip in clips})
    spans = _clips_per_medium(lake, media)
    columns = ["media_id", "uri", "caption", "caption_source"]
    places: dict[str, list[dict[str, str | None]]] = {}
    for row in lake.read_where(LOCATIONS, "media_id", media, columns).to_pylist():
        places.setdefault(row["media_id"], []).append(row)
    rows = []
    for clip in clips:
        found = provided_caption(places.get(clip["media_id"], []))
        if found is not None and spans[clip["media_id"]] == 1:
            rows.append(caption_row(clip, *found))
    have = lake.read(CAPTIONS, ["clip_id", "captioner_id"])
    done = {row["clip_id"] for row in have.to_pylist() if row["captioner_id"] == CAPTIONER_ID}
    new = [row for row in rows if row["clip_id"] not in done]
    if new:
        with recorded(lake, "caption", {"captioner_id": CAPTIONER_ID}, {"set": set_name, "todo": len(new)}) as run:
            run.outcome["captions"] = lake.append(CAPTIONS, new, run.run_id)
    return CaptionReport(set_name, CAPTIONER_ID, len(clips), len(new), len(rows), len(clips) - len(rows))


def _clips_per_medium(lake: Lake, media: list[str]) -> dict[str, int]:
    """How many clips the richest segmentation of each medium has: a caption of the whole speaks for a clip only if 1."""
    counts: dict[tuple[str, str], int] = {}
    for row in lake.read_where(CLIPS, "media_id", media, ["media_id", "segmentation_id"]).to_pylist():
        key = (row["media_id"], row["segmentation_id"])
        counts[key] = counts.get(key, 0) + 1
    most: dict[str, int] = {}
    for (medium, _), count in counts.items():
        most[medium] = max(count, most.get(medium, 0))
    return most
