"""Duplicates in recipes: curate, funnel and explain name the same survivor of each group, and a later scorer is taken."""

import json
import random
from pathlib import Path

import pytest

from jobs.curate import curate, explain_clips, read_set, undecided_clips
from jobs.explain import explain_clip, explain_in_set
from jobs.score_duplicates import score_duplicates
from pipeline.fingerprint_clips import FingerprintConfig
from pipeline.rules import Bounds, CurateRecipe, Interval, Likeness, ScorerPins
from pipeline.stage import ToDo
from schemas.catalog import Lake
from schemas.clips import CLIPS
from schemas.curated import CURATED_SETS, RECIPES
from schemas.errors import ConfigError, FailureRateError
from schemas.identity import clip_id
from schemas.scores import AESTHETIC, DUPLICATE, RESOLUTION, SEMANTIC

RECIPE = CurateRecipe(resolution=Bounds(low=512), duplicate=Likeness(high=0.9))


def name(number: int) -> str:
    return clip_id(f"{number:016x}", 0, 0)


def put(lake: Lake, edges: list[float]) -> None:
    """Images with short edges, in pixels."""
    same = {"segmentation_id": "s", "kind": "image", "start_ms": 0, "end_ms": 0, "start_frame": 0, "end_frame": 1}
    lake.append(CLIPS, [{"clip_id": name(n), "media_id": name(n)[:16], **same} for n in range(len(edges))], "r")
    rows = [{"clip_id": name(n), "scorer_id": "a", "short_edge_px": edge} for n, edge in enumerate(edges)]
    lake.append(RESOLUTION, rows, "r")


def compare(lake: Lake, links: list[tuple[float, int]], scorer: str = "d") -> None:
    """By rank, which is the number of the clip: likeness, and the better clip or -1."""
    rows = [
        {"clip_id": name(rank), "scorer_id": scorer, "exact": float(like == 1.0), "near": like, "rank": rank}
        | ({"duplicate_of": name(better), "rank_of_better": better} if better >= 0 else {})
        for rank, (like, better) in enumerate(links)
    ]
    random.Random(0).shuffle(rows)
    lake.append(DUPLICATE, rows, "r")


def test_the_next_best_stays_where_another_rule_rejects_the_best(tmp_path: Path) -> None:
    lake = Lake(tmp_path / "lake")
    put(lake, [100, 600, 720, 800, 900])
    compare(lake, [(0, -1), (0.95, 0), (0.99, 1), (0.9, 2), (0, -1)])  # 0.9 is not above the bound
    result = curate(lake, RECIPE, "best")
    kept = [name(1), name(3), name(4)]
    assert read_set(lake, "best")["clip_id"].to_pylist() == kept
    assert [(step.rule, step.num_in, step.num_rejected) for step in result.funnel] == [
        ("resolution", 5, 1),
        ("duplicate", 4, 1),
    ]
    assert [(one.clip_id, one.bound) for one in result.funnel[1].examples] == [(name(2), "> high 0.9")]
    told = explain_clips(lake, RECIPE).to_pylist()
    assert [row["clip_id"] for row in told if row["verdict"] == "kept"] == kept
    for row in told:
        for said in (explain_clip(lake, RECIPE, row["clip_id"]), explain_in_set(lake, "best", row["clip_id"])):
            assert (said.verdict, said.rule) == (row["verdict"], row["rule"])
    assert explain_clip(lake, RECIPE, name(2)).answers[-1].stays == name(1)
    freed = explain_clip(lake, RECIPE, name(0))  # were it larger, it would stay
    assert [answer.verdict for answer in freed.answers] == ["rejects", "passes"]


