"""An adapter spread over two workers takes the steps of one worker, and hands on its checkpoints."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model.weights import digest
from tests.train.small_data import dpo_config, pair_data, pretrain_config, sequence_data, start_weights
from tests.train.small_runs import run, run_workers
from tests.train.test_layouts import _assert_same_training
from train.adapter import ADAPTER_FILE, ADAPTER_FOLDER
from train.language import Start
from train.preference import DpoObjective
from train.pretrain import PretrainObjective
from train.progress import read_losses

pytestmark = pytest.mark.slow
STEPS = 12
WORKERS = 2
LAYOUTS: dict[str, dict[str, Any]] = {
    "replicas": {},
    "shard": {"shard": 2},
    "context": {"context": 2},
    "recomputed": {"shard": 2, "recompute": "full"},
    "selective": {"shard": 2, "recompute": "selective"},
}
OPTIM = {"learning_rate": 0.01, "warmup_steps": 2, "eps": 1e-5}
EXECUTION = {"log_every": 1, "checkpoint_every": 5}
# Frozen weights lie in bfloat16 and are computed with so: off by rounding, from the first step on.
BFLOAT16 = {"shard": 2, "compute": "bfloat16"}


def _pretraining(folder: Path, place: Path, num_workers: int, layout: dict[str, Any]) -> PretrainObjective:
    place.mkdir(exist_ok=True)
    execution = {**EXECUTION, "num_workers": num_workers, "layout": layout, "evaluate_every": 6, "held_out_rows": 5}
    config = pretrain_config(steps=STEPS, optim=OPTIM, execution=execution, adapter={"rank": 4})
    return PretrainObjective(config, sequence_data(place), folder / "start", sequence_data(place, seed=1))


def _preferences(folder: Path, place: Path, num_workers: int, layout: dict[str, Any], name: str) -> DpoObjective:
    place.mkdir(exist_ok=True)
    execution = {**EXECUTION, "num_workers": num_workers, "layout": layout}
    config = dpo_config(steps=STEPS, optim=OPTIM, execution=execution, adapter={"rank": 4}, reference="base")
    start = Start(folder / "start", digest(folder / "start"))
    return DpoObjective(config, pair_data(place), start, folder / name)


def _hand_on(giver: Path, taker: Path) -> None:
    shutil.copytree(giver / "checkpoints" / "step_00000010", taker / "checkpoints" / "step_00000010")


def _train_all(rank: int, folder: Path) -> None:
    place = folder / f"data-{rank}"
    for name, layout in {**LAYOUTS, "bfloat16": BFLOAT16}.items():
        run(_pretraining(folder, place, WORKERS, layout), folder / name)
    run(_pretraining(folder, place, WORKERS, LAYOUTS["shard"]), folder / "alone to shard")
    run(_preferences(folder, place, WORKERS, LAYOUTS["shard"], "dpo-shard"), folder / "dpo-shard")


@pytest.fixture(scope="module")
def trained() -> Iterator[Path]:
    """A folder of trainings: alone, and by two workers in each layout."""
    with tempfile.TemporaryDirectory() as name:  # not tmp_path, whose name may be too long for the children
        folder = Path(name)
        start_weights(folder)
        run(_pretraining(folder, folder / "data", 1, {}), folder / "alone")
        run(_preferences(folder, folder / "data", 1, {}, "dpo"), folder / "dpo")
        _hand_on(folder / "alone", folder / "alone to shard")
        run_workers(WORKERS, folder, _train_all)
        _hand_on(folder / "shard", folder / "shard to alone")
        run(_pretraining(folder, folder / "data", 1, {}), folder / "shard to alone")
        yield folder


@pytest.mark.parametrize("name", [*LAYOUTS, "alone to shard", "shard to alone"])
def test_every_layout_takes_the_steps_of_one_worker(trained: Path, name: str) -> None:
    _assert_same_training(trained / "alone", trained / name, 2 if " to " in name else STEPS, abs_error=1e-6)
    for file in ("model.safetensors", f"{ADAPTER_FOLDER}/{ADAPTER_FILE}"):
        alone, found = (load_file(trained / one / "weights" / file) for one in ("alone", name))
        assert alone.keys() == found.keys()
        for key, value in alone.items():
            assert float((found[key] - value).abs().max()) <= 1e-5, f"{name}: {key}"


def test_preferences_are_learnt_alike_over_shards(trained: Path) -> None:
    _assert_same_training(trained / "dpo", trained / "dpo-shard", STEPS, abs_error=1e-5)
    last = read_losses(trained / "dpo-shard" / "progress.jsonl")[-1]
    assert last["margin"] > 0.1


def test_frozen_weights_in_bfloat16_come_back_as_they_were(trained: Path) -> None:
    exact, rounded = (read_losses(trained / one / "progress.jsonl") for one in ("alone", "bfloat16"))
    for right, line in zip(exact, rounded, strict=True):
        assert line["loss"] == pytest.approx(right["loss"], rel=0.02)
    assert [line["loss"] for line in exact] != [line["loss"] for line in rounded]
    start, merged = (load_file(trained / one / "model.safetensors") for one in ("start", "bfloat16/weights"))
    frozen = [name for name in start if "_proj" not in name]
    assert frozen
    assert all(torch.equal(start[name], merged[name]) for name in frozen)
    # What was merged is float32: the base with all its digits, and the adapter's small numbers.
    adapter = load_file(trained / "bfloat16" / "weights" / ADAPTER_FOLDER / ADAPTER_FILE)
    name = "model.layers.1.mlp.up_proj"
    first, second = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    torch.testing.assert_close(
        merged[f"{name}.weight"], start[f"{name}.weight"] + 8 * second @ first, atol=1e-6, rtol=0
    )
    assert any(not torch.equal(value, value.bfloat16().float()) for value in adapter.values())
