"""Every recipe of the published model, at a thousandth of its width, through the code that trains it whole."""

import math
import tempfile
from pathlib import Path

import pytest

from jobs.train import load_training_recipe
from model.weights import digest
from tests.jobs.test_plan import PUBLISHED, for_64
from tests.train.small_data import CONTEXT_LEN, TINY_MODEL, pair_data, sequence_data, start_weights
from tests.train.small_runs import run, run_workers
from train.language import Start
from train.preference import DpoConfig, DpoObjective
from train.pretrain import PretrainConfig, PretrainObjective
from train.progress import read_losses

WORKERS, STEPS = 2, 3
# On more GPUs the others are replicas, and nothing else is different.
VARIANTS = [*((name, ()) for name in PUBLISHED), ("pretrain_2", tuple(for_64("pretrain_2")))]

DPO: tuple[str, tuple[str, ...]] = ("dpo", ())
LORA: tuple[str, tuple[str, ...]] = ("instruct_lora", ())
Lines = list[dict[str, float]]
Variant = tuple[str, tuple[str, ...]]


def small(name: str, overrides: tuple[str, ...]) -> PretrainConfig:
    """A recipe with nothing changed but sizes, and what only GPUs do: its context, or else its shards, over two workers."""
    config = load_training_recipe(name, overrides).pretrain
    assert config is not None
    values = config.model_dump()
    layout = values["execution"]["layout"]
    shared = "context" if layout["context"] > 1 else "shard"
    layout |= {"shard": 1, "context": 1, "compile": False, shared: WORKERS}
    values["execution"] |= {"num_workers": WORKERS, "num_threads": 1, "use_gpu": False, "log_every": 1}
    values["execution"]["head_loss"]["chunk_tokens"] = 32
    values["model"] |= {**TINY_MODEL, "max_position_embeddings": CONTEXT_LEN}
    values["optim"]["warmup_steps"] = 0
    return PretrainConfig.model_validate(values | {"steps": STEPS, "batch_size": 4})


def small_dpo() -> DpoConfig:
    """The preference recipe with nothing changed but workers and steps; its architecture is that of its start."""
    config = load_training_recipe("dpo").dpo
    assert config is not None
    values = config.model_dump()
    values["execution"]["layout"] |= {"shard": WORKERS, "compile": False}
    values["execution"] |= {"num_workers": WORKERS, "num_threads": 1, "use_gpu": False, "log_every": 1}
    return DpoConfig.model_validate(values | {"steps": STEPS, "batch_size": 4})


def _train_all(rank: int, folder: Path) -> None:
    mine = folder / f"data-{rank}"
    mine.mkdir()
    data = sequence_data(mine)
    for index, (recipe, overrides) in enumerate(VARIANTS):
        run(PretrainObjective(small(recipe, overrides), data), folder / f"{index}")
    start = Start(folder / "start", digest(folder / "start"))
    run(PretrainObjective(small(*LORA), data, start.folder), folder / "lora")
    run(DpoObjective(small_dpo(), pair_data(mine), start, folder / "dpo"), folder / "dpo")


@pytest.fixture(scope="module")
def losses() -> dict[Variant, Lines]:
    with tempfile.TemporaryDirectory() as name:  # not tmp_path, whose name may be too long for the children
        start_weights(Path(name))
        run_workers(WORKERS, Path(name), _train_all)
        runs = [*((variant, f"{index}") for index, variant in enumerate(VARIANTS)), (DPO, "dpo"), (LORA, "lora")]
        return {variant: read_losses(Path(name, storage, "progress.jsonl")) for variant, storage in runs}


def test_the_published_preferences_train(losses: dict[Variant, Lines]) -> None:
    lines = losses[DPO]
    assert len(lines) == STEPS
    assert lines[0]["margin"] == pytest.approx(0.0, abs=0.05)  # bfloat16 of layers, as the reference has it
    assert lines[0]["dpo"] == pytest.approx(math.log(2), abs=0.02)


def test_the_adapter_of_a_single_gpu_trains(losses: dict[Variant, Lines]) -> None:
    config, lines = small(*LORA), losses[LORA]
    assert config.adapter is not None
    assert config.execution.layout.compute == "bfloat16"
    assert len(lines) == STEPS
    assert lines[-1]["loss"] != lines[0]["loss"] == pytest.approx(lines[0]["text"], rel=0.05)  # text alone is learnt


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: f"{variant[0]}-{'64' if variant[1] else '8'}")
def test_a_published_recipe_trains(losses: dict[Variant, Lines], variant: Variant) -> None:
    lines, config = losses[variant], small(*variant)
    assert config.execution.layout.compute == "bfloat16"
    assert len(lines) == STEPS
    first = lines[0]
    # Fresh weights know nothing: each kind costs about the logarithm of the vocabulary, and the loss is what it weighs.
    learnt = [kind for kind, weight in (("text", config.text_weight), ("vision", config.vision_weight)) if weight]
    assert first["loss"] == pytest.approx(sum(first[kind] for kind in learnt) / len(learnt), rel=0.05)
    assert lines[-1]["loss"] != first["loss"]
    rates = [line["learning_rate"] / config.optim.learning_rate for line in lines]
    expected = [1, 2 / 3, 1 / 3] if config.optim.schedule == "linear" else [1, 0.75, 0.25]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "learnt", "schedule", "context_len"),
    [
        ("pretrain_1", (0.5, 1.0), "cosine", 5120),
        ("pretrain_2", (0.5, 1.0), "cosine", 131_072),
        ("quality", (1.0, 0.0), "linear", None),
        ("instruct_1", (0.0, 1.0), None, None),
        ("instruct_2", (0.0, 1.0), None, None),
        ("instruct_lora", (0.0, 1.0), None, None),
    ],
)
def test_a_stage_is_what_the_report_says(
    name: str, learnt: tuple[float, float], schedule: str | None, context_len: int | None
) -> None:
    """Emu3 report, sections 2.4 and 2.5: vision tokens weigh half, alone, or nothing; None where it is silent."""
    config = load_training_recipe(name).pretrain
    assert config is not None
    architecture = config.transformer_config(184_622)
    assert (config.vision_weight, config.text_weight) == learnt
    assert schedule in (None, config.optim.schedule)
    assert context_len in (None, architecture.max_position_embeddings)
    if name.startswith("pretrain"):
        assert (config.optim.learning_rate, architecture.dropout) == (5e-5, 0.1)
