"""Score semantic duplicates: how like a better clip each is in what it shows, by embeddings that are kept. Reads no medium.

The mean of the embeddings of a clip's frames stands for it. Vectors lie in a temporary file and are read a few cells at a
time: a million clips of 768 numbers take 1.5 GB of disk, and 3 GB more while means are made.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jobs.compared_clips import by_quality, compared_clips, compared_columns, compared_sha256, is_image
from jobs.kept_embeddings import Kept, kept_frames, kept_vectors
from jobs.progress import progress
from jobs.run import recorded
from pipeline.find_similar import BLOCK_CLIPS, VERSION, find_similar, unit_vectors
from pipeline.fingerprint_clips import fingerprint_id
from schemas.catalog import Lake
from schemas.fingerprints import FINGERPRINTS
from schemas.recipe import Config, short_hash
from schemas.scores import SEMANTIC


class SemanticConfig(Config):
    """Whose embeddings are compared."""

    model: str | None = None
    """A `model_id` of `embeddings`. Unset: the only one there is."""


@dataclass(frozen=True)
class SemanticReport:
    """What was compared. `num_without` clips have no embedding of the model and no row; `num_new` rows were written."""

    scorer_id: str
    model_id: str
    num_clips: int
    num_without: int
    num_new: int


def score_semantic(lake: Lake, set_name: str | None, config: SemanticConfig) -> SemanticReport:
    """Compare the clips of a set, or all there are, by the embeddings they have. Images are compared with images alone.

    Better is the clip with more pixels, then, where fingerprints were made, the sharper, then the first by id.

    Raises: ConfigError if no clip has an embedding, if embeddings are of several models and none is named, or if no set is
        named and the clips were cut in several ways.
    """
    members = compared_clips(lake, set_name)
    kept = kept_frames(lake, members, config.model)
    model_id = kept.model_id
    counts = kept.frames.group_by("clip_id").aggregate([([], "count_all")]).rename_columns(["clip_id", "num_frames"])
    clips = members.select(["clip_id", "media_id", "kind"]).join(counts, "clip_id", join_type="inner")
    prints = lake.read_where(FINGERPRINTS, "fingerprint_id", [fingerprint_id()], ["clip_id", "sharpness"])
    clips = by_quality(lake, clips.join(prints, "clip_id", join_type="left outer"))
    compared = compared_sha256(clips, "num_frames")
    scorer_id = short_hash({"version": VERSION, "model_id": model_id, "compared": compared})
    num_without = len(members) - len(clips)
    there = lake.read_where(SEMANTIC, "scorer_id", [scorer_id], ["clip_id"])
    if len(there) == len(clips):
        return SemanticReport(scorer_id, model_id, len(clips), num_without, 0)
    inputs = {"set": set_name, "model_id": model_id, "clips": len(clips)}
    with (
        recorded(lake, "score", config, inputs) as run,
        tempfile.TemporaryDirectory() as folder,
        progress("score semantic") as advance,
    ):
        vectors = _vectors(lake, kept, clips, Path(folder))
        found = find_similar(vectors, is_image(clips).to_numpy(), lambda done, all_: advance(done, all_, ""))
        scores = {"semantic": pa.array(found.cosine), **compared_columns(clips, scorer_id, found.place)}
        num_new = lake.append(SEMANTIC, pa.table(scores), run.run_id)
        run.outcome |= {"scorer_id": scorer_id, "rows": num_new}
    return SemanticReport(scorer_id, model_id, len(clips), num_without, num_new)


def _vectors(lake: Lake, kept: Kept, clips: pa.Table, folder: Path) -> NDArray[np.float16]:
    """Unit vectors [clips, dim] of the mean embedding of each clip, in their order, in a file of the folder."""
    shape = (len(clips), kept.dim)
    places = {clip: place for place, clip in enumerate(clips["clip_id"].to_pylist())}
    sums = np.memmap(folder / "sums", np.float32, "w+", shape=shape)
    for found, _, vectors_of in kept_vectors(lake, kept, places):
        np.add.at(sums, found, vectors_of)  # exact, so in any order
    vectors = np.memmap(folder / "vectors", np.float16, "w+", shape=shape)
    for start in range(0, len(clips), BLOCK_CLIPS):
        vectors[start : start + BLOCK_CLIPS] = unit_vectors(sums[start : start + BLOCK_CLIPS])
    del sums
    (folder / "sums").unlink()
    return vectors
