"""Caption: what a set holds and has no caption of this captioner yet, by an engine, or by what came with the media."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs.captioners import captioned_soundly
from jobs.checkpoints import checkpoint_row
from jobs.clip_items import clip_items
from jobs.cluster import ensure_ray, num_cpus
from jobs.curate import read_set
from jobs.model_files import model_digest
from jobs.progress import progress
from jobs.run import recorded
from pipeline.caption_clips import CaptionRecipe, CaptionWorker, captioner_row
from pipeline.caption_endpoint import EndpointEngine, served_model
from pipeline.caption_prompts import load_prompt
from pipeline.caption_provided import CAPTIONER as PROVIDED_CAPTIONER
from pipeline.caption_provided import CAPTIONER_ID as PROVIDED_ID
from pipeline.caption_provided import caption_row, provided_caption
from pipeline.caption_vllm import VllmEngine
from pipeline.caption_windows import windows
from pipeline.stage import Stage, StageOutcome, left_to_do, run_stage
from schemas.captions import CAPTIONERS, CAPTIONS
from schemas.catalog import Lake
from schemas.clips import CLIPS
from schemas.errors import ConfigError
from schemas.identity import window_id
from schemas.media import LOCATIONS

WINDOW_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("window_id", "clip_id", "kind", "uri")]
    + [(name, pa.int64()) for name in ("window", "window_start_ms", "window_end_ms")]
)
_CHECKPOINT = re.compile(r"[0-9a-f]{4,16}")


@dataclass(frozen=True)
class CaptionReport:
    """Windows of the set's clips; how many have a caption of this captioner now, how many of those are new, and how many
    failed or have none to give. A caption that failed its checks counts: it is there, marked.
    """

    set_name: str
    captioner_id: str
    num_clips: int
    num_windows: int
    num_captioned: int
    num_new: int
    num_failed: int
    seconds: float


def caption(
    lake: Lake,
    set_name: str,
    recipe: CaptionRecipe = CaptionRecipe(),  # noqa: B008  # frozen
    *,
    retry_failed: bool = False,
) -> CaptionReport:
    """Caption what is left of a set. Starts neither Ray nor an engine when nothing is.

    Raises: ConfigError if there is no such set, model, prompt or endpoint; TransientError if the endpoint goes away.
    """
    if recipe.engine == "provided":
        return _caption_provided(lake, set_name)
    if recipe.model is None:
        raise ConfigError(f"engine {recipe.engine!r} needs a model; give --set model=FOLDER_OR_NAME")
    prompt_id, prompt = load_prompt(recipe.prompt)
    model, make_engine = _engine(lake, recipe, recipe.model)
    digest = model_digest(model, recipe.revision, served=recipe.engine == "endpoint")
    captioner = captioner_row(recipe, prompt_id, prompt, model, digest)
    captioner_id = str(captioner["captioner_id"])
    make_worker = partial(CaptionWorker, make_engine, recipe, captioner_id, prompt_id, prompt)
    stage = caption_stage(recipe, captioner_id, make_worker)
    clips = clip_items(lake, set_name)
    if recipe.skip_captioned:
        done_by_others = captioned_soundly(lake, clips, but_for=captioner_id)
        clips = clips.filter(pc.invert(pc.is_in(clips["clip_id"], value_set=done_by_others)))
    items = _window_items(clips, recipe.windows.max_s)
    done = _done(lake, captioner_id)
    left = left_to_do(lake, stage, items, done, retry_failed=retry_failed)
    todo = left.items
    before = left.num_before
    if not len(todo):
        left.check(recipe.failures, "windows")
        return CaptionReport(set_name, captioner_id, len(clips), len(items), before, 0, len(items) - before, 0.0)
    inputs = {"set": set_name, "captioner_id": captioner_id, "todo": len(todo)}
    with recorded(lake, "caption", recipe, inputs) as run, progress("caption") as advance:
        lake.append(CAPTIONERS, [captioner], run.run_id)
        ensure_ray()
        num_gpus, most = _room(recipe)
        stage = replace(stage, num_gpus=num_gpus)
        outcome = run_stage(lake, stage, todo, run.run_id, min(recipe.num_engines, most), advance)
        run.outcome |= _counts(lake, run.run_id, outcome)
        left.check(recipe.failures, "windows", outcome)
    now = before + outcome.num_done
    return CaptionReport(
        set_name, captioner_id, len(clips), len(items), now, outcome.num_done, len(items) - now, outcome.seconds
    )


def caption_stage(recipe: CaptionRecipe, captioner_id: str, make_worker: Callable[[], CaptionWorker]) -> Stage:
    """The stage of a captioner: windows in, captions out, `recipe.concurrency` of them under way in each worker."""
    return Stage(
        name="caption",
        stage_id=captioner_id,
        item_key="window_id",
        tables=(CAPTIONS,),
        make_worker=make_worker,
        concurrency=recipe.concurrency,
        max_block_items=max(16, recipe.concurrency),
        failures=recipe.failures,
    )


def _engine(lake: Lake, recipe: CaptionRecipe, model: str) -> tuple[str, Any]:
    """The model behind the recipe's name, as a folder or a hub name, and what makes its engine inside a worker."""
    if recipe.engine == "endpoint":
        served = served_model(recipe.endpoint, model)
        return served.root, partial(EndpointEngine, model, recipe.endpoint, served.is_vllm)
    if Path(model).is_dir():
        folder = os.path.abspath(model)
    elif model == "latest" or _CHECKPOINT.fullmatch(model):
        folder = str(checkpoint_row(lake, model, "captioner")["uri"])
    else:
        folder = model
    return folder, partial(VllmEngine, folder, recipe.revision, recipe.vllm)


