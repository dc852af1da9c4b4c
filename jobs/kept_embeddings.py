"""Embeddings that scorers kept, read a batch at a time: those of a million clips do not fit into memory."""

from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.find_similar import BLOCK_CLIPS, on_grid
from schemas.catalog import Lake
from schemas.embeddings import EMBEDDINGS
from schemas.errors import ConfigError


def kept_frames(lake: Lake, clips: pa.Table, model: str | None) -> tuple[str, int, pa.Table]:
    """Clips, and a `model_id` unless there is only one -> the model, the length of its vectors, and `clip_id` and `frame_ms`
    of the frames of these clips that have one.

    Raises: ConfigError if no clip has an embedding, or if they are of several models and none is named.
    """
    rows = lake.read(EMBEDDINGS, ["clip_id", "frame_ms", "model_id", "dim"])
    rows = rows.filter(pc.is_in(rows["clip_id"], value_set=clips["clip_id"].combine_chunks()))
    models = sorted(pc.unique(rows["model_id"]).to_pylist())
    if not models:
        raise ConfigError(
            f"none of {len(clips)} clips has an embedding. `outback score aesthetic` keeps those it computes, and needs "
            "--set clip=PATH and --set weights=PATH: run it first"
        )
    if model is None and len(models) > 1:
        raise ConfigError(f"clips have embeddings of several models: choose one with --set model=, of {models}")
    model_id = model or models[0]
    if model_id not in models:
        raise ConfigError(f"no clip has an embedding of model {model_id!r}; there are those of {models}")
    mine = rows.filter(pc.equal(rows["model_id"], model_id))
    return model_id, mine["dim"][0].as_py(), mine.select(["clip_id", "frame_ms"])


def kept_vectors(
    lake: Lake, model_id: str, places: Mapping[str, int]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]]:
    """A model, and places by clip -> places, moments of frames in milliseconds, and their vectors on the grid [frames, dim],
    in no order to rely on.
    """
    columns = ["clip_id", "frame_ms", "model_id", "embedding"]
    for batch in lake.iter_batches(EMBEDDINGS, columns, batch_rows=BLOCK_CLIPS):
        found = np.array([places.get(clip, -1) for clip in batch["clip_id"].to_pylist()], np.int64)
        wanted = np.flatnonzero((found >= 0) & pc.equal(batch["model_id"], model_id).to_numpy(zero_copy_only=False))
        if len(wanted):
            vectors = b"".join(batch["embedding"].take(pa.array(wanted)).to_pylist())
            stored = np.frombuffer(vectors, "<f2").reshape(len(wanted), -1)
            yield found[wanted], batch["frame_ms"].to_numpy()[wanted], on_grid(stored)
