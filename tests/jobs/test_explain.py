"""Explaining a clip agrees with the set, is found by the beginning of an id, and fits the terminal."""

import json
from pathlib import Path

import pytest

from jobs.curate import curate, explain_clips
from jobs.explain import explain_clip, explain_in_set, print_explanation
from pipeline.rules import Bounds, CurateRecipe, Interval, VideoBounds
from schemas.catalog import Lake
from schemas.errors import ConfigError
from schemas.identity import clip_id
from schemas.scores import AESTHETIC
from tests.jobs.test_curate import NUM, RECIPE, fill
from tests.jobs.test_undecided import RESCUED, image, put


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """Clips 0 to 11 of `fill`, and a set of them named `kept`; then three more."""
    made = Lake(tmp_path_factory.mktemp("explained") / "lake")
    fill(made, range(NUM))
    curate(made, RECIPE, "kept")
    fill(made, [NUM, NUM + 1], motion_of=[])
    return made


def of(number: int) -> str:
    return clip_id(f"{number:016x}", 0, 2000 if number % 2 else 0)


def test_every_clip_is_told_what_the_set_made_of_it(lake: Lake) -> None:
    recipe = RECIPE.model_copy(update={"coverage": 0.0})
    for row in explain_clips(lake, recipe).to_pylist():
        told = explain_clip(lake, recipe, row["clip_id"])
        if told.verdict == "open":
            assert (row["verdict"], row["rule"], row["value"]) == ("rejected", told.rule, None)
        else:
            assert (told.verdict, told.rule) == (row["verdict"], row["rule"])
    assert explain_clip(lake, recipe, of(NUM + 1)).verdict == "open"


def test_the_answers_stand_in_funnel_order_with_value_and_bound(lake: Lake) -> None:
    told = explain_clip(lake, RECIPE, of(3))
    assert (told.kind, told.verdict, told.rule) == ("video", "rejected", "resolution")
    said = [(one.rule, one.value, one.bound, one.verdict) for one in told.answers]
    assert said == [
        ("resolution", 256.0, "512 <= x", "rejects"),
        ("motion", pytest.approx(0.3), "0.1 <= x", "passes"),  # after the rule that rejects: what else there is
    ]
    told = explain_clip(lake, RECIPE, of(2))
    assert [one.verdict for one in told.answers] == ["passes", "not asked of images"]
    assert told.verdict == "kept"
    stills = RECIPE.model_copy(update={"kinds": ("image",)})
    assert explain_clip(lake, stills, of(1)).verdict == "not asked for: the recipe takes image"


def test_the_beginning_of_an_id_is_enough_where_it_is_one_clips(lake: Lake) -> None:
    assert explain_clip(lake, RECIPE, of(3)[:16]).clip_id == of(3)
    with pytest.raises(ConfigError, match=r"14 clips begin with '0000': .* and 9 more\. Give more of the id"):
        explain_clip(lake, RECIPE, "0000")
    with pytest.raises(ConfigError, match="no clip begins with 'zz'"):
        explain_clip(lake, RECIPE, "zz")


def test_a_set_is_explained_as_it_was_made(lake: Lake) -> None:
    told = explain_in_set(lake, "kept", of(3))
    assert (told.verdict, told.rule) == ("rejected", "resolution")
    with pytest.raises(ConfigError, match="no clip begins with"):
        explain_in_set(lake, "kept", of(NUM))  # came after the set
    with pytest.raises(ConfigError, match="there is no curated set 'other'"):
        explain_in_set(lake, "other", of(3))


def test_several_scorers_need_a_choice(tmp_path: Path) -> None:
    lake = Lake(tmp_path / "lake")
    put(lake, [image(0, aesthetic=4.0)])
    lake.append(AESTHETIC, [{"clip_id": of(0), "scorer_id": "b", "aesthetic": 6.0, "num_samples": 1}], "r")
    with pytest.raises(ConfigError, match=r"holds several: a, b\. Choose one with --set scorers\.aesthetic="):
        explain_clip(lake, RESCUED, "0")


def test_a_rescue_and_a_missing_score_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lake = Lake(tmp_path / "lake")
    put(lake, [image(0, text=0.05, colour=0.5), image(1, text=0.5, colour=0.5, aesthetic=5.0), image(2, text=0.5)])
    rescued, rejected, bare = (explain_clip(lake, RESCUED, f"{number:016x}") for number in range(3))
    assert [told.verdict for told in (rescued, rejected, bare)] == ["kept", "rejected", "open"]
    assert [one.verdict for one in rejected.answers[1].rescue] == ["passes", "rejects"]
    print_explanation(bare, json=False)
    out = capsys.readouterr().out
    assert "open at aesthetic" in out
    assert "outback score aesthetic" in out
    print_explanation(rejected, json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["aesthetic", "5", "5.5", "<=", "x", "rejects"]
    assert lines[2].split() == ["or", "colour", "0.5", "x", "<=", "0.98", "passes"]
    assert lines[3].split() == ["and", "text", "0.5", "x", "<=", "0.1", "rejects"]
    print_explanation(rejected, json=True)
    assert json.loads(capsys.readouterr().out)["answers"][1]["rescue"][1]["value"] == 0.5


@pytest.mark.parametrize("columns", ["40", "72", "200"])
def test_lines_fit_the_terminal(
    lake: Lake, columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    print_explanation(explain_clip(lake, RECIPE, of(NUM + 1)), json=False)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= int(columns)
    assert of(NUM + 1) in out


def test_a_rescue_names_scores_there_are() -> None:
    with pytest.raises(ValueError, match="no score 'texts'; did you mean 'text'"):
        CurateRecipe.model_validate({"aesthetic": {"low": 5, "rescue": {"texts": {"high": 0.1}}}})
    with pytest.raises(ValueError, match="at least one score"):
        Bounds.model_validate({"low": 5, "rescue": {}})
    with pytest.raises(ValueError, match="needs low, high or both"):
        VideoBounds.model_validate({"low": 5, "rescue": {"text": {}}})
    plain = CurateRecipe(text=Bounds(low=0.1))
    assert "rescue" not in plain.canonical_json()  # recipes without one keep their ids
    assert "aesthetic" not in plain.canonical_json()
    assert Interval(low=1).model_dump(exclude_none=True) == {"low": 1}