@pytest.mark.parametrize("seed", range(3))
def test_explanations_funnel_and_set_agree_whatever_is_linked(tmp_path: Path, seed: int) -> None:
    rng, lake = random.Random(seed), Lake(tmp_path / "lake")
    put(lake, [rng.choice([100.0, 720.0]) for _ in range(16)])
    links = [(rng.choice([0.5, 0.9, 0.95, 1.0]), rng.randrange(-1, rank) if rank else -1) for rank in range(16)]
    compare(lake, links)
    rows = [
        {"clip_id": name(rank), "scorer_id": "m", "semantic": 1.0, "rank": 15 - rank, "rank_of_better": better}
        for rank, better in ((rank, rng.choice([None, *range(15 - rank)])) for rank in range(16))
    ]
    lake.append(SEMANTIC, rows, "r")
    recipe = RECIPE.model_copy(
        update={"exact": Likeness(high=0), "semantic": Likeness(high=0.95), "split": Bounds(high=2**-58)}
    )
    result = curate(lake, recipe, "some")
    told = {row["clip_id"]: row for row in explain_clips(lake, recipe).to_pylist()}
    assert [step.rule for step in result.funnel] == ["resolution", "exact", "duplicate", "semantic", "split"]
    for step in result.funnel:
        assert step.num_rejected == sum(row["rule"] == step.rule for row in told.values())
    kept = read_set(lake, "some")["clip_id"].to_pylist()
    assert kept == [clip for clip, row in told.items() if row["verdict"] == "kept"]
    for clip, row in told.items():
        said = explain_clip(lake, recipe, clip)
        assert (said.verdict, said.rule) == (row["verdict"], row["rule"])
        by = next((answer for answer in said.answers if answer.rule == row["rule"]), None)
        if by is not None and by.rule in ("exact", "duplicate", "semantic"):
            order = [step.rule for step in result.funnel]
            instead = told[str(by.stays)]["rule"]  # stays before this rule; one after it may reject it
            assert instead is None or order.index(instead) > order.index(by.rule)


def test_a_dear_scorer_looks_at_every_clip_of_a_group(tmp_path: Path) -> None:
    """Which of them stays hangs on its scores."""
    lake = Lake(tmp_path / "lake")
    put(lake, [720, 720])
    compare(lake, [(0, -1), (1.0, 0)])
    recipe = RECIPE.model_copy(update={"aesthetic": Bounds(low=5)})
    assert undecided_clips(lake, recipe, AESTHETIC).to_pylist() == [name(0), name(1)]
    scores = [{"clip_id": name(n), "scorer_id": "a", "aesthetic": 4.0 + 2 * n, "num_samples": 1} for n in range(2)]
    lake.append(AESTHETIC, scores, "r")
    assert curate(lake, recipe, "x").num_clips == 1
    assert read_set(lake, "x")["clip_id"].to_pylist() == [name(1)]


def test_the_scorer_that_compared_most_is_taken_and_a_published_set_stays(tmp_path: Path) -> None:
    lake = Lake(tmp_path / "lake")
    put(lake, [720, 720])
    compare(lake, [(0, -1), (1.0, 0)], "first")
    before = curate(lake, RECIPE, "before")
    assert before.recipe.scorers.duplicate == "first"
    same = {"segmentation_id": "s", "kind": "image", "start_ms": 0, "end_ms": 0, "start_frame": 0, "end_frame": 1}
    lake.append(CLIPS, [{"clip_id": name(2), "media_id": name(2)[:16], **same}], "r")
    lake.append(RESOLUTION, [{"clip_id": name(2), "scorer_id": "a", "short_edge_px": 720.0}], "r")
    with pytest.raises(ConfigError, match=r"no row of scorer first for 1 of 3 clips.*outback score duplicate"):
        curate(lake, RECIPE, "after")
    compare(lake, [(0, -1), (0.5, 0), (1.0, 0)], "second")
    after = curate(lake, RECIPE, "after")
    assert (after.recipe.scorers.duplicate, after.num_clips) == ("second", 2)
    compare(lake, [(0, -1), (0, -1), (0, -1)], "third")  # of as many, the newest
    assert curate(lake, RECIPE, None, dry_run=True).recipe.scorers.duplicate == "third"
    assert explain_clip(lake, RECIPE, name(2)).verdict == "kept"
    assert explain_in_set(lake, "after", name(2)).verdict == "rejected"
    pinned = RECIPE.model_copy(update={"scorers": ScorerPins(duplicate="second")})
    assert curate(lake, pinned, None, dry_run=True).curated_id == after.curated_id
    assert read_set(lake, "before")["clip_id"].to_pylist() == [name(0)]


