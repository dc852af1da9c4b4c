"""Embeddings that scorers kept, read a batch at a time: those of a million clips do not fit into memory."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.find_similar import BLOCK_CLIPS, on_grid
from schemas.catalog import Lake
from schemas.embeddings import EMBEDDINGS
from schemas.errors import ConfigError


@dataclass(frozen=True)
class Kept:
    """Where embeddings of some clips stand: the model, the length of its vectors, the snapshot that is read, and `clip_id` and
    `frame_ms` of the frames that have one.
    """

    model_id: str
    dim: int
    snapshot_id: int | None
    frames: pa.Table


def kept_frames(lake: Lake, clips: pa.Table, model: str | None) -> Kept:
    """Clips, and a `model_id` unless there is only one -> what of them has an embedding. Others may be added meanwhile: who
    reads the vectors reads the same snapshot.

    Raises: ConfigError if no clip has an embedding, or if they are of several models and none is named.
    """
    snapshot_id = lake.snapshot_id(EMBEDDINGS)
    rows = lake.read(EMBEDDINGS, ["clip_id", "frame_ms", "model_id", "dim"], at=snapshot_id)
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
    return Kept(model_id, mine["dim"][0].as_py(), snapshot_id, mine.select(["clip_id", "frame_ms"]))


def kept_vectors(
    lake: Lake, kept: Kept, places: Mapping[str, int]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]]:
    """What was kept, and places by clip -> places, moments of frames in milliseconds, and their vectors on the grid
    [frames, dim], in no order to rely on.
    """
    columns = ["clip_id", "frame_ms", "model_id", "embedding"]
    for batch in lake.iter_batches(EMBEDDINGS, columns, at=kept.snapshot_id, batch_rows=BLOCK_CLIPS):
        found = np.array([places.get(clip, -1) for clip in batch["clip_id"].to_pylist()], np.int64)
        wanted = np.flatnonzero(
            (found >= 0) & pc.equal(batch["model_id"], kept.model_id).to_numpy(zero_copy_only=False)
        )
        if len(wanted):
            vectors = b"".join(batch["embedding"].take(pa.array(wanted)).to_pylist())
            stored = np.frombuffer(vectors, "<f2").reshape(len(wanted), -1)
            yield found[wanted], batch["frame_ms"].to_numpy()[wanted], on_grid(stored)