def _room(recipe: CaptionRecipe) -> tuple[int, int]:
    """GPUs that each worker asks for, and how many workers the connected cluster has room for. Without a GPU vLLM runs on
    CPU.

    Raises: ConfigError if an engine wants more GPUs than any node has: Ray would wait for one that has them.
    """
    import ray

    gpus = [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]
    wanted = recipe.vllm.tensor_parallel_size
    if recipe.engine != "vllm" or not any(gpus):
        return 0, num_cpus()
    if wanted > max(gpus):
        raise ConfigError(
            f"vllm.tensor_parallel_size is {wanted}, and no node of the cluster has more than {max(gpus)} GPUs"
        )
    return wanted, min(num_cpus(), sum(found // wanted for found in gpus))


def _window_items(clips: pa.Table, max_s: float) -> pa.Table:
    """Clips with places -> one item per window."""
    rows = [
        {
            "window_id": window_id(clip["clip_id"], window.index),
            "clip_id": clip["clip_id"],
            "kind": clip["kind"],
            "uri": clip["uri"],
            "window": window.index,
            "window_start_ms": window.start_ms,
            "window_end_ms": window.end_ms,
        }
        for clip in clips.to_pylist()
        for window in windows(clip["start_ms"], clip["end_ms"], max_s)
    ]
    return pa.Table.from_pylist(rows, WINDOW_SCHEMA)


def _done(lake: Lake, captioner_id: str) -> pa.Table:
    """The windows this captioner has captioned, as `window_id`."""
    found = lake.read_where(CAPTIONS, "captioner_id", [captioner_id], ["clip_id", "window"])
    ids = [window_id(row["clip_id"], row["window"]) for row in found.to_pylist()]
    return pa.table({"window_id": pa.array(ids, pa.string())})


def _counts(lake: Lake, run_id: str, outcome: StageOutcome) -> dict[str, object]:
    """What the run did, with the tokens it cost."""
    rows = lake.read_where(CAPTIONS, "run_id", [run_id], ["prompt_tokens", "output_tokens", "problem"])
    return {
        "done": outcome.num_done,
        "failed": outcome.num_failed,
        "problems": len(rows) - rows["problem"].null_count,
        "prompt_tokens": pc.sum(rows["prompt_tokens"]).as_py() or 0,
        "output_tokens": pc.sum(rows["output_tokens"]).as_py() or 0,
        "stage_seconds": outcome.seconds,
    }


def _caption_provided(lake: Lake, set_name: str) -> CaptionReport:
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
    done = set(_done(lake, PROVIDED_ID)["window_id"].to_pylist())
    new = [row for row in rows if window_id(str(row["clip_id"]), 0) not in done]
    # Lakes of 0.1.0 have captions that came with media, and no row that says what their captioner id stands for.
    is_named = bool(len(lake.read_where(CAPTIONERS, "captioner_id", [PROVIDED_ID], ["captioner_id"])))
    if new or (rows and not is_named):
        with recorded(lake, "caption", {"captioner_id": PROVIDED_ID}, {"set": set_name, "todo": len(new)}) as run:
            lake.append(CAPTIONERS, [PROVIDED_CAPTIONER], run.run_id)
            run.outcome["captions"] = lake.append(CAPTIONS, new, run.run_id)
    return CaptionReport(
        set_name, PROVIDED_ID, len(clips), len(clips), len(rows), len(new), len(clips) - len(rows), 0.0
    )


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
