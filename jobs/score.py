"""Score: one scorer family over clips that are there already. The decode-once scorers run in `scan`."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs.captioners import find_captioner, whole_captions
from jobs.clip_items import clip_items
from jobs.cluster import ensure_ray, num_cpus
from jobs.progress import progress
from jobs.run import recorded
from pipeline.clip_model import CONFIG_FILE
from pipeline.hub_files import local_folder
from pipeline.score_captions import VERSION, CaptionScoreConfig, CaptionScoreWorker
from pipeline.stage import Stage, StageOutcome, left_to_do, run_stage
from schemas.captions import CAPTION_SCORES, CAPTIONS
from schemas.catalog import Lake
from schemas.errors import ConfigError
from schemas.identity import files_digest
from schemas.recipe import short_hash


@dataclass(frozen=True)
class ScoreReport:
    """What was scored. `outcome` is None when there was nothing to do; `num_given_up` clips failed before and were left."""

    scorer_id: str
    num_clips: int
    num_given_up: int
    outcome: StageOutcome | None


def score_captions(
    lake: Lake, set_name: str, captioner: str | None, config: CaptionScoreConfig, *, retry_failed: bool = False
) -> ScoreReport:
    """Score the captions that one captioner gave the clips of a set. `captioner` is an id or the beginning of one.

    Raises: ConfigError if no or several captioners fit, or there is no CLIP model in the folder.
    """
    clips = clip_items(lake, set_name)
    captioner_id, windows = _captions(lake, set_name, clips.to_pylist(), captioner)
    clip_digest = files_digest(str(local_folder(config.clip)), CONFIG_FILE) if config.clip else None
    identity = {"version": VERSION, "captioner_id": captioner_id, "clip": clip_digest}
    scorer_id = short_hash({**identity, "windows": config.windows.identity() if config.clip else None})
    stage = Stage(
        name="score_caption",
        stage_id=scorer_id,
        item_key="clip_id",
        tables=(CAPTION_SCORES,),
        make_worker=partial(CaptionScoreWorker, config, scorer_id, captioner_id),
        failures=config.failures,
    )
    items = clips.filter(pc.is_in(clips["clip_id"], value_set=pa.array(list(windows), pa.string())))
    items = items.append_column("windows", pa.array([windows[clip] for clip in items["clip_id"].to_pylist()]))
    done = lake.read_where(CAPTION_SCORES, "scorer_id", [scorer_id], ["clip_id"])
    left = left_to_do(lake, stage, items, done, retry_failed=retry_failed)
    if not len(left.items):
        left.check(config.failures, "clips")
        return ScoreReport(scorer_id, len(items), left.num_given_up, None)
    inputs = {"set": set_name, "scorer_id": scorer_id, "captioner_id": captioner_id, "todo": len(left.items)}
    with recorded(lake, "score", config, inputs) as run, progress("score caption") as advance:
        ensure_ray()
        outcome = run_stage(lake, stage, left.items, run.run_id, num_cpus(), advance)
        run.outcome |= {"done": outcome.num_done, "failed": outcome.num_failed}
        left.check(config.failures, "clips", outcome)
    return ScoreReport(scorer_id, len(items), left.num_given_up, outcome)


def _captions(
    lake: Lake, set_name: str, clips: list[dict[str, Any]], captioner: str | None
) -> tuple[str, dict[str, list[dict[str, Any]]]]:
    """The captioner meant, and its captions by clip, windows in order, of clips that it has captioned whole: a score
    stands for good, and a window that comes later would be missing from it.
    """
    held = {clip["clip_id"] for clip in clips}
    columns = ["clip_id", "window", "captioner_id", "text", "problem", "window_start_ms", "window_end_ms"]
    rows = [row for row in lake.read(CAPTIONS, columns).to_pylist() if row["clip_id"] in held]
    if captioner is not None:
        captioner_id = find_captioner(lake, captioner)
    else:
        there = sorted({row["captioner_id"] for row in rows})
        if len(there) != 1:
            raise ConfigError(f"clips of {set_name!r} have captions by {there}, expected one: give --captioner")
        (captioner_id,) = there
    whole = whole_captions(clips, [row for row in rows if row["captioner_id"] == captioner_id])
    if not whole:
        raise ConfigError(f"{captioner_id} has captioned no clip of {set_name!r} whole; run `outback caption` first")
    shown = ("text", "problem", "window_start_ms", "window_end_ms")
    return captioner_id, {
        clip: [{name: row[name] for name in shown} for row in found] for (clip, _), found in whole.items()
    }
