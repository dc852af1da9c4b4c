"""Score semantic duplicates: how like a better clip each is in what it shows, by embeddings that are kept. Reads no medium.

The mean of the embeddings of a clip's frames stands for it. Vectors lie in a temporary file and are read a few cells at a
time: a million clips of 768 numbers take 1.5 GB of disk, and 3 GB more while means are made.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from jobs.compared_clips import by_quality, compared_clips, compared_columns, compared_sha256, is_image
from jobs.progress import progress
from jobs.run import recorded
from pipeline.find_similar import BLOCK_CLIPS, VERSION, find_similar, on_grid, unit_vectors
from pipeline.fingerprint_clips import fingerprint_id
from schemas.catalog import Lake
from schemas.embeddings import EMBEDDINGS
from schemas.errors import ConfigError
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
    model_id, dim, counts = _model(lake, members, config)
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
        vectors = _vectors(lake, model_id, clips, dim, Path(folder))
        found = find_similar(vectors, is_image(clips).to_numpy(), lambda done, all_: advance(done, all_, ""))
        scores = {"semantic": pa.array(found.cosine), **compared_columns(clips, scorer_id, found.place)}
        num_new = lake.append(SEMANTIC, pa.table(scores), run.run_id)
        run.outcome |= {"scorer_id": scorer_id, "rows": num_new}
    return SemanticReport(scorer_id, model_id, len(clips), num_without, num_new)


def _model(lake: Lake, members: pa.Table, config: SemanticConfig) -> tuple[str, int, pa.Table]:
    """The model whose embeddings are compared, their length, and by clip how many frames have one."""
    rows = lake.read(EMBEDDINGS, ["clip_id", "model_id", "dim"])
    rows = rows.filter(pc.is_in(rows["clip_id"], value_set=members["clip_id"].combine_chunks()))
    models = sorted(pc.unique(rows["model_id"]).to_pylist())
    if not models:
        raise ConfigError(
            f"none of {len(members)} clips has an embedding. `outback score aesthetic` keeps those it computes, and needs "
            "--set clip=PATH and --set weights=PATH: run it first"
        )
    if config.model is None and len(models) > 1:
        raise ConfigError(f"clips have embeddings of several models: choose one with --set model=, of {models}")
    model_id = config.model or models[0]
    if model_id not in models:
        raise ConfigError(f"no clip has an embedding of model {model_id!r}; there are those of {models}")
    mine = rows.filter(pc.equal(rows["model_id"], model_id))
    counts = mine.group_by("clip_id").aggregate([([], "count_all")]).rename_columns(["clip_id", "num_frames"])
    return model_id, mine["dim"][0].as_py(), counts


def _vectors(lake: Lake, model_id: str, clips: pa.Table, dim: int, folder: Path) -> NDArray[np.float16]:
    """Unit vectors [clips, dim] of the mean embedding of each clip, in their order, in a file of the folder."""
    shape = (len(clips), dim)
    places = {clip: place for place, clip in enumerate(clips["clip_id"].to_pylist())}
    sums = np.memmap(folder / "sums", np.float32, "w+", shape=shape)
    for batch in lake.iter_batches(EMBEDDINGS, ["clip_id", "model_id", "embedding"], batch_rows=BLOCK_CLIPS):
        held = map(places.get, batch["clip_id"].to_pylist())
        wanted = [
            (place, vector.as_buffer())
            for place, model, vector in zip(held, batch["model_id"].to_pylist(), batch["embedding"], strict=True)
            if place is not None and model == model_id
        ]
        if wanted:
            stored = np.stack([np.frombuffer(vector, "<f2") for _, vector in wanted])
            np.add.at(sums, [place for place, _ in wanted], on_grid(stored))  # exact, so in any order
    vectors = np.memmap(folder / "vectors", np.float16, "w+", shape=shape)
    for start in range(0, len(clips), BLOCK_CLIPS):
        vectors[start : start + BLOCK_CLIPS] = unit_vectors(sums[start : start + BLOCK_CLIPS])
    del sums
    (folder / "sums").unlink()
    return vectors
