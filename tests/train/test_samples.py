"""Pictures that are drawn while a model is trained, and a training that does not change for them."""

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from model.generate import VisionRequest, generate_vision
from model.pictures import decode_codes
from model.sampling import SamplingConfig
from model.transformer import Transformer
from model.vision_tokenizer.config import VISION_TOKENIZER_SIZES, VisionTokenizerConfig
from model.vision_tokenizer.tokenizer import VisionTokenizer
from model.weights import digest, load_language_model, load_vision_tokenizer, save_vision_tokenizer
from schemas.document import VisionDocument, parse_document
from schemas.errors import ConfigError
from tests.train.small_data import (
    ALONE,
    VOCABULARY,
    dpo_config,
    pair_data,
    pretrain_config,
    sequence_data,
    start_weights,
)
from tests.train.small_runs import run, run_workers
from train.batches import SequenceData
from train.loop import TrainingFolder
from train.preference import DpoObjective, train_preferences
from train.pretrain import PretrainObjective, pretrain
from train.samples import Sample, SamplesConfig, draw_samples

PROMPTS = ["a red circle", "!"]
SAMPLES: dict[str, Any] = {"prompts": PROMPTS, "every": 3, "h": 2, "w": 3, "seed": 7}


def _save_vision(folder: Path, num_codes: int) -> None:
    config = VISION_TOKENIZER_SIZES["tiny"].model_copy(update={"codebook_size": num_codes})
    save_vision_tokenizer(folder, VisionTokenizer(config).eval())


@pytest.fixture
def data(tmp_path: Path) -> SequenceData:
    """Sequences with the vision tokenizer of their codes."""
    torch.manual_seed(3)
    _save_vision(tmp_path / "vision", VOCABULARY.num_codes)
    return dataclasses.replace(sequence_data(tmp_path), vision=tmp_path / "vision")


