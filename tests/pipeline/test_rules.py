"""Rules: closed intervals in float32, null never passes, and what the funnel and the explanation say."""

import hashlib
import math
import random
import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.rules import (
    SCORES,
    SPLIT,
    Bounds,
    CurateRecipe,
    Kind,
    Rule,
    VideoBounds,
    explain,
    first_rejections,
    funnel,
    passes,
    rules_of,
    split_of,
)
from schemas.captions import CAPTION_SCORES
from schemas.clips import CLIPS
from schemas.identity import clip_id
from schemas.scores import AESTHETIC, CONTINUITY, DUPLICATE, FAMILIES, MOTION, RESOLUTION, SEMANTIC

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def rule(low: float | None = None, high: float | None = None, kinds: tuple[Kind, ...] = ("image", "video")) -> Rule:
    return Rule("motion", MOTION, "motion", low, high, kinds)


def verdicts(asked: Rule, values: Sequence[float | None], kinds: Sequence[str] | None = None) -> list[bool]:
    kind = pa.array(kinds or ["video"] * len(values), pa.string())
    found: list[bool] = passes(asked, pa.table({"kind": kind, "motion": pa.array(values, pa.float32())})).tolist()
    return found


@pytest.mark.parametrize("bound", [0.1, 0.3, 0.7, 1 / 3, 1e-3, 0.002, 512.0])
def test_a_bound_includes_the_value_that_is_stored_for_it(bound: float) -> None:
    stored = np.float32(bound)
    below, above = np.nextafter(stored, np.float32(-np.inf)), np.nextafter(stored, np.float32(np.inf))
    values = [float(below), float(stored), float(above)]
    assert verdicts(rule(low=bound), values) == [False, True, True]
    assert verdicts(rule(high=bound), values) == [True, True, False]
    assert verdicts(rule(low=bound, high=bound), values) == [False, True, False]


@given(value=FLOATS, low=st.none() | FLOATS, high=st.none() | FLOATS)
def test_passes_is_the_closed_interval(value: float, low: float | None, high: float | None) -> None:
    if low is None and high is None:
        return
    expected = (low is None or value >= low) and (high is None or value <= high)
    assert verdicts(rule(low, high), [value]) == [expected]


def test_null_passes_no_rule_that_applies_to_its_kind() -> None:
    for asked in (rule(low=-1e30), rule(high=1e30), rule(-1e30, 1e30)):
        assert verdicts(asked, [None]) == [False]
    assert verdicts(rule(low=0, kinds=("video",)), [None, None], ["video", "image"]) == [False, True]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "needs low, high or both"),
        ({"low": 1, "high": 0}, "nothing could pass"),
        ({"low": math.nan}, "finite"),
        ({"low": 1, "kinds": ["audio"]}, "image"),
        ({"low": 1, "kinds": []}, "at least 1"),
        ({"low": 1, "kinds": ["image", "image"]}, "twice"),
        ({"mean": 1}, "extra"),
    ],
)
def test_bounds_that_ask_nothing_are_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Bounds.model_validate(values)


def test_every_section_of_a_recipe_asks_about_a_score_there_is() -> None:
    sections = {
        name for name, field in CurateRecipe.model_fields.items() if re.search("Bounds|Likeness", str(field.annotation))
    }
    assert sections == {*SCORES, "families"}  # families name their tables and columns themselves
    assert SCORES[SPLIT] == (CLIPS, SPLIT)  # no score: it comes from the id
    for family, column in (score for name, score in SCORES.items() if name != SPLIT):
        assert family in (*FAMILIES, AESTHETIC, DUPLICATE, SEMANTIC, CONTINUITY, CAPTION_SCORES)
        assert column in family.names


def test_a_split_is_a_place_by_the_medium_alone() -> None:
    media = [hashlib.sha256(bytes([number])).hexdigest()[:16] for number in range(200)]
    ids = pa.chunked_array([[clip_id(medium, start, start + 9) for medium in media for start in (0, 77)]])
    places = split_of(ids).to_pylist()
    assert places == [int(medium[:6], 16) / 16**6 for medium in media for _ in range(2)]
    assert all(0 <= place < 1 for place in places)
    assert 0.1 < sum(place < 0.2 for place in places) / len(places) < 0.3


