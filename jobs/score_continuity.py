"""Score continuity: whether a clip goes on with what the one before it shows, so that scenes cut in two can be told.

A flash, a splash or a door that closes makes a cut inside a scene. The pictures on both sides of it are alike all the same:
not always those at the cut itself, one of which may be the flash, so that two frames on either side are looked at (the idea
of Panda-70M, arXiv 2402.19479, section 3.1, which compares frames on both sides of a cut). Reads no medium.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from jobs.kept_embeddings import Kept, kept_frames, kept_vectors
from jobs.run import recorded
from pipeline.find_similar import BLOCK_CLIPS, GRID
from schemas.catalog import Lake
from schemas.clips import CLIPS
from schemas.errors import ConfigError
from schemas.recipe import Config, short_hash
from schemas.scores import CONTINUITY

VERSION = 1
NEAREST = 2  # frames on either side of a cut
MS_BITS = 40


class ContinuityConfig(Config):
    """Whose embeddings are compared, and of which cuts."""

    model: str | None = None
    """A `model_id` of `embeddings`. Unset: the only one there is."""
    segmentation: str | None = None
    """A `segmentation_id` of `clips`. Unset: the only one there is."""


@dataclass(frozen=True)
class ContinuityReport:
    """What was scored. `num_without` clips have no row: they, or those before them, have no embedding of the model."""

    scorer_id: str
    model_id: str
    segmentation_id: str
    num_clips: int
    num_without: int
    num_new: int


def continuity_scorer_id(model_id: str, segmentation_id: str) -> str:
    """The id of the scorer: by which model it sees, and where cuts are."""
    return short_hash({"version": VERSION, "model_id": model_id, "segmentation_id": segmentation_id})


def score_continuity(lake: Lake, config: ContinuityConfig) -> ContinuityReport:
    """Compare each clip of a video with the clip before it, where both have embeddings. What was compared is not compared
    again when more frames of a clip have one.

    Raises: ConfigError if no clip has an embedding, or if there are several models or segmentations and none is named.
    """
    clips, segmentation_id = _clips(lake, config)
    kept = kept_frames(lake, clips, config.model)
    model_id = kept.model_id
    scorer_id = continuity_scorer_id(model_id, segmentation_id)
    has_one = pc.is_in(clips["clip_id"], value_set=pc.unique(kept.frames["clip_id"])).to_numpy()
    media = clips["media_id"].combine_chunks()
    follows = np.r_[False, pc.equal(media[1:], media[:-1]).to_numpy(zero_copy_only=False)]
    scored = has_one & (~follows | np.r_[False, has_one[:-1]])
    there = lake.read_where(CONTINUITY, "scorer_id", [scorer_id], ["clip_id"])
    left = scored & ~pc.is_in(clips["clip_id"], value_set=there["clip_id"].combine_chunks()).to_numpy()
    num_new, num_without = 0, int((~scored).sum())
    if left.any():
        inputs = {"model_id": model_id, "segmentation_id": segmentation_id, "todo": int(left.sum())}
        with recorded(lake, "score", config, inputs) as run, tempfile.TemporaryDirectory() as folder:
            later = np.flatnonzero(left & follows)
            cosines = np.full(len(clips), -1, np.float32)
            cosines[later] = _cosines(lake, kept, clips, later, Path(folder))
            before = pa.array(np.arange(len(clips)) - 1, mask=~follows)
            rows = pa.table(
                {
                    "clip_id": clips["clip_id"],
                    "scorer_id": pa.repeat(scorer_id, len(clips)),
                    "continuity": pa.array(cosines),
                    "continues": clips["clip_id"].take(before),
                }
            )
            num_new = lake.append(CONTINUITY, rows.filter(pa.array(left)), run.run_id)
            run.outcome |= {"scorer_id": scorer_id, "rows": num_new}
    return ContinuityReport(scorer_id, model_id, segmentation_id, len(clips), num_without, num_new)


def _clips(lake: Lake, config: ContinuityConfig) -> tuple[pa.Table, str]:
    """The clips of videos, medium by medium in their order, and how they were cut."""
    clips = lake.read(CLIPS, ["clip_id", "segmentation_id", "media_id", "kind", "start_frame"])
    clips = clips.filter(pc.equal(clips["kind"], "video"))
    ways = sorted(pc.unique(clips["segmentation_id"]).to_pylist())
    if not ways:
        raise ConfigError("there are no clips of videos: `outback scan` cuts them")
    if config.segmentation is None and len(ways) > 1:
        raise ConfigError(f"clips were cut in several ways: choose one with --set segmentation=, of {ways}")
    segmentation_id = config.segmentation or ways[0]
    if segmentation_id not in ways:
        raise ConfigError(f"there are no clips of segmentation {segmentation_id!r}; there are those of {ways}")
    clips = clips.filter(pc.equal(clips["segmentation_id"], segmentation_id))
    return clips.sort_by([("media_id", "ascending"), ("start_frame", "ascending")]), segmentation_id


def _cosines(lake: Lake, kept: Kept, clips: pa.Table, later: NDArray[np.int64], folder: Path) -> NDArray[np.float32]:
    """Places of clips, each of which follows the clip in the place before -> how like the nearest frames are. Vectors lie in
    a file, in order of clips and moments.
    """
    ids = clips["clip_id"].to_pylist()
    place = pc.index_in(kept.frames["clip_id"], value_set=clips["clip_id"].combine_chunks()).to_numpy().astype(np.int64)
    keys = np.sort((place << MS_BITS) | kept.frames["frame_ms"].to_numpy())
    vectors = np.memmap(folder / "vectors", np.float16, "w+", shape=(len(keys), kept.dim))
    for found, frame_ms, stored in kept_vectors(lake, kept, {clip: index for index, clip in enumerate(ids)}):
        vectors[np.searchsorted(keys, (found << MS_BITS) | frame_ms)] = stored
    edges = np.searchsorted(keys, np.arange(len(ids) + 1) << MS_BITS)
    best = np.full(len(later), -1, np.float32)
    for start in range(0, len(later), BLOCK_CLIPS):
        part = slice(start, start + BLOCK_CLIPS)
        here = later[part]
        for back in range(NEAREST):
            for on in range(NEAREST):
                one = np.maximum(edges[here] - 1 - back, edges[here - 1])  # a clip of one frame gives it again
                other = np.minimum(edges[here] + on, edges[here + 1] - 1)
                best[part] = np.maximum(best[part], _cosine(vectors[one], vectors[other]))
    return best


def _cosine(left: NDArray[np.float16], right: NDArray[np.float16]) -> NDArray[np.float32]:
    """Vectors on the grid [pairs, dim] -> their cosines. Sums are of whole numbers, and so the same on every machine."""
    one, other = (np.rint(side.astype(np.float32) * GRID).astype(np.int64) for side in (left, right))
    norms = np.sqrt((one * one).sum(axis=1).astype(np.float64) * (other * other).sum(axis=1))
    found: NDArray[np.float32] = np.clip((one * other).sum(axis=1) / np.maximum(norms, 1), -1, 1).astype(np.float32)
    return found
