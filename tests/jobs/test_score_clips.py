"""Families that users added: found in the lake by recipes, SQL and the list of tables; and names that are refused."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from jobs.curate import curate, set_recipe
from jobs.explain import explain_clip
from jobs.families import own_families
from jobs.score_clips import _clips, _own_table, score_clips
from jobs.show import table_reports
from jobs.sql import run_sql
from pipeline.clip_scorer import ClipScorer, ScorerConfig
from pipeline.rules import Bounds, CurateRecipe, Interval, ScorerPins, rules_of
from pipeline.samples import Sample
from pipeline.stage import Stage, StageOutcome, attempt_row
from schemas.catalog import Lake
from schemas.clips import CLIPS
from schemas.errors import ConfigError, FailureRateError, RowError
from schemas.runs import ATTEMPTS
from schemas.scores import own_family
from schemas.table import Table
from tests.jobs.test_adding_a_filter import blocks
from tests.jobs.test_curate import NUM, fill

BLUE = own_family("blue", "Blue in the picture.", {"blue_ratio": "share of blue pixels"})
TAKEN = (
    ("motion", "x"),
    ("caption", "x"),
    ("other", "sharpness"),
    ("other", "blue_ratio"),
    ("other", "kind"),
    ("other", "split"),
)
RULE = {"blue": {"blue_ratio": Bounds(high=0.5)}}


def scored(lake: Lake, scorer: str, clips: Sequence[str], step: float = 0.1) -> None:
    rows = [
        {"clip_id": clip, "scorer_id": scorer, "blue_ratio": step * index, "num_samples": 1, "seconds": 0.25 * index}
        for index, clip in enumerate(clips)
    ]
    lake.append(BLUE, rows, "r")


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    made = Lake(tmp_path / "lake")
    fill(made, range(NUM))
    return made


def ids(lake: Lake) -> list[str]:
    return sorted(lake.read(CLIPS, ["clip_id"])["clip_id"].to_pylist())


def made_scorer(table: Table) -> type[ClipScorer[ScorerConfig]]:
    class Made(ClipScorer[ScorerConfig]):
        config_type = ScorerConfig

        def score(self, samples: Sequence[Sample]) -> dict[str, float | None]:
            raise NotImplementedError

    Made.table = table
    return Made


def test_a_family_is_known_by_what_is_stored(lake: Lake) -> None:
    assert own_families(lake) == []
    scored(lake, "b1", ids(lake)[:3])
    assert own_families(Lake(lake.where)) == [BLUE]
    (report,) = [report for report in table_reports(lake) if report.name == "score_blue"]
    assert (report.num_rows, report.coverage, report.seconds_per_clip) == (3, 3 / NUM, 0.25)
    assert run_sql(lake, "select max(blue_ratio) from score_blue", None)[0][0].as_py() == pytest.approx(0.2)
    scored(lake, "b2", ids(lake)[1:6])
    (report,) = [report for report in table_reports(lake) if report.name == "score_blue"]
    assert (report.num_rows, report.coverage) == (8, 6 / NUM)  # two clips were scored by both
    by_scan = {report.name: report for report in table_reports(lake)}["score_motion"]
    assert (by_scan.coverage, by_scan.seconds_per_clip) == (1.0, None)


def test_rules_over_it_choose_and_are_remembered(lake: Lake) -> None:
    clips = ids(lake)
    scored(lake, "b1", clips)
    recipe = CurateRecipe(resolution=Bounds(low=1), families=RULE)
    result = curate(lake, recipe, "few")
    assert result.num_clips == 6  # 0, 0.1 to 0.5
    assert [(step.rule, step.num_rejected) for step in result.funnel] == [("resolution", 0), ("blue.blue_ratio", 6)]
    kept = set_recipe(lake, "few")
    assert kept.scorers.families == {"blue": "b1"}
    assert curate(lake, kept, "few").curated_id == result.curated_id
    told = explain_clip(lake, recipe, clips[7])
    assert (told.verdict, told.rule) == ("rejected", "blue.blue_ratio")
    assert run_sql(lake, "select count(*) from score_blue", "few")[0][0].as_py() == NUM


def test_of_several_scorers_a_recipe_names_one(lake: Lake) -> None:
    scored(lake, "b1", ids(lake))
    scored(lake, "b2", ids(lake), step=0.01)
    with pytest.raises(ConfigError, match=r"--set scorers\.families\.blue="):
        curate(lake, CurateRecipe(families=RULE), "x")
    with pytest.raises(ConfigError, match=r"--set scorers\.families\.blue="):
        explain_clip(lake, CurateRecipe(families=RULE), ids(lake)[0])
    recipe = CurateRecipe(families=RULE, scorers=ScorerPins(families={"blue": "b2"}))
    assert curate(lake, recipe, "x").num_clips == NUM


def test_a_family_or_column_that_is_not_there_is_said_so(lake: Lake) -> None:
    with pytest.raises(ConfigError, match=r"score_blue is empty.*outback score MODULE:NAME"):
        curate(lake, CurateRecipe(families=RULE), "x")
    scored(lake, "b1", ids(lake))
    for ask in (curate, explain_clip):
        with pytest.raises(ConfigError, match="score_blue has no score green_ratio; it has: blue_ratio"):
            ask(lake, CurateRecipe(families={"blue": {"green_ratio": Bounds(low=0)}}), ids(lake)[0])
    with pytest.raises(ConfigError, match="there is no score nose; there are: sharpness"):
        rules_of(CurateRecipe(families={"technical": {"nose": Bounds(low=0)}}))
    with pytest.raises(ConfigError, match="no rescue"):
        rules_of(CurateRecipe(families={"blue": {"x": Bounds(low=0, rescue={"text": Interval(high=1)})}}))


def test_a_column_of_a_known_family_has_the_verdict_of_its_section(lake: Lake) -> None:
    by_section = curate(lake, CurateRecipe(aspect=Bounds(low=1.4)), None, dry_run=True)
    by_name = curate(lake, CurateRecipe(families={"resolution": {"aspect_ratio": Bounds(low=1.4)}}), None, dry_run=True)
    assert by_name.content_sha256 == by_section.content_sha256
    assert by_name.recipe.scorers.resolution == "r1"


def test_recipes_without_families_keep_their_ids() -> None:
    assert "families" not in CurateRecipe(resolution=Bounds(low=1)).canonical_json()


def test_names_that_are_taken_are_refused(lake: Lake) -> None:
    scored(lake, "b1", ids(lake))
    for family, column in TAKEN:
        with pytest.raises(ConfigError, match="choose"):
            _own_table(lake, made_scorer(own_family(family, "Theirs.", {column: "x"})))


def test_a_family_grows_and_never_shrinks(lake: Lake) -> None:
    scored(lake, "b1", ids(lake)[:1])
    table = _own_table(lake, made_scorer(own_family("blue", "Blue in the picture.", {"blue_max": "largest share"})))
    assert table.names[2:4] == ["blue_ratio", "blue_max"]
    lake.append(table, [{"clip_id": ids(lake)[1], "scorer_id": "b2", "blue_max": 0.5, "num_samples": 1}], "r")
    rows = run_sql(lake, "select blue_ratio, blue_max from score_blue order by clip_id", None).to_pylist()
    assert rows == [{"blue_ratio": 0.0, "blue_max": None}, {"blue_ratio": None, "blue_max": 0.5}]


def test_a_clip_that_two_detectors_cut_alike_is_scored_once(lake: Lake) -> None:
    rows = lake.read(CLIPS).to_pylist()
    lake.append(CLIPS, [{**row, "segmentation_id": "other"} for row in rows], "r")
    assert _clips(lake, None)["clip_id"].to_pylist() == sorted(set(ids(lake)))


def test_clips_that_other_rules_reject_are_not_scored(
    lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "blue_of_the_page.py").write_text(blocks("python")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    recipe = CurateRecipe(resolution=Bounds(low=10_000), families=RULE)
    report = score_clips(lake, "blue_of_the_page:BlueScorer", recipe=recipe)
    assert (report.num_clips, report.outcome) == (0, None)
    with pytest.raises(ConfigError, match="no rule that reads score_blue"):
        score_clips(lake, "blue_of_the_page:BlueScorer", recipe=CurateRecipe(resolution=Bounds(low=1)))
    with pytest.raises(ConfigError, match="margins: unknown key; did you mean 'margin'"):
        score_clips(lake, "blue_of_the_page:BlueScorer", ("margins=3",))


def test_scoring_fails_when_too_many_clips_do_now_and_when_nothing_is_left(
    lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "blue_of_failures.py").write_text(blocks("python")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    scorer, stages = "blue_of_failures:BlueScorer", []

    def run(lake: Lake, stage: Stage, *_: object) -> StageOutcome:
        stages.append(stage)
        return StageOutcome(0, 0, {}, {}, 0.0)

    monkeypatch.setattr("jobs.score_clips.ensure_ray", lambda: None)
    monkeypatch.setattr("jobs.score_clips.num_cpus", lambda: 1)
    monkeypatch.setattr("jobs.score_clips.with_places", lambda lake, clips: clips)
    monkeypatch.setattr("jobs.score_clips.run_stage", run)
    for share in ("0.1", "1.0"):
        score_clips(lake, scorer, (f"failures.max_ratio={share}",))
    few, all_of_them = stages
    assert (few.failures.max_ratio, all_of_them.failures.max_ratio) == (0.1, 1.0)
    assert few.stage_id == all_of_them.stage_id
    gone = RowError("Corrupt", "no picture")
    lake.append(ATTEMPTS, [attempt_row(few.name, few.stage_id, clip, gone) for clip in ids(lake)], "r")
    with pytest.raises(FailureRateError, match=f"{NUM} of {NUM} clips failed.*{NUM} Corrupt"):
        score_clips(lake, scorer)
    assert score_clips(lake, scorer, ("failures.max_ratio=1.0",)).num_given_up == NUM


def test_without_weights_there_are_no_scores(lake: Lake) -> None:
    with pytest.raises(ConfigError, match="--set clip=PATH"):
        score_clips(lake, "aesthetic")
    with pytest.raises(ConfigError, match=r"no family 'motions'.*module:name"):
        score_clips(lake, "motions")
    assert "score_aesthetic" not in lake.table_names()
