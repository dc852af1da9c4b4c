"""Scan: clips and CPU scores of everything not yet scanned, by one decode per medium."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs.cluster import ensure_ray, num_cpus
from jobs.progress import progress
from jobs.run import recorded
from pipeline.decode import check_decoder
from pipeline.rules import float32
from pipeline.sandbox import Sandbox
from pipeline.scan_medium import ScanConfig, scan_medium
from pipeline.stage import Rows, Stage, StageOutcome, left_to_do, run_stage
from schemas.catalog import Lake
from schemas.clips import CLIPS, SCANS
from schemas.errors import ConfigError, RowError
from schemas.media import LOCATIONS, MEDIA
from schemas.recipe import short_hash
from schemas.runs import ATTEMPTS
from schemas.scores import CONTINUITY, FAMILIES

WORKER_MEMORY_MB = 512  # what a scan of ordinary media holds; limits.memory_mb is what a hostile one may take


@dataclass(frozen=True)
class ScanReport:
    """What a scan did. `outcome` is None when there was nothing to do; `num_given_up` media failed before and were left."""

    scan_id: str
    num_media: int
    num_given_up: int
    outcome: StageOutcome | None


class ScanWorker:
    """Scans media in a child process of its own, which dies in its place when a file is hostile."""

    def __init__(self, config: ScanConfig) -> None:
        self.config = config
        self.sandbox = Sandbox(config.limits.timeout_s, config.limits.memory_mb)

    def process(self, item: Mapping[str, Any]) -> Rows:
        """One medium -> rows of `clips`, every score family and `scans`."""
        path = _same_bytes(item)
        left_out = item["left_out"]
        result = self.sandbox.run(scan_medium, path, item["media_id"], item["kind"], self.config, left_out or ())
        if left_out is None:
            said = f"{path.name} can be read now, and was not cut before: `outback scan` without segmentation.joined, and score"
            raise RowError("NotCut", f"{said} continuity, before scenes of it are joined", terminal=False)
        return {CLIPS.name: result.clips, **result.scores, SCANS.name: [result.scan]}


def scan_stage(config: ScanConfig) -> Stage:
    """The stage for a config: its id covers the segmentation, every scorer, the decoder and the limits."""
    return Stage(
        name="scan",
        # More than the scan's id: what failed under one decoder or limit is worth another try under others.
        stage_id=short_hash({"scan_id": config.scan_id, "decoder": config.decoder, **config.limits.model_dump()}),
        item_key="media_id",
        tables=(CLIPS, *FAMILIES, SCANS),
        make_worker=partial(ScanWorker, config),
        memory_mb=WORKER_MEMORY_MB,
        failures=config.failures,
    )


def scan(lake: Lake, config: ScanConfig, *, retry_failed: bool = False) -> ScanReport:
    """Scan what is left. Does not start Ray when nothing is.

    Raises: FailureRateError if more media fail, or failed before and are left alone, than the recipe allows; ConfigError if
        scenes are to be joined and a medium has a cut that the scorer did not score.
    """
    check_decoder(config.decoder)
    stage = scan_stage(config)
    media = lake.read(MEDIA, ["media_id", "kind", "num_bytes"])
    done = lake.read(SCANS, ["media_id", "scan_id"])
    done = done.filter(pc.equal(done["scan_id"], config.scan_id))
    left = left_to_do(lake, stage, media, done, retry_failed=retry_failed)
    if not len(left.items):
        left.check(config.failures, "media")
        return ScanReport(config.scan_id, len(media), left.num_given_up, None)
    todo = _with_places(lake, left.items)
    todo = todo.append_column("left_out", _left_out(lake, config, todo))
    inputs = {"media": lake.snapshot_id(MEDIA), "todo": len(todo), "scan_id": config.scan_id}
    with recorded(lake, "scan", config, inputs) as run, progress("scan") as advance:
        ensure_ray()
        outcome = run_stage(lake, stage, todo, run.run_id, num_cpus(), advance)
        run.outcome |= {"done": outcome.num_done, "failed": outcome.num_failed, "rows": dict(outcome.rows_added)}
        run.outcome["failed_by_reason"] = dict(outcome.failed_by_reason)
        left.check(config.failures, "media", outcome)
    return ScanReport(config.scan_id, len(media), left.num_given_up, outcome)


def _left_out(lake: Lake, config: ScanConfig, todo: pa.Table) -> pa.Array:
    """Media -> of each the first frames of clips that are joined to the ones before them, none unless the recipe asks; null for
    a video that could not be cut.
    """
    joined = config.segmentation.joined
    frames: dict[str, list[int]] = {medium: [] for medium in todo["media_id"].to_pylist()}
    uncut: set[str] = set()
    if joined is not None:
        apart = config.segmentation.model_copy(update={"joined": None}).segmentation_id
        clips = lake.read_where(CLIPS, "segmentation_id", [apart], ["clip_id", "media_id", "kind", "start_frame"])
        clips = clips.filter(
            pc.and_(
                pc.equal(clips["kind"], "video"),
                pc.is_in(clips["media_id"], value_set=todo["media_id"].combine_chunks()),
            )
        )
        scores = lake.read_where(CONTINUITY, "scorer_id", [joined.scorer], ["clip_id", "continuity"])
        found = clips.join(scores, "clip_id", join_type="left outer")
        failed = lake.read_where(ATTEMPTS, "stage", ["scan"], ["item_id"])["item_id"].to_pylist()
        videos = set(todo.filter(pc.equal(todo["kind"], "video"))["media_id"].to_pylist())
        uncut = videos - set(clips["media_id"].to_pylist())
        num_uncut = len(uncut - set(failed))
        if num_uncut or found["continuity"].null_count:
            raise ConfigError(
                f"segmentation.joined.scorer={joined.scorer} has no row for {found['continuity'].null_count} of {len(found)} "
                f"clips, and {num_uncut} videos were not cut yet. Run `outback scan` without segmentation.joined, `outback "
                f"score aesthetic`, and `outback score continuity --set segmentation={apart}` first"
            )
        for row in found.filter(pc.greater_equal(found["continuity"], float32(joined.low))).to_pylist():
            frames[row["media_id"]].append(row["start_frame"])
    return pa.array(
        [None if medium in uncut else sorted(found) for medium, found in frames.items()], pa.list_(pa.int64())
    )


def _with_places(lake: Lake, todo: pa.Table) -> pa.Table:
    """Adds every known place of each medium, in order of name, the first as `uri`; and its size as the cost."""
    places: dict[str, list[str]] = {}
    for row in lake.read(LOCATIONS, ["media_id", "uri"]).sort_by("uri").to_pylist():
        found = places.setdefault(row["media_id"], [])
        if row["uri"] not in found:
            found.append(row["uri"])
    ids = todo["media_id"].to_pylist()
    todo = todo.append_column("uris", pa.array([places.get(item, []) for item in ids], pa.list_(pa.string())))
    todo = todo.append_column("uri", pa.array([places.get(item, [None])[0] for item in ids], pa.string()))
    return todo.append_column("cost", todo["num_bytes"])


def _same_bytes(item: Mapping[str, Any]) -> Path:
    """The first place that still holds a file of the ingested size.

    Raises: RowError if there is none; not terminal, because a store may be back tomorrow.
    """
    seen = []
    for uri in item["uris"]:
        try:
            size = Path(uri).stat().st_size
        except OSError as error:
            seen.append(f"{uri}: {error.strerror}")
            continue
        if size == item["num_bytes"]:
            return Path(uri)
        seen.append(f"{uri}: {size} bytes, ingested with {item['num_bytes']}")
    raise RowError("Moved", f"no place of {item['media_id']} holds it any more: {'; '.join(seen)}", terminal=False)