class Figures:
    """A hook from before there were samples."""

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures are not looked at here."""

    def close(self) -> None:
        """Nothing is open."""


class Gallery(Figures):
    """A hook that wants samples."""

    seen: ClassVar[list[tuple[int, list[str]]]] = []  # of all of them: loggers are made by name

    def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
        self.seen.append((step, [sample.prompt for sample in samples]))


def open_gallery(folder: Path, resumed_from_step: int) -> Gallery:
    return Gallery()


def open_figures(folder: Path, resumed_from_step: int) -> Figures:
    return Figures()


def test_samples_change_nothing_that_is_learnt(tmp_path: Path, data: SequenceData) -> None:
    # Dropout: what is drawn must leave no mark on the generators.
    plain = pretrain_config(model={"dropout": 0.2})
    drawing = pretrain_config(model={"dropout": 0.2}, execution={"samples": {**SAMPLES, "every": 1}})
    assert plain.identity() == drawing.identity()
    without = run(PretrainObjective(plain, data), tmp_path / "without")
    found = run(PretrainObjective(drawing, data), tmp_path / "with")
    assert all(torch.equal(value, found[name]) for name, value in without.items())
    result = [TrainingFolder(tmp_path / name).result.read_text() for name in ("without", "with")]
    assert result[0] == result[1]


def test_drawing_leaves_the_model_and_the_generators_as_they_were(tmp_path: Path, data: SequenceData) -> None:
    model = PretrainObjective(pretrain_config(model={"dropout": 0.2}), data).build_model(ALONE).train()
    assert isinstance(model, Transformer)
    state, before = torch.get_rng_state(), digest(model)
    first, again = (draw_samples(model, data, SamplesConfig.model_validate(SAMPLES)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert digest(model) == before
    assert all(module.training for module in model.modules())
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.frames, other.frames)


def _train_both(rank: int, folder: Path, objectives: dict[str, PretrainObjective]) -> None:
    for name, objective in objectives.items():
        run(objective, folder / name)


def test_other_workers_wait_for_the_one_that_draws(data: SequenceData) -> None:
    options: dict[str, Any] = {"num_workers": 2}
    plain, drawing = (pretrain_config(execution=given) for given in (options, {**options, "samples": SAMPLES}))
    objectives = {"without": PretrainObjective(plain, data), "with": PretrainObjective(drawing, data)}
    with tempfile.TemporaryDirectory() as name:
        run_workers(2, Path(name), _train_both, objectives)
        result = [TrainingFolder(Path(name) / one).result.read_text() for one in objectives]
        assert result[0] == result[1]
        assert len(list((Path(name) / "with" / "samples").iterdir())) == 3


def test_the_last_samples_are_what_the_finished_model_draws(tmp_path: Path, data: SequenceData) -> None:
    loggers = ["tensorboard", f"{__name__}:open_figures", f"{__name__}:open_gallery"]
    Gallery.seen.clear()
    run(PretrainObjective(pretrain_config(execution={"samples": SAMPLES, "loggers": loggers}), data), tmp_path / "run")
    folders = sorted((tmp_path / "run" / "samples").iterdir())
    assert [folder.name for folder in folders] == ["step-000003", "step-000006", "step-000008"]
    assert Gallery.seen == [(step, PROMPTS) for step in (3, 6, 8)]
    lm = load_language_model(TrainingFolder(tmp_path / "run").weights)
    requests = [VisionRequest(prompt, "image", (1, 2, 3), None, 7 + place) for place, prompt in enumerate(PROMPTS)]
    vision = load_vision_tokenizer(tmp_path / "vision")
    names = ["00-a-red-circle.png", "01-.png"]
    assert sorted(path.name for path in folders[-1].iterdir()) == names
    for name, tokens in zip(names, generate_vision(lm, requests, SamplingConfig()), strict=True):
        document = parse_document(tokens, lm.vocabulary, lm.text)
        assert isinstance(document, VisionDocument)
        expected = decode_codes(vision, document.block.codes, "image")[0]
        np.testing.assert_array_equal(np.asarray(Image.open(folders[-1] / name)), expected)
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = events.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    found.Reload()
    for prompt in PROMPTS:
        assert [event.step for event in found.Images(f"samples/{prompt}")] == [3, 6, 8]


def test_clips_are_drawn_as_strips_of_frames(tmp_path: Path, data: SequenceData) -> None:
    video = {**SAMPLES, "prompts": ["moving"], "every": 8, "video_t": 2, "h": 1, "w": 2, "fps": 8.0}
    run(PretrainObjective(pretrain_config(execution={"samples": video}), data), tmp_path / "run")
    [path] = (tmp_path / "run" / "samples" / "step-000008").iterdir()
    picture = Image.open(path)
    one = load_vision_tokenizer(tmp_path / "vision").config
    assert (picture.height, picture.width) == (_px(one, 1), 8 * _px(one, 2))  # two latent frames of four
    assert picture.info["prompt"] == "moving"


def _px(config: VisionTokenizerConfig, codes: int) -> int:
    return int(codes * 2 ** (len(config.ch_mult) - 1))


def test_preferences_draw_too(tmp_path: Path, data: SequenceData) -> None:
    start = start_weights(tmp_path)
    pairs = dataclasses.replace(pair_data(tmp_path), vision=data.vision)
    config = dpo_config(execution={"samples": {**SAMPLES, "every": 8}})
    run(DpoObjective(config, pairs, start, tmp_path / "run"), tmp_path / "run")
    assert len(list((tmp_path / "run" / "samples" / "step-000008").iterdir())) == 2


@pytest.mark.parametrize(
    ("samples", "vision", "said"),
    [
        ({}, None, "no vision tokenizer of the codes of set-0"),
        ({}, "nowhere", "nowhere.*cannot be read"),
        ({}, "other", "found a vision tokenizer of 8 codes"),
        ({"h": 40, "w": 40}, "vision", "expected at most 64, the model's context"),
        ({"video_t": 1, "fps": 1e-9}, "vision", "samples: "),
    ],
)
def test_samples_that_cannot_be_drawn_are_refused_before_the_start(
    tmp_path: Path, data: SequenceData, samples: dict[str, Any], vision: str | None, said: str
) -> None:
    _save_vision(tmp_path / "other", 8)
    config = pretrain_config(model={"max_position_embeddings": 64}, execution={"samples": {**SAMPLES, **samples}})
    given = dataclasses.replace(data, vision=tmp_path / vision if vision else None)
    with pytest.raises(ConfigError, match=said):
        pretrain(config, given, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    dpo = dpo_config(execution={"samples": {**SAMPLES, **samples}})
    start = start_weights(tmp_path, max_position_embeddings=64)
    with pytest.raises(ConfigError, match=said.replace("set-0", "pairs")):
        train_preferences(
            dpo, dataclasses.replace(pair_data(tmp_path), vision=given.vision), tmp_path / "run", start=start
        )


LAYOUTS: dict[str, dict[str, Any]] = {
    "shard": {"shard": 2},
    "tensor": {"tensor": 2, "recompute": "selective"},
    "bfloat16": {"shard": 2, "compute": "bfloat16"},
    "compiled": {"compile": True},
}


@pytest.mark.slow
def test_workers_that_hold_parts_draw_what_the_finished_model_draws(data: SequenceData) -> None:
    objectives = {}
    for name, layout in LAYOUTS.items():
        for is_drawn in (True, False):
            execution = {"num_workers": 2, "layout": layout, "samples": SAMPLES if is_drawn else None}
            config = pretrain_config(model={"num_kv_heads": 2, "dropout": 0.2}, execution=execution)
            objectives[f"{name}-{is_drawn}"] = PretrainObjective(config, data)
    with tempfile.TemporaryDirectory() as folder:
        run_workers(2, Path(folder), _train_both, objectives)
        for name, layout in LAYOUTS.items():
            drawn, plain = (TrainingFolder(Path(folder) / f"{name}-{is_drawn}") for is_drawn in (True, False))
            assert drawn.result.read_text() == plain.result.read_text()
            assert len(list((drawn.path / "samples").iterdir())) == 3
            lm = load_language_model(drawn.weights)
            lm.transformer.to(getattr(torch, layout.get("compute", "float32")))
            expected = draw_samples(
                lm.transformer, dataclasses.replace(data, text=lm.text), SamplesConfig.model_validate(SAMPLES)
            )
            found = sorted((drawn.path / "samples" / "step-000008").iterdir())
            for path, sample in zip(found, expected, strict=True):
                np.testing.assert_array_equal(np.asarray(Image.open(path)), sample.frames[0], err_msg=name)


def test_samples_of_a_split_adapter_are_refused() -> None:
    for layout in ({"shard": 2}, {"compile": True}):
        with pytest.raises(ValidationError, match="outback export TRAINING FOLDER"):
            pretrain_config(adapter={}, execution={"num_workers": 2, "layout": layout, "samples": SAMPLES})
