"""Decisions over several families, some of them incomplete, against a plain walk over rows in Python; and early exits."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.curate import curate, explain_clips, undecided_clips
from pipeline.rules import SCORES, Bounds, CurateRecipe, Interval, ScorerPins, VideoBounds, rules_of
from schemas.catalog import Lake
from schemas.clips import CLIPS
from schemas.errors import ConfigError
from schemas.identity import clip_id
from schemas.scores import AESTHETIC, MOTION, RESOLUTION, TECHNICAL, TEXT
from schemas.table import Table

FAMILIES = (RESOLUTION, MOTION, TEXT, TECHNICAL, AESTHETIC)
RESCUED = CurateRecipe(
    resolution=Bounds(low=512),
    aesthetic=Bounds(low=5.5, rescue={"text": Interval(high=0.1), "colour": Interval(high=0.98)}),
)
Row = dict[str, Any]


def put(lake: Lake, clips: list[Row]) -> None:
    """Clips with `name`, `kind` and, by table name, the scores of one row, or None where the family has none."""
    span = {"start_ms": 0, "end_ms": 9, "start_frame": 0, "end_frame": 9, "fps": None}
    known = [{"clip_id": clip["name"], "segmentation_id": "s", "kind": clip["kind"], **span} for clip in clips]
    lake.append(CLIPS, [{**clip, "media_id": clip["clip_id"][:16]} for clip in known], "r")
    for table in FAMILIES:
        rows = [
            {"clip_id": clip["name"], "scorer_id": "a", **clip[table.name]} for clip in clips if clip.get(table.name)
        ]
        counted = {"num_samples": 1} if "num_samples" in table.names else {}
        lake.append(table, [{**row, **counted} for row in rows], "r")


def image(number: int, edge: float = 720, **scores: float | None) -> Row:
    """An image with rows in the families of the scores that are named; `edge` in pixels."""
    clip: Row = {"name": clip_id(f"{number:016x}", 0, 0), "kind": "image", RESOLUTION.name: {"short_edge_px": edge}}
    for name, value in scores.items():
        table, column = SCORES[name]
        clip[table.name] = {column: value}
    return clip


def walk(clip: Row, recipe: CurateRecipe) -> tuple[str, str | None]:
    """The verdict on one clip, and the rule that rejected it, or that lacks a row it hangs on. Three-valued by hand."""

    def inside(table: Table, column: str, low: float | None, high: float | None) -> bool | None:
        row = clip.get(table.name)
        if not row:
            return None
        value = row.get(column)
        if value is None:
            return False
        stored = np.float32(value)
        return bool((low is None or stored >= np.float32(low)) and (high is None or stored <= np.float32(high)))

    for name, (table, column) in SCORES.items():
        bounds = getattr(recipe, name)
        if bounds is None or clip["kind"] not in bounds.kinds:
            continue
        passed = inside(table, column, bounds.low, bounds.high)
        if bounds.rescue:
            ways = [inside(*SCORES[other], one.low, one.high) for other, one in bounds.rescue.items()]
            rescued = False if False in ways else None if None in ways else True
            passed = True if True in (passed, rescued) else None if None in (passed, rescued) else False
        if passed is not True:
            return ("rejected" if passed is False else "open"), name
    return "kept", None


ASKED = ("resolution", "motion", "text", "colour", "aesthetic")
BOUNDS = st.sampled_from([(0.1, None), (None, 0.3), (0.1, 0.98), (0.3, 0.3)])


def random_clips(count: int) -> list[Row]:
    """Clips of both kinds; in each family some have no row, some a null, and some a value on a bound or off it."""
    rng = random.Random(5)
    clips = []
    for number in range(count):
        clip: Row = {"name": clip_id(f"{rng.getrandbits(64):016x}", 0, number), "kind": rng.choice(["image", "video"])}
        for table, column in map(SCORES.__getitem__, ASKED):
            value = rng.choice([None, 0.05, 0.1, 0.3, 0.98, 1.0])
            clip[table.name] = {column: value} if rng.random() < 0.8 else None
        clips.append(clip)
    return clips


@pytest.fixture(scope="module")
def gaps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Lake, list[Row]]:
    lake, clips = Lake(tmp_path_factory.mktemp("gaps") / "lake"), random_clips(300)
    put(lake, clips[::2])
    put(lake, clips[1::2])
    return lake, clips


@st.composite
def recipes(draw: st.DrawFn) -> CurateRecipe:
    def bounds(kind: type[Bounds], rescue: bool = False) -> Any:
        low, high = draw(BOUNDS)
        other = {"text": Interval(high=0.1), "colour": Interval(high=0.98)} if rescue and draw(st.booleans()) else None
        return kind(low=low, high=high, rescue=other)

    asked = {
        "resolution": bounds(Bounds),
        "motion": bounds(VideoBounds),
        "text": bounds(Bounds),
        "colour": bounds(Bounds),
    }
    chosen = {name: rule for name, rule in asked.items() if draw(st.booleans())}
    return CurateRecipe(**chosen, aesthetic=bounds(Bounds, rescue=True), coverage=0.0)


@settings(max_examples=15, deadline=None)
@given(recipe=recipes())
def test_verdicts_and_early_exits_agree_with_a_walk_by_hand(gaps: tuple[Lake, list[Row]], recipe: CurateRecipe) -> None:
    lake, clips = gaps
    expected = {clip["name"]: walk(clip, recipe) for clip in clips}
    for row in explain_clips(lake, recipe).to_pylist():
        verdict, rule = expected[row["clip_id"]]
        assert (row["verdict"], row["rule"]) == ("kept" if verdict == "kept" else "rejected", rule)
    result = curate(lake, recipe, None, dry_run=True)
    assert result.num_clips == sum(verdict == "kept" for verdict, _ in expected.values())
    assert result.funnel[0].num_in == result.num_in == len(clips)
    assert [step.num_in - step.num_rejected for step in result.funnel] == [step.num_left for step in result.funnel]
    assert [step.num_in for step in result.funnel[1:]] == [step.num_left for step in result.funnel[:-1]]
    rules = {rule.name: rule for rule in rules_of(recipe)}
    stopped = [rules[rule] for verdict, rule in expected.values() if verdict == "open" and rule]
    for family, count in result.missing.items():
        assert count <= sum(family in rule.families for rule in stopped)
        assert count >= sum(family == rule.family.name and not rule.rescue for rule in stopped)
    left = set(undecided_clips(lake, recipe, AESTHETIC).to_pylist())
    for clip in clips:
        without = {**clip, AESTHETIC.name: None}
        verdict, rule = walk(without, recipe)
        if verdict != "open":
            assert clip["name"] not in left  # decided whatever the score
        elif rule == "aesthetic":
            assert clip["name"] in left


def test_a_dear_scorer_is_asked_for_the_undecided_alone_and_decisions_stay(tmp_path: Path) -> None:
    clips = [
        image(0, edge=256),  # too small
        image(1, text=0.0, colour=0.5),  # rescued whatever its aesthetic score
        image(2, text=0.5, colour=0.5),
        image(3, text=0.0, colour=1.0),
        image(4),  # text has not looked yet: it may be rescued, or not
        {**image(5, text=0.5, colour=0.5), "kind": "video"},
    ]
    recipe = RESCUED.model_copy(update={"kinds": ("image",)})
    names = [clip["name"] for clip in clips]
    early, full = Lake(tmp_path / "early"), Lake(tmp_path / "full")
    put(early, clips)
    put(full, clips)
    left = undecided_clips(early, recipe, AESTHETIC).to_pylist()
    assert left == [names[2], names[3], names[4]]
    score = {
        name: {"aesthetic": float(4 + place), "num_samples": 1, "scorer_id": "a"} for place, name in enumerate(names)
    }
    early.append(AESTHETIC, [{"clip_id": name, **score[name]} for name in left], "r")
    full.append(AESTHETIC, [{"clip_id": name, **row} for name, row in score.items()], "r")
    kept = [explain_clips(lake, recipe.model_copy(update={"coverage": 0.0})).to_pylist() for lake in (early, full)]
    assert [row["verdict"] for row in kept[0]] == [row["verdict"] for row in kept[1]]
    assert [row["clip_id"] for row in kept[0] if row["verdict"] == "kept"] == names[1:5]
    result = curate(early, recipe.model_copy(update={"coverage": 1.0}), None, dry_run=True)  # nothing is missing
    assert result.missing[AESTHETIC.name] == 0
    (step,) = (step for step in result.funnel if step.rule == "aesthetic")
    assert (step.num_in, step.num_rejected, step.num_rescued, step.num_left) == (4, 0, 1, 4)


def test_a_family_is_to_score_all_that_comes_to_it_while_others_are_empty(tmp_path: Path) -> None:
    lake = Lake(tmp_path / "lake")
    put(lake, [image(0), image(1, edge=100)])
    assert undecided_clips(lake, RESCUED, AESTHETIC).to_pylist() == [clip_id("0" * 16, 0, 0)]
    assert undecided_clips(lake, RESCUED, TEXT).to_pylist() == [clip_id("0" * 16, 0, 0)]
    with pytest.raises(ConfigError, match="no rule that reads score_motion"):
        undecided_clips(lake, RESCUED, MOTION)


def test_a_recipe_whose_family_is_absent_says_what_makes_it(tmp_path: Path) -> None:
    lake = Lake(tmp_path / "lake")
    put(lake, [image(0, text=0.5, colour=1.0), image(1, text=0.5, colour=0.5)])
    with pytest.raises(
        ConfigError, match=r"score_aesthetic is empty.*outback score aesthetic`, which needs the weights"
    ):
        curate(lake, RESCUED, "x")
    lake.append(AESTHETIC, [{"clip_id": "other", "scorer_id": "a", "aesthetic": 6.0, "num_samples": 1}], "r")
    with pytest.raises(ConfigError, match=r"no row of scorer a for 2 of 2 clips.*outback score aesthetic"):
        curate(lake, RESCUED, "x")


def test_an_empty_family_is_no_lack_while_no_verdict_hangs_on_it(tmp_path: Path) -> None:
    lake = Lake(tmp_path / "lake")
    put(lake, [image(0, edge=100), image(1, text=0.0, colour=0.5)])
    assert len(undecided_clips(lake, RESCUED, AESTHETIC)) == 0
    result = curate(lake, RESCUED, "x")
    assert (result.num_in, result.num_clips) == (2, 1)
    assert result.recipe.scorers.aesthetic is None
    assert curate(lake, result.recipe, "x").curated_id == result.curated_id


def test_a_split_can_rescue(tmp_path: Path) -> None:
    lake = Lake(tmp_path / "lake")
    put(lake, [image(0, edge=100), image(1 << 63, edge=100)])  # at 0 and at a half
    recipe = CurateRecipe(resolution=Bounds(low=512, rescue={"split": Interval(high=0.1)}))
    assert curate(lake, recipe, None, dry_run=True).num_clips == 1


def test_several_scorers_of_one_family_need_a_pin(tmp_path: Path) -> None:
    lake = Lake(tmp_path / "lake")
    put(lake, [image(0, text=0.5, colour=1.0, aesthetic=4.0)])
    lake.append(
        AESTHETIC, [{"clip_id": clip_id("0" * 16, 0, 0), "scorer_id": "b", "aesthetic": 6.0, "num_samples": 1}], "r"
    )
    with pytest.raises(ConfigError, match=r"a \(1 rows\), b \(1 rows\)\. Choose one with --set scorers\.aesthetic="):
        curate(lake, RESCUED, "x")
    assert len(undecided_clips(lake, RESCUED, AESTHETIC)) == 1  # whose rows it has does not matter
    pinned = RESCUED.model_copy(update={"scorers": ScorerPins(aesthetic="b")})
    assert curate(lake, pinned, None, dry_run=True).num_clips == 1
