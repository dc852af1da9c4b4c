"""The clips that a scorer of duplicates compares with each other, the best first."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from jobs.clip_items import COLUMNS
from jobs.curate import read_set
from schemas.catalog import Lake
from schemas.clips import CLIPS
from schemas.errors import ConfigError
from schemas.media import MEDIA
from schemas.table import content_sha256


def compared_clips(lake: Lake, set_name: str | None) -> pa.Table:
    """The clips of a set, or all there are. Raises: ConfigError if no set is named and clips were cut in several ways."""
    if set_name is not None:
        return read_set(lake, set_name).select(COLUMNS)
    clips = lake.read(CLIPS, ["segmentation_id", *COLUMNS])
    ways = sorted(pc.unique(clips["segmentation_id"]).to_pylist())
    if len(ways) > 1:
        raise ConfigError(
            f"clips were cut in several ways, {', '.join(ways)}, and would overlap: give a SET to compare"
        )
    return clips.select(COLUMNS)


def by_quality(lake: Lake, clips: pa.Table) -> pa.Table:
    """Clips with their `media_id` and `sharpness`, null where it is not known -> the same with `area_px`, the best first: more
    pixels, then sharper, then by id.
    """
    media = lake.read(MEDIA, ["media_id", "width_px", "height_px"])
    area = pc.multiply(media["width_px"].cast(pa.int64()), media["height_px"].cast(pa.int64()))
    media = pa.table({"media_id": media["media_id"], "area_px": area})
    clips = clips.join(media, "media_id", join_type="inner")
    return clips.sort_by([("area_px", "descending"), ("sharpness", "descending"), ("clip_id", "ascending")])


def compared_sha256(clips: pa.Table, *more: str) -> str:
    """The hash of which clips are compared, of what their order hangs on, and of more columns."""
    return content_sha256(clips, ["clip_id", "area_px", "sharpness", *more], ["clip_id"])


def is_image(clips: pa.Table) -> pa.ChunkedArray:
    """1 for images, 0 for videos: the groups inside which clips are compared."""
    return pc.equal(clips["kind"], "image").cast(pa.int64())


def compared_columns(clips: pa.Table, scorer_id: str, place: NDArray[np.int64]) -> dict[str, pa.Array]:
    """Clips, the best first, and the place of the better clip most like each, -1 if there is none -> the columns that all
    families of duplicates have.
    """
    places = pa.array(place, mask=place < 0)
    return {
        "clip_id": clips["clip_id"],
        "scorer_id": pa.repeat(scorer_id, len(clips)),
        "duplicate_of": clips["clip_id"].take(places),
        "rank": pa.array(np.arange(len(clips)), pa.int32()),
        "rank_of_better": places.cast(pa.int32()),
    }