@pytest.mark.parametrize("scored", [6, 5], ids=["the same clips", "not all of them"])
def test_rows_in_another_order_are_put_beside_their_clips(tmp_path: Path, scored: int) -> None:
    lake = Lake(tmp_path / "lake")
    same = {"segmentation_id": "s", "kind": "image", "start_ms": 0, "end_ms": 0, "start_frame": 0, "end_frame": 1}
    for numbers in ((1, 3, 5), (0, 2, 4)):
        lake.append(CLIPS, [{"clip_id": name(n), "media_id": name(n)[:16], **same} for n in numbers], "r")
    for numbers in ((0, 3, 4), (1, 2, 5)):
        rows = [{"clip_id": name(n), "scorer_id": "a", "short_edge_px": 600.0 + n} for n in numbers]
        lake.append(RESOLUTION, rows, "r")
    compare(lake, [(0, -1), (1.0, 0), (0, -1), (0.99, 2), (0, -1), (0, -1)][:scored])
    recipe = CurateRecipe(resolution=Bounds(low=600.5), duplicate=Likeness(high=0.9), coverage=0.8)
    curate(lake, recipe, "x")
    assert read_set(lake, "x")["clip_id"].to_pylist() == [name(n) for n in (1, 2, 4, 5)[: scored - 2]]


def test_a_scorer_counts_by_the_clips_of_the_recipe(tmp_path: Path) -> None:
    """Clips cut in another way, and compared in a larger number, do not speak for these."""
    lake = Lake(tmp_path / "lake")
    put(lake, [720, 720])
    compare(lake, [(0, -1), (1.0, 0)], "mine")
    rows = [{"clip_id": f"other{n}", "scorer_id": "larger", "exact": 0.0, "near": 0.0, "rank": n} for n in range(5)]
    lake.append(DUPLICATE, rows, "r")
    result = curate(lake, RECIPE, None, dry_run=True)
    assert (result.recipe.scorers.duplicate, result.num_clips) == ("mine", 1)


def test_clips_that_were_not_compared_pass_no_such_rule(tmp_path: Path) -> None:
    lake = Lake(tmp_path / "lake")
    put(lake, [720, 720, 720])
    compare(lake, [(0, -1), (1.0, 0)])
    some = RECIPE.model_copy(update={"coverage": 0.5})
    result = curate(lake, some, "x")
    assert (result.num_clips, result.missing[DUPLICATE.name]) == (1, 1)
    assert explain_clip(lake, some, name(2)).verdict == "open"


def test_without_embeddings_the_recipe_says_how_to_get_them(tmp_path: Path) -> None:
    lake = Lake(tmp_path / "lake")
    put(lake, [720])
    recipe = CurateRecipe(semantic=Likeness(high=0.95))
    with pytest.raises(ConfigError, match=rf"{SEMANTIC.name} is empty.*score semantic.*score aesthetic"):
        curate(lake, recipe, "x")
    assert explain_clip(lake, recipe, name(0)).verdict == "open"


def test_scores_of_an_earlier_version_are_made_anew(tmp_path: Path) -> None:
    lake = Lake(tmp_path / "lake")
    put(lake, [720])
    lake.append(DUPLICATE, [{"clip_id": name(0), "scorer_id": "old", "exact": 0.0, "near": 0.0}], "r")
    with pytest.raises(ConfigError, match=r"old is of an earlier version.*outback score duplicate"):
        curate(lake, RECIPE, "x")
    compare(lake, [(0, -1)], "new")
    assert curate(lake, RECIPE, "x").num_clips == 1


def test_clips_of_other_kinds_do_not_speak_for_a_scorer(tmp_path: Path) -> None:
    lake = Lake(tmp_path / "lake")
    put(lake, [720, 720, 720])
    same = {"segmentation_id": "s", "kind": "video", "start_ms": 0, "end_ms": 9, "start_frame": 0, "end_frame": 1}
    videos = [clip_id(f"{9 + n:016x}", 0, 9) for n in range(2)]
    lake.append(CLIPS, [{"clip_id": clip, "media_id": clip[:16], **same} for clip in videos], "r")
    compare(lake, [(0, -1), (0, -1), (0, -1)], "of images")
    rows = [{"clip_id": clip, "exact": 0.0, "near": 0.0, "rank": n} for n, clip in enumerate(videos)]
    lake.append(DUPLICATE, [row | {"scorer_id": "of videos"} for row in rows], "r")
    result = curate(lake, CurateRecipe(kinds=("video",), duplicate=Likeness(high=0.9)), None, dry_run=True)
    assert (result.recipe.scorers.duplicate, result.num_clips) == ("of videos", 2)


