"""Score duplicates: each clip is read once for its fingerprint; then every clip gets how like a better one it is.

Unlike other scores these depend on which clips there are, so their `scorer_id` covers all clips that were compared: after
a scan of more media the family is scored anew, under another id, from fingerprints of which only the new ones are made.
Recipes that name no scorer take the one that compared most.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa

from jobs.clip_items import with_places
from jobs.cluster import ensure_ray, num_cpus
from jobs.compared_clips import by_quality, compared_clips, compared_columns, compared_sha256, is_image
from jobs.progress import progress
from jobs.run import recorded
from pipeline.find_duplicates import VERSION, find_duplicates
from pipeline.fingerprint_clips import NUM_FRAMES, FingerprintConfig, FingerprintWorker, fingerprint_id
from pipeline.stage import Stage, StageOutcome, left_to_do, run_stage
from schemas.catalog import Lake
from schemas.fingerprints import FINGERPRINTS
from schemas.recipe import short_hash
from schemas.scores import DUPLICATE


@dataclass(frozen=True)
class DuplicateReport:
    """What was compared. `outcome` counts the clips that were read, and is None when none was; `num_clips` those compared."""

    scorer_id: str
    num_clips: int
    num_given_up: int
    outcome: StageOutcome | None
    num_new: int


def score_duplicates(
    lake: Lake, set_name: str | None, config: FingerprintConfig, *, retry_failed: bool = False
) -> DuplicateReport:
    """Compare the clips of a set, or all there are, with each other. Clips that cannot be read have no row.

    Raises: ConfigError if no set is named and the clips were cut in several ways: they would overlap.
    """
    members = compared_clips(lake, set_name)
    stage = Stage(
        name="fingerprint",
        # More than the fingerprint's id: what failed under one limit is worth another try under others.
        stage_id=short_hash(
            {"fingerprint_id": fingerprint_id(), **config.model_dump(mode="json", exclude={"failures"})}
        ),
        item_key="clip_id",
        tables=(FINGERPRINTS,),
        make_worker=partial(FingerprintWorker, config),
        failures=config.failures,
    )
    done = lake.read_where(FINGERPRINTS, "fingerprint_id", [fingerprint_id()], ["clip_id"])
    left = left_to_do(lake, stage, members, done, retry_failed=retry_failed)
    if not len(left.items):
        left.check(config.failures, "clips")
    if not len(left.items) and (known := _known(lake, members)) is not None:
        return DuplicateReport(*known, left.num_given_up, None, 0)
    inputs = {"set": set_name, "fingerprint_id": fingerprint_id(), "todo": len(left.items)}
    with recorded(lake, "score", config, inputs) as run, progress("score duplicate") as advance:
        outcome = None
        if len(left.items):
            ensure_ray()
            outcome = run_stage(lake, stage, with_places(lake, left.items), run.run_id, num_cpus(), advance)
            run.outcome |= {"done": outcome.num_done, "failed": outcome.num_failed}
            left.check(config.failures, "clips", outcome)
        clips = _fingerprinted(lake, members)
        scorer_id = _scorer_id(clips)
        num_new = lake.append(DUPLICATE, _scored(clips, scorer_id), run.run_id) if len(clips) else 0
        run.outcome |= {"scorer_id": scorer_id, "rows": num_new}
    return DuplicateReport(scorer_id, len(clips), left.num_given_up, outcome, num_new)


def _known(lake: Lake, members: pa.Table) -> tuple[str, int] | None:
    """The scorer's id and how many clips it compared, if its rows are there."""
    clips = _fingerprinted(lake, members)
    scorer_id = _scorer_id(clips)
    there = lake.read_where(DUPLICATE, "scorer_id", [scorer_id], ["clip_id"])
    return (scorer_id, len(clips)) if len(there) == len(clips) else None


def _fingerprinted(lake: Lake, members: pa.Table) -> pa.Table:
    """Clips with a fingerprint, the best first: more pixels, then sharper, then by id."""
    columns = ["clip_id", "hashes", "blank", "pixels_sha256", "sharpness"]
    prints = lake.read_where(FINGERPRINTS, "fingerprint_id", [fingerprint_id()], columns)
    return by_quality(lake, members.select(["clip_id", "media_id", "kind"]).join(prints, "clip_id", join_type="inner"))


def _scorer_id(clips: pa.Table) -> str:
    return short_hash({"version": VERSION, "fingerprint_id": fingerprint_id(), "compared": compared_sha256(clips)})


def _scored(clips: pa.Table, scorer_id: str) -> pa.Table:
    hashes = np.frombuffer(b"".join(clips["hashes"].to_pylist()), "<u8").reshape(-1, NUM_FRAMES)
    found = find_duplicates(
        hashes.astype(np.uint64),
        clips["blank"].to_numpy(),
        np.array(clips["pixels_sha256"].to_pylist(), object),
        is_image(clips).to_numpy(),
    )
    scores = {"exact": pa.array(found.exact).cast(pa.float32()), "near": pa.array(found.near)}
    return pa.table({**scores, **compared_columns(clips, scorer_id, found.place)})
