"""Captioners are found by name, and what counts as captioned is every window of a clip, soundly."""

from typing import Any

import pyarrow as pa
import pytest
import ray
from pydantic import ValidationError

from jobs.caption import _room
from jobs.captioners import captioned_soundly, find_captioner, is_whole
from jobs.curate import load_curate_recipe
from jobs.pack import PackRecipe
from jobs.score import score_captions
from pipeline.caption_clips import CaptionRecipe, captioner_row
from pipeline.caption_prompts import Prompt, load_prompt
from pipeline.caption_provided import CAPTIONER_ID as PROVIDED_ID
from pipeline.rules import Bounds
from pipeline.score_captions import CaptionScoreConfig
from schemas.captions import CAPTIONS
from schemas.catalog import Lake
from schemas.errors import ConfigError

CLIPS = pa.table({"clip_id": ["long", "short", "bare"], "end_ms": [4000, 1000, 1000]})


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """`good-1` captioned both windows of `long` and one of `short`, `good-2` the first of `long`, and `bare` with a
    problem."""
    made = Lake(tmp_path_factory.mktemp("captioners") / "lake")
    rows = [
        ("long", 0, "good-1", None, 2000),
        ("long", 1, "good-1", None, 4000),
        ("short", 0, "good-1", None, 1000),
        ("long", 0, "good-2", None, 2000),
        ("bare", 0, "good-2", "empty", 1000),
    ]
    names = ("clip_id", "window", "captioner_id", "problem", "window_end_ms")
    shared = {"text": "words", "engine": "stub", "window_start_ms": 0}
    made.append(CAPTIONS, [{**shared, **dict(zip(names, row, strict=True))} for row in rows], "run")
    return made


def test_a_captioner_is_found_by_the_beginning_of_its_id(lake: Lake) -> None:
    assert find_captioner(lake, "good-2") == "good-2"
    assert find_captioner(lake, "provided") == PROVIDED_ID
    with pytest.raises(ConfigError, match=r"2 captioners fit 'good', expected one; there are \['good-1', 'good-2'\]"):
        find_captioner(lake, "good")
    with pytest.raises(ConfigError, match="0 captioners fit 'bad'"):
        find_captioner(lake, "bad")


@pytest.mark.parametrize(("windows", "expected"), [
    ([(0, 2000), (1, 4000)], True), ([(0, 2000)], False), ([(1, 4000)], False), ([(0, 2000), (2, 4000)], False), ([], False),
])  # fmt: skip
def test_a_clip_is_whole_from_its_first_window_to_its_end(windows: list[tuple[int, int]], expected: bool) -> None:
    captions = [{"window": window, "window_end_ms": end_ms} for window, end_ms in windows]
    assert is_whole({"end_ms": 4000}, captions) == expected


def test_only_sound_and_whole_captions_of_others_count(lake: Lake) -> None:
    assert captioned_soundly(lake, CLIPS, but_for="nobody").to_pylist() == ["long", "short"]
    assert captioned_soundly(lake, CLIPS, but_for="good-1").to_pylist() == []


def test_clips_that_are_captioned_in_part_have_no_score_yet(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = CLIPS.append_column("uri", pa.array(["/a"] * 3)).append_column("kind", pa.array(["video"] * 3))
    monkeypatch.setattr("jobs.score.clip_items", lambda *_: clips.filter(pa.array([True, False, False])))
    with pytest.raises(ConfigError, match="good-2 has captioned no clip of 'all' whole"):
        score_captions(lake, "all", "good-2", CaptionScoreConfig())
    with pytest.raises(ConfigError, match="expected one: give --captioner"):
        score_captions(lake, "all", None, CaptionScoreConfig())


def test_sets_of_before_there_were_caption_rules_keep_their_ids() -> None:
    recipe = load_curate_recipe("offline")
    assert not any("caption" in name for name in recipe.model_dump(mode="json"))
    assert "caption" not in recipe.model_dump(mode="json")["scorers"]
    assert recipe.model_dump(mode="json")["motion_max"] is None  # as before, too
    asking = recipe.model_copy(update={"caption_words": Bounds(low=3)})
    assert asking.model_dump(mode="json")["caption_words"]["low"] == 3
    assert "captioner" not in PackRecipe(context_len=64, num_codes=8).model_dump(mode="json")
    assert (
        PackRecipe(context_len=64, num_codes=8, captioner="provided").model_dump(mode="json")["captioner"] == "provided"
    )


def test_a_captioner_is_what_its_words_depend_on() -> None:
    prompt_id, prompt = load_prompt("short.v1")

    def captioner_id(prompt: Prompt = prompt, **options: Any) -> object:
        recipe = CaptionRecipe.model_validate({"engine": "vllm", "model": "m", **options})
        return captioner_row(recipe, prompt_id, prompt, "m", "digest")["captioner_id"]

    first = captioner_id()
    for same in ({"readers": 7}, {"num_engines": 3}, {"vllm": {"max_num_seqs": 2}}, {"windows": {"timeout_s": 1.0}}):
        assert captioner_id(**same) == first
    for other in ({"vllm": {"dtype": "float32"}}, {"windows": {"num_frames": 3}}, {"sampling": {"max_tokens": 3}}):
        assert captioner_id(**other) != first
    written = prompt.model_dump()
    assert captioner_id(Prompt.model_validate({**written, "video": f"\n{prompt.video}\n\n"})) == first
    assert captioner_id(Prompt.model_validate({**written, "video": "Else."})) != first


def test_options_that_nobody_reads_are_refused() -> None:
    with pytest.raises(ValidationError, match="reads no model: start from caption_vllm or caption_endpoint"):
        CaptionRecipe(model="/models/X")


def test_engines_get_gpus_that_nodes_have(monkeypatch: pytest.MonkeyPatch) -> None:
    def room(gpus: list[int], wanted: int) -> tuple[int, int]:
        nodes = [{"Alive": True, "Resources": {"GPU": float(found)}} for found in gpus]
        monkeypatch.setattr(ray, "nodes", lambda: [*nodes, {"Alive": False, "Resources": {"GPU": 64.0}}])
        monkeypatch.setattr("jobs.caption.num_cpus", lambda: 16)
        return _room(CaptionRecipe(engine="vllm", model="m", vllm={"tensor_parallel_size": wanted}))

    assert room([], 4) == (0, 16)
    assert room([8, 4, 1], 1) == (1, 13)
    assert room([8, 4, 1], 4) == (4, 3)
    with pytest.raises(ConfigError, match="is 9, and no node of the cluster has more than 8 GPUs"):
        room([8, 4, 1], 9)
