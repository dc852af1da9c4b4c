"""Drawings of a lake's model: each once, as a row and a file with the same facts, and shown while it comes."""

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from jobs import generate as module
from jobs.generate import Ask, GenerateRecipe, generate
from model.generate import VisionRequest, generate_vision
from model.pictures import Frames, write_png
from model.weights import LanguageModel
from schemas.catalog import Lake
from schemas.document import Tokens
from schemas.errors import ConfigError
from schemas.generations import GENERATIONS
from schemas.vision_tokens import VISION_TOKENS
from tests.jobs.small_models import FPS, make_lake

RECIPE = GenerateRecipe(h=3, w=3, video_t=4, fps=FPS, lookahead=2)


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    return make_lake(tmp_path_factory.mktemp("models"))


def test_a_drawing_is_a_row_and_a_file_that_says_the_same(lake: Lake) -> None:
    asks = [Ask("a cat\nand a dog", "image", 5), Ask("", "video", 6), Ask("on", "video", 7, "moving", 2)]
    image, video, continued = drawn = generate(lake, asks, "latest", RECIPE)
    rows = {row["generation_id"]: row for row in lake.read(GENERATIONS).to_pylist()}
    for found, ask in zip(drawn, asks, strict=True):
        row = rows[found.generation_id]
        assert (row["prompt"], row["kind"], row["seed"]) == (ask.prompt, ask.kind, ask.seed)
        assert Path(row["uri"]) == found.path
        assert row["checkpoint_id"] == "talker"
    assert rows[continued.generation_id]["continued_clip_id"] == "moving"
    with Image.open(image.path) as picture:
        assert np.array_equal(np.asarray(picture), image.frames[0])
        told = dict(picture.text)  # type: ignore[attr-defined]
    assert told["outback.generation"] == image.generation_id
    assert (told["prompt"], told["seed"], told["outback.checkpoint"]) == ("a cat\nand a dog", "5", "talker")
    with av.open(str(video.path)) as container:
        assert json.loads(container.metadata["comment"])["outback.generation"] == video.generation_id
        assert container.streams.video[0].average_rate == FPS
        assert sum(1 for _ in container.decode(video=0)) == len(video.frames) == 16


def test_clips_of_equal_codes_go_on_alike_and_keep_their_names(lake: Lake) -> None:
    (row,) = lake.read_where(VISION_TOKENS, "clip_id", ["moving"]).to_pylist()
    lake.append(VISION_TOKENS, [{**row, "clip_id": "twin"}], "r")
    asks = [Ask("alike", "video", 3, clip, 2) for clip in ("moving", "twin")]
    for _ in range(2):  # drawn, then found
        one, other = generate(lake, asks, "latest", RECIPE)
        assert one.generation_id == other.generation_id
        assert [one.ask, other.ask] == asks


def test_what_is_there_is_not_drawn_again_and_a_lost_file_comes_back(
    lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first,) = generate(lake, [Ask("once", "image", 1)], "talker", RECIPE)
    first.path.unlink()
    monkeypatch.setattr(module, "generate_vision", None)
    (again,) = generate(lake, [Ask("once", "image", 1)], "latest", RECIPE.model_copy(update={"lookahead": 7}))
    assert again.generation_id == first.generation_id
    assert np.array_equal(again.frames, first.frames)
    assert again.path.exists()


def test_pictures_of_what_is_there_so_far(lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PREVIEW_S", 0.0)
    seen: list[tuple[str, np.ndarray]] = []
    write = write_png

    def note(path: Path, image: Frames, facts: dict[str, str]) -> None:
        if path.parent == tmp_path:
            seen.append((path.name, image))
        write(path, image, facts)

    monkeypatch.setattr(module, "write_png", note)
    image, video = generate(
        lake, [Ask("slow", "image", 2), Ask("slow", "video", 2)], "latest", RECIPE, preview=tmp_path
    )
    of_image = [picture for name, picture in seen if image.generation_id in name]
    assert [picture.shape for picture in of_image] == [(8, 24, 3), (16, 24, 3), (24, 24, 3)]
    assert np.array_equal(of_image[-1], image.frames[0])
    of_video = [picture for name, picture in seen if video.generation_id in name]
    assert np.array_equal(np.stack(of_video), video.frames[3::4])  # the last of each four, as they become whole
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{found.generation_id}.png" for found in (image, video)
    )


