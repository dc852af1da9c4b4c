"""Curate: a recipe over scores -> a named, immutable set of clips. Opens no medium and decodes nothing.

The id of a set is a hash of the recipe and of the content that was read, so two lakes that hold the same give the same
id. Publishing takes several commits, in an order that makes a killed run harmless and a repeated one complete it: the
recipe, the clips, a tag `curated/NAME` on every table involved, and last the row in `curated_sets` that gives the name.
The tag on `curated` is set first and create-only, so of two runs that race for a name one loses before it publishes.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.abc import MetaPathFinder
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs.run import Run, recorded
from jobs.set_inputs import Input, Scored, empty_families, how_to_fill, read_scored
from jobs.shipped import load_named
from pipeline.rules import (
    KEPT,
    CurateRecipe,
    FunnelStep,
    Places,
    Rule,
    explain,
    first_rejections,
    funnel,
    reached,
    rules_of,
    undecided,
)
from schemas.catalog import Lake
from schemas.clips import CLIPS
from schemas.curated import CURATED, CURATED_SETS, RECIPES
from schemas.errors import ConfigError, SchemaError
from schemas.recipe import short_hash, validated
from schemas.table import Table, content_sha256, sorted_by

TAG_PREFIX = "curated/"
_NAME = re.compile(r"[A-Za-z0-9._-]+", re.ASCII)


@dataclass(frozen=True)
class CurateResult:
    """A set, or with `name` None what it would be. `created` is false where it was there already."""

    name: str | None
    curated_id: str
    recipe_id: str
    recipe: CurateRecipe
    num_in: int
    num_clips: int
    missing: Mapping[str, int]
    funnel: tuple[FunnelStep, ...]
    content_sha256: str
    created: bool


@dataclass(frozen=True)
class _Evaluation:
    recipe: CurateRecipe
    inputs: tuple[Input, ...]
    rules: list[Rule]
    clips: pa.Table
    first: Places
    missing: dict[str, int]

    @property
    def kept(self) -> pa.Table:
        """The clip ids of the set, in order."""
        return sorted_by(self.clips.select(["clip_id"]).filter(pa.array(self.first == KEPT)), ["clip_id"])


def check_name(what: str, name: str | None) -> None:
    """Raises: ConfigError if `name` cannot be a tag, a file name and an argument alike."""
    if name is None or not _NAME.fullmatch(name):
        raise ConfigError(f"{what} name {name!r}: give one of letters, digits, '.', '_' and '-', such as emu3-v1")


def load_curate_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> CurateRecipe:
    """The name of a shipped recipe or the path of a TOML file, and `key=value` overrides -> the recipe."""
    return load_named(CurateRecipe, name_or_path, overrides)


def curate(lake: Lake, recipe: CurateRecipe, name: str | None, *, dry_run: bool = False) -> CurateResult:
    """A recipe -> the clips it keeps, published under `name`. A set that is already there costs no snapshot.

    Raises: ConfigError if the name is malformed or names another set, if scores are missing, or if nothing is kept.
    """
    if not dry_run:
        check_name("set", name)
    found = _evaluate(lake, recipe)
    kept = found.kept
    recipe_id = short_hash(found.recipe.model_dump(mode="json"))
    result = CurateResult(
        name=None if dry_run else name,
        curated_id=short_hash([recipe_id, {item.table.name: item.sha256 for item in found.inputs}]),
        recipe_id=recipe_id,
        recipe=found.recipe,
        num_in=len(found.clips),
        num_clips=len(kept),
        missing=found.missing,
        funnel=tuple(funnel(found.rules, found.clips, found.first)),
        content_sha256=content_sha256(kept, ["clip_id"], ["clip_id"]),
        created=False,
    )
    if dry_run or _is_published(lake, result):
        return result
    if not len(kept):
        raise ConfigError(f"the recipe keeps none of {len(found.clips)} clips; see what rejects them with --dry-run")
    with recorded(lake, "curate", found.recipe, {item.table.name: item.snapshot_id for item in found.inputs}) as run:
        _publish(lake, result, kept, found.inputs, run)
        run.outcome |= {"name": name, "curated_id": result.curated_id, "num_clips": result.num_clips}
    return CurateResult(**{**_shallow(result), "created": True})


def explain_clips(lake: Lake, recipe: CurateRecipe) -> pa.Table:
    """A recipe -> clip_id, verdict, rule and value of every clip: which rule rejected it first, and for what value."""
    found = _evaluate(lake, recipe)
    return explain(found.rules, found.clips, found.first)


def read_set(lake: Lake, name: str) -> pa.Table:
    """The name of a set -> its rows of `clips`, by clip id, exactly as when the set was made.

    Raises: ConfigError if there is no such set; SchemaError if what the lake holds is not what the name was given to.
    """
    row = set_row(lake, name)
    pins: dict[str, dict[str, Any]] = json.loads(row["pins"])
    for table in (CLIPS, CURATED):
        if lake.uuid(table) != pins[table.name]["uuid"]:
            raise SchemaError(
                f"set {name!r} was made from another table {table.name}, which has been dropped and remade"
            )
    ids = _members(lake, row["curated_id"], pins[CURATED.name]["snapshot_id"])
    recipes = lake.read_where(RECIPES, "recipe_id", [row["recipe_id"]], ["recipe"])
    segmentation_id = json.loads(recipes["recipe"][0].as_py())["segmentation_id"]
    columns = CLIPS.content_columns
    clips = lake.read(CLIPS, columns, at=pins[CLIPS.name]["snapshot_id"])
    wanted = pc.and_(
        pc.equal(clips["segmentation_id"], segmentation_id), pc.is_in(clips["clip_id"], value_set=ids["clip_id"])
    )
    clips = clips.filter(wanted).sort_by("clip_id")
    sha256 = content_sha256(clips, ["clip_id"], ["clip_id"])
    if len(clips) != row["num_clips"] or sha256 != row["content_sha256"]:
        raise SchemaError(
            f"set {name!r} was published with {row['num_clips']} clips of content {row['content_sha256']}, "
            f"and the lake gives {len(clips)} of {sha256}: its tables were changed by another program"
        )
    return clips


def set_row(lake: Lake, name: str) -> dict[str, Any]:
    """The row of `curated_sets` that gave a name. Raises: ConfigError naming the sets there are if it is not one."""
    rows = lake.read(CURATED_SETS).to_pylist()
    for row in rows:
        if row["name"] == name:
            return dict(row)
    names = ", ".join(sorted(row["name"] for row in rows)) or "none yet"
    raise ConfigError(f"there is no curated set {name!r}; there are: {names}")


def set_recipe(lake: Lake, name: str) -> CurateRecipe:
    """The name of a set -> the recipe that made it, with the segmentation and the scorers it read.

    Raises: ConfigError if there is no such set, or if this version knows no such rules.
    """
    recipes = lake.read_where(RECIPES, "recipe_id", [set_row(lake, name)["recipe_id"]], ["recipe"])
    values = json.loads(recipes["recipe"][0].as_py())
    return validated(CurateRecipe, values, f"the recipe of set {name!r}, which another version made,")


def leave_pandas_out() -> None:
    """For a process that does nothing but curate: pandas, which nothing here uses, is not imported.

    Arrow imports it, where it is installed, at the first conversion of a Python value, which takes a third of a second.
    Call it first thing after the import; data frames are out of reach of the process from then on.
    """

    class WithoutPandas(MetaPathFinder):
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == "pandas":
                raise ModuleNotFoundError("pandas is left out of this process", name=name)

    if "pandas" not in sys.modules:
        sys.meta_path.insert(0, WithoutPandas())


# --- deciding ---


def _evaluate(lake: Lake, recipe: CurateRecipe) -> _Evaluation:
    rules = rules_of(recipe)
    empty = empty_families(lake, rules)
    scored = read_scored(lake, recipe, rules, set(empty))
    first = first_rejections(rules, scored.clips)
    for table in empty.values():  # which is no lack while no verdict hangs on it
        if num_open := int(undecided(rules, scored.clips, scored.absent, table.name, first).sum()):
            raise ConfigError(
                f"{table.name} is empty, and by this recipe the verdict on {num_open} clips hangs on it. "
                f"{how_to_fill(table)} first"
            )
    clips, *scores = scored.inputs
    missing = {item.table.name: _check_coverage(item, recipe.coverage, rules, scored, first) for item in scores}
    pins = {item.table.name.removeprefix("score_"): item.pinned[1] for item in scores}
    scorers = recipe.scorers.pinned(pins)
    resolved = recipe.model_copy(update={"segmentation_id": clips.pinned[1], "scorers": scorers})
    return _Evaluation(resolved, scored.inputs, rules, scored.clips, first, missing)


def undecided_clips(lake: Lake, recipe: CurateRecipe, family: Table) -> pa.ChunkedArray:
    """A recipe and a family -> the ids of the clips it should score for that recipe, in order: those that no rule before
    the family's rejects, and that those rules alone do not let through. All others have their verdict without it.

    Scores that the family has by now are not looked at: that is an anti-join of the caller's, who knows the scorer. What
    other families have not scored yet rejects nothing.

    Raises: ConfigError if there are no clips, if the recipe has no rule that reads the family, or does not say which of
    several scorers of another family it means.
    """
    rules = rules_of(recipe)
    if not any(family.name in rule.families for rule in rules):
        raise ConfigError(f"the recipe has no rule that reads {family.name}: it leaves nothing to score for it")
    scored = read_scored(lake, recipe, rules, {*empty_families(lake, rules), family.name})
    first = first_rejections(rules, scored.clips, scored.absent)
    mask = undecided(rules, scored.clips, scored.absent, family.name, first)
    return scored.clips["clip_id"].filter(pa.array(mask)).sort()


def _check_coverage(item: Input, required: float, rules: Sequence[Rule], scored: Scored, first: Places) -> int:
    name = item.table.name
    if name not in scored.absent:
        return 0
    missing = int(undecided(rules, scored.clips, scored.absent, name, first).sum())
    num_asked = int(reached(rules, scored.clips, first, name).sum())
    if missing and (num_asked - missing) / num_asked < required:  # a quotient: 8 of 10 is 0.8, and 0.2 * 10 is not 2
        raise ConfigError(
            f"{name} has no row of scorer {item.pinned[1]} for {missing} of {num_asked} clips, and the recipe wants "
            f"coverage={required:g}. {how_to_fill(item.table)} to complete the scores, or accept it with "
            "--set coverage=..."
        )
    return missing


# --- publishing ---


def _is_published(lake: Lake, result: CurateResult) -> bool:
    rows = lake.read_where(CURATED_SETS, "name", [str(result.name)], ["name", "curated_id"]).to_pylist()
    if rows and rows[0]["curated_id"] != result.curated_id:
        raise ConfigError(
            f"the name {result.name!r} was given to the set {rows[0]['curated_id']}; this recipe over what is here "
            f"now is {result.curated_id}. Sets never change: choose another name"
        )
    return bool(rows)


def _publish(lake: Lake, result: CurateResult, kept: pa.Table, inputs: Sequence[Input], run: Run) -> None:
    recipe = {"recipe_id": result.recipe_id, "recipe": result.recipe.canonical_json()}
    lake.append(RECIPES, [recipe], run.run_id)
    rows = kept.append_column("curated_id", pa.repeat(pa.scalar(result.curated_id), len(kept)))
    lake.append(CURATED, rows, run.run_id)
    tag = TAG_PREFIX + str(result.name)
    pins = {CURATED.name: {"uuid": lake.uuid(CURATED), "snapshot_id": _tag_set(lake, tag, result)}}
    for item in inputs:
        pins[item.table.name] = {"uuid": item.uuid, "snapshot_id": _tag_input(lake, tag, item)}
    row = {
        "name": result.name,
        "curated_id": result.curated_id,
        "recipe_id": result.recipe_id,
        "inputs": json.dumps({item.table.name: item.sha256 for item in inputs}, sort_keys=True),
        "pins": json.dumps(pins, sort_keys=True),
        "funnel": json.dumps([asdict(step) for step in result.funnel]),
        "num_clips": result.num_clips,
        "content_sha256": result.content_sha256,
    }
    if not lake.append(CURATED_SETS, [row], run.run_id):
        _is_published(lake, result)  # another run was first: fine if it published the same set


def _tag_set(lake: Lake, tag: str, result: CurateResult) -> int:
    """The snapshot of `curated` that the tag names from now on: the newest, or one tagged earlier for the same set."""

    def holds(snapshot_id: int) -> bool:
        members = _members(lake, result.curated_id, snapshot_id)
        return content_sha256(members, ["clip_id"], ["clip_id"]) == result.content_sha256

    current = lake.snapshot_id(CURATED)
    assert current is not None
    return _tag_once(lake, CURATED, tag, current, holds)


def _tag_input(lake: Lake, tag: str, item: Input) -> int:
    def holds(snapshot_id: int) -> bool:
        rows = lake.read(item.table, item.columns, at=snapshot_id)
        mine = rows.filter(pc.equal(rows[item.table.key[1]], item.pinned[1]))
        return content_sha256(mine, mine.column_names, ["clip_id"]) == item.sha256

    return _tag_once(lake, item.table, tag, item.snapshot_id, holds)


def _tag_once(lake: Lake, table: Table, tag: str, snapshot_id: int, holds: Any) -> int:
    try:
        lake.tag(table, tag, snapshot_id)
    except ConfigError:
        taken = lake.tags(table).get(tag)
        if taken is None or not holds(taken):
            raise
        return taken  # set by a run that was killed before it published the name, over the same content
    return snapshot_id


def _members(lake: Lake, curated_id: str, snapshot_id: int) -> pa.Table:
    rows = lake.read(CURATED, ["curated_id", "clip_id"], at=snapshot_id)
    return rows.filter(pc.equal(rows["curated_id"], curated_id)).select(["clip_id"])


def _shallow(result: CurateResult) -> dict[str, Any]:
    return {name: getattr(result, name) for name in result.__dataclass_fields__}


# --- printing ---


def print_curate(result: CurateResult, as_json: bool) -> None:
    """A result -> the funnel and the set on stdout, for people or as one JSON document."""
    if as_json:
        print(
            json.dumps(
                {
                    **_shallow(result),
                    "recipe": result.recipe.model_dump(mode="json"),
                    "funnel": [asdict(step) for step in result.funnel],
                }
            )
        )
        return
    print_funnel(result.num_in, result.funnel)
    for family, count in result.missing.items():
        if count:
            print(f"{family}: {count} clips have no score and pass no rule that asks for it", file=sys.stderr)
    if result.name is None:
        print(f"{result.num_clips} clips would be kept ({result.curated_id}); nothing was written")
    else:
        state = "published" if result.created else "was there already"
        print(f"{result.name}: {result.num_clips} clips, {result.curated_id}, {state}")


def print_funnel(num_in: int, steps: Sequence[FunnelStep]) -> None:
    """A funnel -> one line per rule with what it rejected, and the clips nearest to its bounds. Plain and quick."""
    width = max([len(step.rule) for step in steps], default=5)
    print(f"{'rule':{width}}  {'bounds':>22}  {'in':>9}  {'rejected':>9}  {'left':>9}")
    print(f"{'clips':{width}}  {'':>22}  {'':>9}  {'':>9}  {num_in:>9}")
    for step in steps:
        bounds = (
            f"{'' if step.low is None else f'{step.low:g} <='} x {'' if step.high is None else f'<= {step.high:g}'}"
        )
        print(
            f"{step.rule:{width}}  {bounds.strip():>22}  {step.num_in:>9}  {step.num_rejected:>9}  {step.num_left:>9}"
        )
        if step.num_rescued:
            print(f"{'':{width}}    {step.num_rescued} of those left are outside the bounds and rescued")
        for example in step.examples:
            value = "null" if example.value is None else f"{example.value:.6g}"
            print(f"{'':{width}}    {example.clip_id}  {value} {example.bound}")