def test_scorers_that_compared_other_clips_are_no_choice(tmp_path: Path) -> None:
    lake = Lake(tmp_path / "lake")
    put(lake, [720])
    for scorer in ("one", "two"):
        row = {"clip_id": f"other {scorer}", "scorer_id": scorer, "exact": 0.0, "near": 0.0, "rank": 0}
        lake.append(DUPLICATE, [row], "r")
    with pytest.raises(
        ConfigError, match=r"no scorer of score_duplicate compared these clips: one .*two .*outback score"
    ):
        curate(lake, RECIPE, None, dry_run=True)


def test_a_family_without_rows_leaves_groups_as_they_are(tmp_path: Path) -> None:
    lake = Lake(tmp_path / "lake")
    put(lake, [720, 720])
    compare(lake, [(0, -1), (1.0, 0)])
    told = explain_clip(lake, RECIPE.model_copy(update={"aesthetic": Bounds(low=5)}), name(1))
    verdicts = {answer.rule: (answer.verdict, answer.stays) for answer in told.answers}
    assert verdicts == {"resolution": ("passes", None), "aesthetic": ("open", None), "duplicate": ("rejects", name(0))}


def test_a_set_is_explained_by_what_it_was_made_from(tmp_path: Path) -> None:
    """Of a clip without a row the set says that it was rejected, and what came later it does not know."""
    lake = Lake(tmp_path / "lake")
    put(lake, [720, 720, 100])
    compare(lake, [(0, -1), (0, -1)])
    recipe = RECIPE.model_copy(
        update={"coverage": 0.5, "resolution": Bounds(low=512, rescue={"aesthetic": Interval(low=5)})}
    )
    curate(lake, recipe.model_copy(update={"resolution": Bounds(low=50, rescue=recipe.resolution.rescue)}), "x")
    said = explain_in_set(lake, "x", name(2))
    assert (said.verdict, said.rule) == ("rejected", "duplicate")
    for scorer in ("one", "two"):
        rows = [{"clip_id": name(n), "scorer_id": scorer, "aesthetic": 9.0, "num_samples": 1} for n in range(3)]
        lake.append(AESTHETIC, rows, "r")
    assert explain_in_set(lake, "x", name(2)) == said
    assert explain_in_set(lake, "x", name(0)).verdict == "kept"


def test_a_set_with_rules_of_another_version_is_named(tmp_path: Path) -> None:
    lake = Lake(tmp_path / "lake")
    put(lake, [720])
    curate(lake, CurateRecipe(resolution=Bounds(low=512)), "x")
    made = lake.read(RECIPES).to_pylist()[0]
    values = {**json.loads(made["recipe"]), "duplicate": {"low": None, "high": 0.9}}
    lake.append(RECIPES, [{**made, "recipe_id": "old", "recipe": json.dumps(values)}], "r")
    row = lake.read(CURATED_SETS).to_pylist()[0]
    lake.append(CURATED_SETS, [{**row, "name": "old", "recipe_id": "old", "curated_id": "old"}], "r")
    with pytest.raises(
        ConfigError, match=r"the recipe of set 'old', which another version made, is wrong:\n  duplicate.low"
    ):
        explain_in_set(lake, "old", name(0))


def test_a_job_of_which_all_failed_before_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lake = Lake(tmp_path / "lake")
    put(lake, [720, 720, 720])
    left = ToDo(lake.read(CLIPS).slice(0, 0), {"Moved": 3}, num_before=0)
    monkeypatch.setattr("jobs.score_duplicates.left_to_do", lambda *_, **__: left)
    with pytest.raises(FailureRateError, match="3 of 3 clips failed"):
        score_duplicates(lake, None, FingerprintConfig())
