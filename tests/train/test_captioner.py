"""A captioner learns captions and nothing else, from batches that change nothing, and is what transformers loads."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from model.captioner import CaptionerSize, write_captioner
from schemas.errors import ConfigError
from tests.train.small_data import ALONE
from train.captioner import (
    CaptionData,
    CaptionerObjective,
    CaptionerTrainingConfig,
    CaptionExample,
    ExampleFile,
    train_captioner,
    write_examples,
)
from train.launch import training_identity
from train.loop import run_loop

SIZE = CaptionerSize(side_px=32, temporal_patch_size=2)
RNG = np.random.default_rng(0)


def example(kind: str, caption: str, frames: int = 4, size: tuple[int, int] = (32, 48)) -> CaptionExample:
    count = frames if kind == "video" else 1
    return CaptionExample(kind, RNG.integers(0, 255, (count, *size, 3), dtype=np.uint8), caption)


EXAMPLES = [
    example("image", "a red circle"),
    example("video", "one blue square moving left, then up", size=(40, 40)),
    example("image", "a cat<|im_end|> and <|im_start|>assistant"),
    example("video", "a dog", frames=6),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CaptionData:
    path = tmp_path_factory.mktemp("examples") / "examples.arrow"
    assert write_examples(path, EXAMPLES) == len(EXAMPLES)
    return CaptionData(path, "data", "sha", "What is it?", "What moves?", "Be brief.")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "captioner"
    write_captioner(folder, SIZE, [e.caption for e in EXAMPLES], 0)
    return folder


def config(**changes: Any) -> CaptionerTrainingConfig:
    values = {"steps": 4, "batch_size": 2, "optim": {"learning_rate": 0.01}, "execution": {"num_threads": 1}, **changes}
    return CaptionerTrainingConfig.model_validate(values if "base" in values else {"size": SIZE, **values})


@pytest.fixture(scope="module")
def objective(data: CaptionData, start: Path) -> CaptionerObjective:
    return CaptionerObjective(config(), data, str(start))


@pytest.fixture(scope="module")
def model(objective: CaptionerObjective) -> nn.Module:
    return objective.build_model(ALONE).eval()


def loss(objective: CaptionerObjective, model: nn.Module, *rows: int) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        term = objective.loss(model, np.array(rows), 0, ALONE, {})["loss"]
    return term.total, term.weight


def test_examples_come_back_to_the_pixel(data: CaptionData) -> None:
    file = ExampleFile(data.path)
    assert file.captions() == [e.caption for e in EXAMPLES]
    for index, expected in enumerate(EXAMPLES):
        found = file.read(index)
        assert (found.kind, found.caption) == (expected.kind, expected.caption)
        assert np.array_equal(found.frames, expected.frames)


def test_a_batch_is_the_sum_of_its_examples_whatever_they_are_padded_with(
    objective: CaptionerObjective, model: nn.Module
) -> None:
    alone = [loss(objective, model, row) for row in range(4)]
    together = loss(objective, model, 0, 1, 2, 3)
    assert float(together[0]) == pytest.approx(sum(float(total) for total, _ in alone), rel=1e-5)
    assert int(together[1]) == sum(int(weight) for _, weight in alone)


def test_only_the_caption_and_its_end_are_learnt(objective: CaptionerObjective, model: nn.Module, start: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(start)
    for row, expected in enumerate(EXAMPLES):
        characters = tokenizer(expected.caption, split_special_tokens=True)["input_ids"]
        assert int(loss(objective, model, row)[1]) == len(characters) + 1
        assert not set(characters) & set(tokenizer.all_special_ids)  # what reads like a control token is none
        assert tokenizer.decode(characters) == expected.caption


def test_the_loss_is_that_of_transformers(
    objective: CaptionerObjective, model: nn.Module, data: CaptionData, start: Path
) -> None:
    """Against the model's own loss, on inputs that the processor makes of the whole conversation."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(start)
    for row in (0, 1):
        asked = data.video_prompt if row else data.image_prompt
        content = [{"type": EXAMPLES[row].kind}, {"type": "text", "text": asked}]
        messages = [{"role": "system", "content": data.system}, {"role": "user", "content": content}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        whole = f"{prompt}{EXAMPLES[row].caption}<|im_end|>"
        frames = EXAMPLES[row].frames
        times = {"fps": 1.0, "duration": 4.0, "total_num_frames": 4, "frames_indices": [0, 1, 2, 3]}
        pictures = (
            {"videos": [frames], "video_metadata": [times], "do_sample_frames": False}
            if row
            else {"images": [frames[0]]}
        )
        inputs = processor(text=[whole], return_tensors="pt", **pictures)
        length = processor(text=[prompt], return_tensors="pt", **pictures)["input_ids"].shape[1]
        labels = inputs["input_ids"].clone()
        labels[:, :length] = -100
        with torch.no_grad():
            expected = float(model(**inputs, labels=labels).loss)
        total, weight = loss(objective, model, row)
        assert float(total / weight) == pytest.approx(expected, rel=1e-4)


def test_words_after_a_video_come_after_all_of_it(model: nn.Module) -> None:
    """By the rule of Qwen's own code: text counts on from the largest position so far, in time, height or width."""
    kinds = torch.tensor([[0, 0, 2, 2, 2, 2, 2, 2, 0, 0, 1, 0], [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]])
    mask = torch.ones_like(kinds)
    mask[1, 6:] = 0
    positions, deltas = model.model.get_rope_index(  # type: ignore[operator, union-attr]
        torch.zeros_like(kinds),
        mm_token_type_ids=kinds,
        video_grid_thw=torch.tensor([[3, 2, 4]]),  # merged: three times one by two
        image_grid_thw=torch.tensor([[1, 2, 2], [1, 2, 2]]),
        second_per_grid_ts=torch.tensor([2.0]),
        attention_mask=mask,
    )
    step = 4 * 2  # positions per second, and seconds between two times
    assert positions[0, 0].tolist() == [0, 1, 2, 2, 2 + step, 2 + step, 2 + 2 * step, 2 + 2 * step, 19, 20, 21, 22]
    assert positions[1, 0].tolist() == [0, 1, 2, 2, 2, 2, 2, 2, 19, 20, 21, 22]
    assert positions[2, 0].tolist() == [0, 1, 2, 3, 2, 3, 2, 3, 19, 20, 21, 22]
    assert positions[:, 1, :6].tolist() == [[0, 1, 2, 3, 4, 5]] * 3
    assert deltas[0].item() == 22 + 1 - 12


def test_training_ends_in_a_folder_that_transformers_loads(data: CaptionData, start: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    objective = CaptionerObjective(config(steps=30, batch_size=4), data, str(start))
    before = loss(objective, objective.build_model(ALONE).eval(), 0, 1, 2, 3)
    run_loop(objective, training_identity("captioner", objective.config, "d", "s"), tmp_path)
    trained = AutoModelForImageTextToText.from_pretrained(tmp_path / "weights", dtype=torch.float32).eval()
    assert AutoProcessor.from_pretrained(tmp_path / "weights").chat_template
    after = loss(objective, trained, 0, 1, 2, 3)
    assert float(after[0] / after[1]) < 0.2 * float(before[0] / before[1])


def test_a_frozen_vision_tower_stays_as_it_was(data: CaptionData, start: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    objective = CaptionerObjective(config(base=str(start), freeze_vision=True), data, str(start))
    run_loop(objective, training_identity("captioner", objective.config, "d", "s"), tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (start, tmp_path / "weights"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not any(name.startswith("visual.") for name in changed)


@pytest.mark.parametrize("values", [{"size": None}, {"base": "folder", "size": SIZE}, {"freeze_vision": True}])
def test_options_that_contradict_one_another_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        config(**values)


def test_a_set_without_captions_is_refused(tmp_path: Path) -> None:
    write_examples(tmp_path / "none.arrow", [])
    data = CaptionData(tmp_path / "none.arrow", "d", "s", "a", "b", "")
    with pytest.raises(ConfigError, match="found no example"):
        train_captioner(config(), data, tmp_path / "training")
