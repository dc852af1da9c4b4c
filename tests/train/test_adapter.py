"""Adapters: what they train and what they leave alone, what comes out, against transformers with PEFT; and what they refuse."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader

from model.export import export_language_model
from model.transformer import Transformer
from model.weights import digest, load_language_model
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
from train.adapter import ADAPTER_FILE, ADAPTER_FOLDER, adapter_of
from train.checkpoint import latest
from train.launch import training_identity
from train.loop import Objective, TrainingFolder, _train_step, run_loop
from train.meter import transformer_flops
from train.optim import NetworkUpdate
from train.preference import DpoObjective, stored_reference
from train.pretrain import PretrainConfig, PretrainObjective, pretrain
from train.progress import read_losses

ADAPTER: dict[str, Any] = {"rank": 4, "alpha": 12}
TOKENS = torch.randint(0, VOCABULARY.size, (2, 30), generator=torch.Generator().manual_seed(1))
DPO_OPTIM = {"learning_rate": 0.01, "warmup_steps": 2}


@pytest.fixture(autouse=True)
def _own_reference() -> Iterator[None]:
    yield
    stored_reference.cache_clear()


def make(folder: Path, adapter: dict[str, Any] | None = None, **changes: Any) -> PretrainObjective:
    """A training of an adapter beside random weights; rows are the same as of other objectives in this folder."""
    config = pretrain_config(adapter=ADAPTER | (adapter or {}), **changes)
    return PretrainObjective(config, sequence_data(folder), start_weights(folder).folder)


def begin(objective: PretrainObjective) -> Path:
    """The weights that it begins with."""
    assert objective.weights is not None
    return objective.weights


def run(objective: PretrainObjective, storage: Path) -> Path:
    run_loop(objective, training_identity("pretrain", objective.config, "data", "sha"), storage)
    return TrainingFolder(storage).weights


def take_steps(objective: PretrainObjective | DpoObjective, model: nn.Module, steps: int = 3) -> NetworkUpdate:
    update = NetworkUpdate(model, objective.config.optim)
    for step in range(steps):
        rows = (np.arange(4) + step) % objective.num_rows()
        _train_step(objective, model, [update], step, rows, ALONE, {})
    return update


def built(objective: PretrainObjective | DpoObjective) -> Transformer:
    torch.manual_seed(0)
    model = objective.build_model(ALONE).train()
    assert isinstance(model, Transformer)
    return model


def own_name(name: str) -> str:
    return name.replace(".base_layer", "")


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model.eval()(TOKENS)
    return found


def test_only_the_adapter_is_trained_and_the_base_keeps_its_bits(tmp_path: Path) -> None:
    objective = make(tmp_path, optim={"learning_rate": 0.01, "weight_decay": 0.5})
    before = load_file(begin(objective) / "model.safetensors")
    model = built(objective)
    update = take_steps(objective, model)
    named = dict(model.named_parameters())
    frozen = {own_name(name): value for name, value in named.items() if not value.requires_grad}
    assert frozen.keys() == before.keys()
    assert all(torch.equal(frozen[name], value) for name, value in before.items())
    assert all(value.grad is None for value in frozen.values())
    trained = {name: value for name, value in named.items() if value.requires_grad}
    assert len(trained) == 2 * 7 * 2  # two matrices beside each of seven in two layers
    assert all(
        "lora_" in name and bool(value.any()) and value.dtype == torch.float32 for name, value in trained.items()
    )
    [optimizer] = update.optimizers
    updated = {id(value) for group in optimizer.param_groups for value in group["params"]}
    assert updated == {id(value) for value in trained.values()} == {id(value) for value in optimizer.state}


def test_the_norm_of_gradients_is_that_of_the_adapter(tmp_path: Path) -> None:
    objective = make(tmp_path)
    model = built(objective)
    update = NetworkUpdate(model, objective.config.optim)
    figures = _train_step(objective, model, [update], 0, np.arange(4), ALONE, {})
    # Clipped afterwards to 5, which these are below.
    squares = sum(float(value.grad.square().sum()) for value in model.parameters() if value.grad is not None)
    assert figures["grad_norm"] == pytest.approx(math.sqrt(squares), rel=1e-5)
    assert 0 < figures["grad_norm"] < 5


@torch.no_grad()
def test_a_fresh_adapter_changes_nothing_and_is_drawn_as_peft_draws_it(tmp_path: Path) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    objective = make(tmp_path, {"rank": 64})
    model = built(objective)
    start = load_language_model(begin(objective)).transformer
    assert torch.equal(logits(model), logits(start))
    theirs = inject_adapter_in_model(LoraConfig(r=64, target_modules=["q_proj", "down_proj"]), start)
    ours = dict(model.named_parameters())
    for name, value in theirs.named_parameters():
        if "lora_A" in name:
            assert float(ours[name].std()) == pytest.approx(float(value.std()), rel=0.1)
            assert float(ours[name].abs().max()) == pytest.approx(float(value.abs().max()), rel=0.02)
            assert not torch.equal(ours[name], value)
        elif "lora_B" in name:
            assert not ours[name].any()
    again, other = built(objective), make(tmp_path, {"rank": 64})
    first = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert torch.equal(again.get_parameter(first), ours[first])
    torch.manual_seed(1)
    assert not torch.equal(other.build_model(ALONE).get_parameter(first), ours[first])


def test_training_lowers_the_loss_and_changes_what_is_said(tmp_path: Path) -> None:
    objective = make(tmp_path, steps=40, execution={"log_every": 1, "checkpoint_every": 100})
    before = digest(begin(objective))
    weights = run(objective, tmp_path / "run")
    first, *_, last = read_losses(tmp_path / "run" / "progress.jsonl")
    assert last["loss"] < 0.7 * first["loss"]
    assert digest(begin(objective)) == before
    merged, start = (load_language_model(folder).transformer for folder in (weights, begin(objective)))
    assert float((logits(merged) - logits(start)).abs().max()) > 1


def test_merged_weights_say_what_the_trained_model_says(tmp_path: Path) -> None:
    objective = make(tmp_path)
    model = built(objective)
    take_steps(objective, model, 20)
    objective.export(model, tmp_path / "out")
    merged = load_language_model(tmp_path / "out")
    torch.testing.assert_close(logits(merged.transformer), logits(model), atol=1e-5, rtol=0)
    assert merged.transformer.config == model.config
    start = load_language_model(begin(objective)).transformer
    assert float((logits(model) - logits(start)).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("adapter", "scale"),
    [
        ({}, 12 / 4),
        ({"rslora": True}, 12 / 2),
        ({"rank": 9, "alpha": 3, "targets": ["v_proj", "q_proj", "down_proj"]}, 3 / 9),
    ],
)
def test_merged_weights_are_the_base_and_the_scaled_product(
    tmp_path: Path, adapter: dict[str, Any], scale: float
) -> None:
    objective = make(tmp_path, adapter)
    weights = run(objective, tmp_path / "run")
    base, merged = (load_file(folder / "model.safetensors") for folder in (begin(objective), weights))
    alone = load_file(weights / ADAPTER_FOLDER / ADAPTER_FILE)
    changed = 0
    for name, value in base.items():
        first = alone.pop(f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight", None)
        if first is None:
            assert torch.equal(merged[name], value), name
            continue
        second = alone.pop(f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight")
        torch.testing.assert_close(merged[name], value + scale * second @ first, atol=1e-6, rtol=0)
        assert not torch.equal(merged[name], value)
        changed += 1
    assert objective.config.adapter is not None
    assert changed == 2 * len(objective.config.adapter.targets)
    assert not alone


@pytest.mark.parametrize("form", ["llama", "transformers"])
def test_transformers_and_peft_load_the_adapter_onto_the_base(tmp_path: Path, form: Any) -> None:
    from peft import PeftModel
    from transformers import Emu3ForCausalLM, LlamaForCausalLM

    objective = make(tmp_path, {"rslora": True})
    weights = run(objective, tmp_path / "run")
    export_language_model(tmp_path / "base", load_language_model(begin(objective)), form)
    network = {"llama": LlamaForCausalLM, "transformers": Emu3ForCausalLM}[form]
    base = network.from_pretrained(tmp_path / "base").eval()
    with torch.no_grad():
        untrained = base(TOKENS).logits
        theirs = PeftModel.from_pretrained(base, weights / ADAPTER_FOLDER).eval()
        found = theirs(TOKENS).logits
    ours = logits(load_language_model(weights).transformer)
    torch.testing.assert_close(found, ours, atol=1e-5, rtol=0)
    assert float((untrained - ours).abs().max()) > 0.1


@pytest.mark.parametrize("recompute", ["nothing", "full"])
def test_dropout_acts_on_what_goes_into_the_adapter_and_in_training_alone(tmp_path: Path, recompute: str) -> None:
    spread: dict[float, float] = {}
    for rate in (0.0, 0.5):
        objective = make(tmp_path, {"dropout": rate}, execution={"layout": {"recompute": recompute}})
        model = built(objective)
        take_steps(objective, model, 10)
        found = []
        for seed in range(3):
            torch.manual_seed(seed)
            with torch.no_grad():
                found.append(model.train()(TOKENS))
        spread[rate] = float(torch.stack(found).std(dim=0).max())
        assert torch.equal(logits(model), logits(model))
    assert spread[0.0] == 0
    assert spread[0.5] > 0.01


@dataclasses.dataclass(frozen=True)
class Interrupted(PretrainObjective):
    """Fails once it has done some steps."""

    after: int = 0

    def finish_step(self, model, step, device, state) -> None:  # type: ignore[no-untyped-def]
        if step + 1 == self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [2, 7])  # before and after the first checkpoint
def test_an_interrupted_training_ends_with_the_same_bits(tmp_path: Path, after: int) -> None:
    objective = make(tmp_path, {"dropout": 0.3}, model={"dropout": 0.1})
    whole, parts = run(objective, tmp_path / "whole"), tmp_path / "parts"
    fields = {field.name: getattr(objective, field.name) for field in dataclasses.fields(objective)}
    with pytest.raises(KeyboardInterrupt):
        run(Interrupted(**fields, after=after), parts)
    resumed = run(objective, parts)
    for file in ("model.safetensors", f"{ADAPTER_FOLDER}/{ADAPTER_FILE}"):
        assert (whole / file).read_bytes() == (resumed / file).read_bytes()
    first, second = (json.loads((folder / "result.json").read_text()) for folder in (tmp_path / "whole", parts))
    assert first == second


def test_a_checkpoint_holds_the_adapter_and_nothing_of_the_base(tmp_path: Path) -> None:
    objective = make(tmp_path)
    run(objective, tmp_path / "run")
    newest = latest(TrainingFolder(tmp_path / "run").checkpoints)
    assert newest is not None
    entries = FileSystemReader(newest[1]).read_metadata().state_dict_metadata
    stored = {key.removeprefix("model.") for key in entries if key.startswith("model.")}
    trained = {name for name, value in built(objective).named_parameters() if value.requires_grad}
    assert stored == trained
    moments = {key for key in entries if key.startswith("optimizer.state.") and key.endswith(".exp_avg")}
    assert len(moments) == len(trained)


def dpo(folder: Path, reference: str, **changes: Any) -> DpoObjective:
    config = dpo_config(adapter=ADAPTER, reference=reference, optim=DPO_OPTIM, **changes)
    return DpoObjective(config, pair_data(folder), start_weights(folder), folder / reference)


def test_the_reference_is_the_model_without_its_adapter(tmp_path: Path) -> None:
    objectives = {name: dpo(tmp_path, name) for name in ("base", "copy", "stored")}
    model, rows = built(objectives["base"]), np.array([7, 2, 5])
    objectives["stored"].start(model, ALONE)
    take_steps(objectives["base"], model, 5)
    found = {name: objective._reference(model, rows, ALONE) for name, objective in objectives.items()}
    for name in ("copy", "stored"):
        torch.testing.assert_close(found["base"], found[name], atol=1e-6, rtol=0)
    policy, _ = objectives["base"]._log_probs(model, rows, ALONE)
    assert float((policy - found["base"]).detach().abs().max()) > 0.1  # and the adapter is on again
    assert all(value.requires_grad for name, value in model.named_parameters() if "lora_" in name)


def test_preferences_are_learnt_alike_with_every_reference(tmp_path: Path) -> None:
    made = {}
    for name in ("base", "copy", "stored"):
        objective = dpo(tmp_path, name, steps=12, execution={"log_every": 1})
        identity = training_identity("dpo", objective.config, "data", "sha", objective.begin.digest)
        run_loop(objective, identity, objective.storage)
        made[name] = load_file(TrainingFolder(objective.storage).weights / "model.safetensors")
        first, *_, last = read_losses(objective.storage / "progress.jsonl")
        assert abs(first["margin"]) < 1e-4
        assert last["margin"] > 0.1
    for name in ("copy", "stored"):
        worst = max(float((made[name][key] - value).abs().max()) for key, value in made["base"].items())
        assert worst <= 2e-5, f"{name} differs by {worst}"


@pytest.mark.parametrize("make", ["pretrain", "dpo"])
def test_what_is_recomputed_is_exported_too(tmp_path: Path, make: str) -> None:
    start = start_weights(tmp_path)
    made = {}
    for recompute in ("nothing", "selective", "full"):
        execution = {"layout": {"recompute": recompute}}
        storage = tmp_path / recompute
        objective: Objective
        if make == "pretrain":
            config = pretrain_config(adapter=ADAPTER, execution=execution)
            objective = PretrainObjective(config, sequence_data(tmp_path), start.folder)
        else:
            dpo = dpo_config(adapter={**ADAPTER, "dropout": 0.0}, reference="base", execution=execution)
            objective = DpoObjective(dpo, pair_data(tmp_path), start, storage)
        made[recompute] = load_file(run(objective, storage) / "model.safetensors")
        assert (TrainingFolder(storage).weights / ADAPTER_FOLDER / ADAPTER_FILE).exists()
    before = load_file(start.folder / "model.safetensors")
    assert max(float((made["nothing"][name] - weight).abs().max()) for name, weight in before.items()) > 0.01
    for recompute in ("selective", "full"):
        for name, weight in made["nothing"].items():
            torch.testing.assert_close(made[recompute][name], weight, atol=1e-5, rtol=1e-5, msg=f"{recompute} {name}")


def test_an_adapter_beside_fresh_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Give --from CHECKPOINT, or leave out the section adapter"):
        pretrain(pretrain_config(adapter=ADAPTER), sequence_data(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("make_config", "options", "said"),
    [
        (pretrain_config, {"execution": {"num_workers": 2, "layout": {"tensor": 2}}, "model": {"num_kv_heads": 2}},
         "PEFT's layers cannot be split; use layout.shard"),
        (dpo_config, {"execution": {"num_workers": 2, "layout": {"tensor": 2}}}, "cannot be split"),
        (pretrain_config, {"execution": {"layout": {"compute": "bfloat16", "float8": "rowwise"}}},
         "an adapter and layout.float8 'rowwise', expected 'off'"),
        (pretrain_config, {"optim": {"matrices": "muon"}}, "found optim.matrices 'muon' and an adapter"),
        (dpo_config, {"adapter": {"dropout": 0.1}}, "found adapter.dropout 0.1, expected 0"),
        (dpo_config, {"adapter": None, "reference": "base"}, "found reference 'base' and no adapter"),
        (pretrain_config, {"adapter": {"targets": []}}, "at least 1 item"),
        (pretrain_config, {"adapter": {"targets": ["lm_head"]}}, "q_proj"),
    ],
)  # fmt: skip
def test_an_adapter_that_cannot_be_is_refused(make_config: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        make_config(**{"adapter": ADAPTER, **options})


def test_the_same_targets_are_the_same_training_and_no_adapter_is_the_one_from_before() -> None:
    one, other = (
        pretrain_config(adapter={"targets": names}) for names in (["up_proj", "q_proj"], ["q_proj", "up_proj"])
    )
    assert one.canonical_json() == other.canonical_json()
    assert "adapter" not in pretrain_config().model_dump()
    assert pretrain_config().canonical_json() != pretrain_config(adapter={}).canonical_json()


def test_operations_are_those_of_frozen_weights(tmp_path: Path) -> None:
    """A frozen matrix costs one product forward and one backward, a trained one two backward; each is 2 operations a number."""
    config = PretrainConfig.model_validate({"steps": 1, "batch_size": 1, "adapter": ADAPTER, "size": "tiny"})
    architecture, lengths = config.transformer_config(1000), np.array([7, 5])
    model = Transformer(architecture)
    objective = make(tmp_path)
    assert adapter_of(built(objective)) is not None
    frozen = sum(
        weight.numel() for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name
    )
    added = sum(
        4 * sum(module.weight.shape) for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "layers" in name
    )  # fmt: skip
    plain, with_adapter = (transformer_flops(architecture, lengths, adapter) for adapter in (None, config.adapter))
    assert plain - with_adapter == pytest.approx(12 * (2 * frozen - 6 * added))