def test_what_was_drawn_before_a_failure_is_kept(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    asks = [Ask("kept", "image", seed) for seed in range(5)]
    one_by_two = RECIPE.model_copy(update={"batch_size": 2})
    calls: list[int] = []

    def failing(lm: LanguageModel, requests: list[VisionRequest], *args: Any, **options: Any) -> list[Tokens]:
        calls.append(len(requests))
        if len(calls) == 2:
            raise MemoryError("no room")
        return generate_vision(lm, requests, *args, **options)

    monkeypatch.setattr(module, "generate_vision", failing)
    with pytest.raises(MemoryError):
        generate(lake, asks, "latest", one_by_two)
    assert len(lake.read_where(GENERATIONS, "prompt", ["kept"])) == 2
    found = generate(lake, asks, "latest", one_by_two)
    assert calls == [2, 2, 2, 1]
    rows = lake.read_where(GENERATIONS, "prompt", ["kept"]).to_pylist()
    assert sorted(row["generation_id"] for row in rows) == sorted(generation.generation_id for generation in found)
    assert len(rows) == 5


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_vllm_draws_the_same_when_nothing_is_left_to_chance(lake: Lake) -> None:
    pytest.importorskip("vllm")
    asks = [Ask("by both", "image", 1), Ask("by both", "video", 2), Ask("", "video", 7, "moving", 2)]
    vllm = {"engine": "vllm", "vllm": {"dtype": "float32", "enforce_eager": True, "cpu_kv_cache_gb": 1}}
    sampling = {"temperature": 0.0, "guidance": 2.0}
    size = {"h": 3, "w": 3, "video_t": 4, "fps": FPS}
    theirs = generate(lake, asks, "latest", GenerateRecipe.model_validate({**size, **vllm, "sampling": sampling}))
    before = len(lake.read(GENERATIONS))
    ours = generate(lake, asks, "latest", GenerateRecipe.model_validate({**size, "sampling": {**sampling, "top_k": 9}}))
    assert len(lake.read(GENERATIONS)) == before + 3  # other options: drawn again
    for one, other in zip(theirs, ours, strict=True):
        assert np.array_equal(one.frames, other.frames)


def test_what_cannot_be_drawn_is_said(lake: Lake) -> None:
    for asked, words in (
        (Ask("x", "video", 0, "nowhere", 1), "run `outback tokenize`"),
        (Ask("x", "video", 0, "moving", 4), "the clip has 4, and 4 are to be made in all"),
        (Ask("\ud800", "image", 0), "not valid Unicode"),
    ):
        with pytest.raises(ConfigError, match=words):
            generate(lake, [asked], "latest", RECIPE)
    with pytest.raises(ConfigError, match="names 0 pretrain or dpo checkpoints"):
        generate(lake, [Ask("x", "image", 0)], "nobody", RECIPE)


@pytest.mark.parametrize("option", [{"lookahead": 2}, {"compiled": True}, {"window_t": 4}, {"keep_t": 3}])
def test_vllm_refuses_what_it_does_not_have(option: dict[str, Any]) -> None:
    GenerateRecipe.model_validate({"engine": "vllm"})
    with pytest.raises(ValidationError, match=f"found {next(iter(option))} with engine 'vllm'"):
        GenerateRecipe.model_validate({"engine": "vllm", **option})


def test_vllm_shows_no_previews(lake: Lake, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="previews"):
        generate(lake, [Ask("a cat", "image", 1)], "latest", GenerateRecipe(engine="vllm"), preview=tmp_path)