def test_the_scores_that_images_lack_are_asked_of_videos_only() -> None:
    recipe = CurateRecipe(duration=VideoBounds(low=1), motion=VideoBounds(low=0.1), resolution=Bounds(low=512))
    assert {one.name: one.kinds for one in rules_of(recipe)} == {
        "resolution": ("image", "video"),
        "duration": ("video",),
        "motion": ("video",),
    }


TWO = [Rule("resolution", RESOLUTION, "short_edge_px", 512, None, ("image", "video")), rule(0.1, 0.5, ("video",))]


def some_clips(count: int) -> pa.Table:
    rng = random.Random(3)
    rows = [
        {
            "clip_id": f"{index:04d}",
            "kind": rng.choice(["image", "video"]),
            "short_edge_px": rng.choice([256.0, 511.0, 512.0, 1080.0]),
            "motion": rng.choice([None, 0.05, 0.1, 0.3, 0.5, 0.6]),
        }
        for index in range(count)
    ]
    rng.shuffle(rows)
    kinds = {"clip_id": pa.string(), "kind": pa.string(), "short_edge_px": pa.float32(), "motion": pa.float32()}
    return pa.Table.from_pylist(rows, pa.schema(list(kinds.items())))


def naive(clip: dict[str, object]) -> tuple[str | None, object]:
    """The same two rules, written down by hand for one clip."""
    edge, motion = clip["short_edge_px"], clip["motion"]
    assert isinstance(edge, float)
    if edge < 512:
        return "resolution", edge
    if clip["kind"] == "video" and (not isinstance(motion, float) or not np.float32(0.1) <= motion <= 0.5):
        return "motion", motion
    return None, None


def test_funnel_and_explanation_agree_with_rules_written_by_hand() -> None:
    clips = some_clips(400)
    first = first_rejections(TWO, clips)
    expected = {str(clip["clip_id"]): naive(clip) for clip in clips.to_pylist()}
    told = explain(TWO, clips, first).to_pylist()
    assert [row["clip_id"] for row in told] == sorted(expected)
    for row in told:
        assert (row["rule"], row["value"]) == expected[row["clip_id"]]
        assert row["verdict"] == ("kept" if row["rule"] is None else "rejected")
    steps = list(funnel(TWO, clips, first))
    rejected = [sum(name == step.rule for name, _ in expected.values()) for step in steps]
    assert [step.num_rejected for step in steps] == rejected
    assert [step.num_in for step in steps] == [400, 400 - rejected[0]]
    assert [step.num_left for step in steps] == [400 - rejected[0], 400 - sum(rejected)]
    assert min(rejected) > 30


def test_examples_are_the_clips_nearest_to_the_bounds_and_do_not_depend_on_order() -> None:
    clips = some_clips(400)
    steps = list(funnel(TWO, clips, first_rejections(TWO, clips)))
    again = clips.sort_by("clip_id")
    assert list(funnel(TWO, again, first_rejections(TWO, again))) == steps
    edge = steps[0].examples
    assert [example.value for example in edge] == [511.0] * 5
    assert [example.clip_id for example in edge] == sorted(example.clip_id for example in edge)
    assert {example.bound for example in edge} == {"< low 512"}
    motion = steps[1].examples
    assert [example.value for example in motion] == [np.float32(0.05)] * 5  # 0.05 from the bound, and 0.6 is 0.1


def test_examples_of_clips_without_a_score_come_last() -> None:
    values: list[float | None] = [None, 0.9, 0.0]
    clips = pa.table({"clip_id": ["a", "b", "c"], "kind": ["video"] * 3, "motion": pa.array(values, pa.float32())})
    asked = [rule(0.3, 0.5)]
    (step,) = funnel(asked, clips, first_rejections(asked, clips))
    assert [(one.clip_id, one.bound) for one in step.examples] == [
        ("c", "< low 0.3"),
        ("b", "> high 0.5"),
        ("a", "has no value"),
    ]


def test_no_clips_and_no_rules() -> None:
    none = some_clips(0)
    assert [step.num_left for step in funnel(TWO, none, first_rejections(TWO, none))] == [0, 0]
    assert explain(TWO, none, first_rejections(TWO, none)).num_rows == 0
    clips = some_clips(3)
    assert explain([], clips, first_rejections([], clips))["verdict"].to_pylist() == ["kept"] * 3
