"""Score clips: one family over clips that are there already, each read by its span. Nothing is scanned again.

A family is one that ships here, or `module:name`: a user's own, from the current folder or wherever Python finds it, whose
table is made when it is first used.
"""

import os
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from jobs.clip_items import COLUMNS, with_places
from jobs.cluster import ensure_ray, num_cpus
from jobs.curate import read_set, undecided_clips
from jobs.families import all_tables, is_own
from jobs.progress import progress
from jobs.run import recorded
from jobs.score import ScoreReport
from pipeline.clip_scorer import ClipScorer, ScorerConfig, ScoreWorker, add_to_path, load_scorer, scorer_id
from pipeline.rules import SPLIT, CurateRecipe
from pipeline.stage import Stage, left_to_do, run_stage
from schemas.catalog import Lake
from schemas.clips import CLIPS
from schemas.errors import ConfigError
from schemas.recipe import overridden, short_hash
from schemas.scores import OWN_COMMON, PREFIX, own_family
from schemas.table import Table

BUILT_IN = {
    "aesthetic": "pipeline.score_aesthetic:AestheticScorer",
    "motion_raft": "pipeline.score_motion_raft:RaftScorer",
}


def score_clips(
    lake: Lake,
    family: str,
    overrides: tuple[str, ...] = (),
    *,
    recipe: CurateRecipe | None = None,
    set_name: str | None = None,
    retry_failed: bool = False,
) -> ScoreReport:
    """Score what is left of the clips of a set, or of those that a recipe leaves undecided without the family, or of all.

    Does not start Ray when nothing is left.

    Raises: ConfigError if there is no such scorer, if its family or columns have names that are taken, or if it lacks
        weights.
    """
    folder = os.getcwd()
    add_to_path(folder)
    name = BUILT_IN.get(family, family)
    if ":" not in name:
        raise ConfigError(
            f"there is no family {family!r} to score: expected caption, duplicate, semantic, continuity, "
            f"{', '.join(BUILT_IN)}, or module:name of your own (docs/adding-a-filter.md); `outback scan` scores the others"
        )
    scorer = load_scorer(name)
    table = scorer.table if family in BUILT_IN else _own_table(lake, scorer)
    config = _config(scorer, name, overrides)
    identity = scorer_id(scorer, config, by_code=family not in BUILT_IN)
    stage = Stage(
        name=table.name,
        # More than the scorer's id: what failed under one limit is worth another try under others.
        stage_id=short_hash({"scorer_id": identity, **config.execution.model_dump(mode="json")}),
        item_key="clip_id",
        tables=(*scorer.keeps, table),
        make_worker=partial(ScoreWorker, name, config.model_dump_json(), identity, folder),
        num_cpus=config.execution.num_cpus,
        num_gpus=config.execution.num_gpus,
        failures=config.failures,
    )
    clips = _clips(lake, set_name)
    if recipe is not None:
        clips = clips.filter(pc.is_in(clips["clip_id"], value_set=undecided_clips(lake, recipe, table)))
    done = lake.read_where(table, "scorer_id", [identity], ["clip_id"])
    left = left_to_do(lake, stage, clips, done, retry_failed=retry_failed)
    if not len(left.items):
        left.check(config.failures, "clips")
        return ScoreReport(identity, len(clips), left.num_given_up, None)
    inputs = {"family": family, "set": set_name, "scorer_id": identity, "todo": len(left.items)}
    with (
        recorded(lake, "score", config, inputs) as run,
        progress(f"score {table.name.removeprefix(PREFIX)}") as advance,
    ):
        ensure_ray()
        outcome = run_stage(lake, stage, with_places(lake, left.items), run.run_id, num_cpus(), advance)
        run.outcome |= {"done": outcome.num_done, "failed": outcome.num_failed}
        left.check(config.failures, "clips", outcome)
    return ScoreReport(identity, len(clips), left.num_given_up, outcome)


def _clips(lake: Lake, set_name: str | None) -> pa.Table:
    """Clips by id, each once: cut by whatever detectors, the same span is the same clip."""
    if set_name is not None:
        return read_set(lake, set_name).select(COLUMNS)
    clips = lake.read(CLIPS, COLUMNS)
    return clips.group_by(clips.column_names).aggregate([]).sort_by("clip_id")


def _config(scorer: type[ClipScorer[Any]], name: str, overrides: tuple[str, ...]) -> ScorerConfig:
    try:
        defaults = scorer.config_type()
    except ValidationError as error:
        raise ConfigError(f"scorer {name}: every option needs a default ({error})") from error
    return overridden(defaults, overrides, source=f"scorer {name}")


def _own_table(lake: Lake, scorer: type[ClipScorer[Any]]) -> Table:
    """The table of a user's scorer, with the columns that it had before. Raises: ConfigError if names of it are taken."""
    table = scorer.table
    scores = {column.name: column.doc for column in table.columns if column.name not in OWN_COMMON}
    family = table.name.removeprefix(PREFIX)
    own_family(family, table.doc, scores)  # whoever made the table: its names and meanings are checked
    for other in all_tables(lake):
        if other.name == table.name:
            if not is_own(other):
                raise ConfigError(f"the family {family!r} is one of Outback's own: choose another name")
            scores = {column.name: column.doc for column in other.columns if column.name not in OWN_COMMON} | scores
            continue
        # Rules see these columns side by side.
        beside = {*other.names, SPLIT} if other is CLIPS or other.name.startswith(PREFIX) else set()
        if taken := sorted(set(scores) & beside):
            raise ConfigError(f"family {family!r}: {other.name} has columns {taken}: choose names of your own")
    return own_family(family, table.doc, scores)
