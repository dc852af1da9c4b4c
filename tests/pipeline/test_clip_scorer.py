"""The contract of a scorer: what it is shown, what it may answer, and what becomes of an answer that is none."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.clip_scorer import (
    ClipSample,
    ClipScorer,
    FrameCount,
    ScorerConfig,
    ScoreWorker,
    checked_columns,
    clip_samples,
    load_scorer,
    scorer_id,
)
from pipeline.samples import SampleSpec
from schemas.errors import ConfigError, RowError
from schemas.recipe import overridden
from schemas.scores import own_family
from tests.flows.small_media import write_video

TABLE = own_family("lines", "Lines.", {"num_lines": "lines", "length": "their length"})
FILE = '''
"""A scorer."""
import os
from pipeline.clip_scorer import ClipScorer, ScorerConfig
from schemas.scores import own_family

class Config(ScorerConfig):
    ends: str = "none"

class Scorer(ClipScorer[Config]):
    table = own_family("mine", "Mine.", {"mean": "mean grey level"})
    config_type = Config

    def score(self, samples):
        if self.config.ends == "raise":
            raise KeyError("nothing here")
        if self.config.ends == "die":
            os.abort()
        if self.config.ends == "hang":
            while True:
                pass
        return {"mean": samples[0].image.mean() if self.config.ends == "none" else float("nan")}
'''


def item(path: Path, end_ms: int = 0) -> dict[str, Any]:
    kind = "video" if end_ms else "image"
    return {"clip_id": "c", "uri": str(path), "kind": kind, "start_ms": 0, "end_ms": end_ms}


def test_samples_are_as_asked_for(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 0, shots=1, frames_per_shot=20)  # one second
    clip = item(tmp_path / "a.mp4", 1000)
    three = clip_samples(clip, ScorerConfig(samples=FrameCount(num_frames=3, short_edge_px=48)))
    assert [sample.seconds for sample in three] == [0.0, 0.5, 1.0]
    assert {sample.image.shape for sample in three} == {(48, 48, 3)}
    whole = clip_samples(clip, ScorerConfig(samples=FrameCount(num_frames=1, short_edge_px=None)))
    assert [sample.image.shape for sample in whole] == [(96, 96, 3)]
    by_rate = clip_samples(clip, ScorerConfig(samples=SampleSpec(fps=5, short_edge_px=64)))
    assert [round(sample.seconds, 3) for sample in by_rate] == [0.0, 0.2, 0.4, 0.6, 0.8]
    Image.new("RGB", (80, 40), (250, 0, 10)).save(tmp_path / "red.png")
    (image,) = clip_samples(
        item(tmp_path / "red.png"), ScorerConfig(samples=FrameCount(num_frames=3, short_edge_px=20))
    )
    assert image.image.shape == (20, 40, 3)
    assert image.image[0, 0].tolist() == [10, 0, 250]  # blue first


@pytest.mark.parametrize(
    "answer",
    [
        None,
        [1.0, 2.0],
        {"num_lines": 1.0},
        {"num_lines": 1.0, "length": 2.0, "width": 3.0},
        {"num_lines": float("nan"), "length": 2.0},
        {"num_lines": 1.0, "length": float("-inf")},
        {"num_lines": 1e300, "length": 2.0},
        {"num_lines": "3", "length": 2.0},
        {"num_lines": np.zeros(2), "length": 2.0},
    ],
)
def test_wrong_answers_have_a_reason(answer: Any) -> None:
    with pytest.raises(RowError, match="score_lines") as caught:
        checked_columns(TABLE, answer)
    assert caught.value.reason == "WrongScores"


def test_numbers_of_any_library_are_plain_ones_afterwards() -> None:
    found = checked_columns(TABLE, {"length": None, "num_lines": np.float16(2.5)})
    assert found == {"num_lines": 2.5, "length": None}
    assert type(found["num_lines"]) is float
    assert checked_columns(TABLE, {"num_lines": np.int64(3), "length": True}) == {"num_lines": 3.0, "length": 1.0}


def test_whatever_a_scorer_does_costs_one_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scorer_of_a_user.py").write_text(FILE)
    Image.new("RGB", (32, 32), (90, 90, 90)).save(tmp_path / "grey.png")
    name = "scorer_of_a_user:Scorer"
    monkeypatch.setattr(sys, "path", list(sys.path))
    reasons = {"raise": "KeyError", "die": "DecoderCrashed", "nan": "WrongScores", "hang": "DecodeTimeout"}
    for ends, reason in reasons.items():
        options = f'{{"ends": "{ends}", "execution": {{"timeout_s": {5 if ends == "hang" else 100}}}}}'
        worker = ScoreWorker(name, options, "s", str(tmp_path))
        with pytest.raises(RowError) as caught:
            worker.process(item(tmp_path / "grey.png"))
        assert caught.value.reason == reason
    row = ScoreWorker(name, "{}", "s", str(tmp_path)).process(item(tmp_path / "grey.png"))["score_mine"][0]
    assert (row["clip_id"], row["scorer_id"], row["mean"], row["num_samples"]) == ("c", "s", 90.0, 1)


def test_the_id_follows_code_and_options_but_not_comments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "scorer_with_an_id.py"
    path.write_text(FILE)
    scorer = load_scorer("scorer_with_an_id:Scorer")
    first = scorer_id(scorer, scorer.config_type(), by_code=True)
    path.write_text(FILE + "\n# a remark\n")
    assert scorer_id(scorer, scorer.config_type(), by_code=True) == first
    limits = overridden(scorer.config_type(), ["execution.timeout_s=3"], "x")
    assert scorer_id(scorer, limits, by_code=True) == first
    options = overridden(scorer.config_type(), ["ends=x"], "x")
    path.write_text(FILE.replace(".mean()", ".max()"))
    others = {scorer_id(scorer, options, by_code=True), scorer_id(scorer, scorer.config_type(), by_code=True)}
    assert len(others | {first}) == 3


def test_overrides_keep_the_rest_of_a_section() -> None:
    config = ScorerConfig(samples=FrameCount(num_frames=3, short_edge_px=None))
    assert overridden(config, ["samples.num_frames=5"], "x").samples == FrameCount(num_frames=5, short_edge_px=None)
    with pytest.raises(ConfigError, match="x is wrong"):
        overridden(config, ["margin=5"], "x")


class Unfinished(ClipScorer[ScorerConfig]):
    """Has no table and scores nothing."""


class Finished(Unfinished):
    """Does."""

    table = TABLE
    config_type = ScorerConfig

    def score(self, samples: Sequence[ClipSample]) -> dict[str, float | None]:
        return {"num_lines": 1.0, "length": None}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "not of the form module:name"),
        ("no_such_module:Scorer", "No module named"),
        (f"{__name__}:Nobody", "cannot be imported"),
        (f"{__name__}:TABLE", "expected a class"),
        (f"{__name__}:Unfinished", "lacks table, config_type, score"),
    ],
)
def test_what_is_no_scorer_is_refused_by_what_it_lacks(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_scorer(name)
    assert load_scorer(f"{__name__}:Finished") is Finished


@pytest.mark.parametrize(
    ("family", "columns"),
    [
        ("Blue", {"ratio": "x"}),
        ("a-b", {"ratio": "x"}),
        ("x; drop table clips", {"ratio": "x"}),
        ("blue", {"two words": "x"}),
        ("blue", {"ratio": ""}),
        ("blue", {}),
        ("blue", {"clip_id": "x"}),
        ("blue", {"num_samples": "x"}),
    ],
)
def test_names_that_no_table_could_have_are_refused(family: str, columns: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        own_family(family, "What it measures.", columns)
