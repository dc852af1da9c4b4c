"""The plan of a training with an adapter: parameters, what layers and whole steps really keep, and the time of a step."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.transformer import Transformer, TransformerConfig
from tests.train.small_data import pretrain_config, sequence_data, start_weights
from tests.train.small_runs import process_group
from tests.train.test_planner import PUBLISHED, STEP_MODEL, Storages, architectures, bytes_kept, load_of, row
from train.adapter import AdapterConfig, adapter_parameters, add_adapter, projection_sizes
from train.batches import batch_indices
from train.gpus import GIB, GPUS
from train.loop import _train_step
from train.mesh import LayoutConfig, build_mesh
from train.optim import NetworkUpdate
from train.planner import kept_by_layer, num_parameters, num_trained, plan_memory
from train.pretrain import PretrainObjective
from train.step_time import EFFICIENCY, expected_step

ONE_GPU = {"compute": "bfloat16", "recompute": "full"}
adapters = st.builds(
    lambda rank, targets, dropout: AdapterConfig(rank=rank, targets=tuple(targets), dropout=dropout),
    st.integers(1, 20),
    st.sets(st.sampled_from(AdapterConfig().targets), min_size=1),
    st.sampled_from([0.0, 0.2]),
)


def with_adapter(architecture: TransformerConfig, adapter: AdapterConfig, dtype: torch.dtype) -> Transformer:
    """A transformer on the meta device, its own weights frozen."""
    with torch.device("meta"):
        model = Transformer(architecture)
    add_adapter(model, adapter, [], dtype)
    return model


@settings(max_examples=20, deadline=None)
@given(architectures, adapters)
def test_parameters_are_those_of_peft(architecture: TransformerConfig, adapter: AdapterConfig) -> None:
    model = with_adapter(architecture, adapter, torch.bfloat16)
    load = replace(load_of({"compute": "bfloat16"}, 1), architecture=architecture, adapter=adapter)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    frozen = [weight for weight in model.parameters() if not weight.requires_grad]
    assert num_trained(load) == sum(weight.numel() for weight in trained)
    assert num_parameters(architecture) == sum(weight.numel() for weight in frozen)
    # A weight, its gradient and two moments of AdamW in float32; frozen ones as they are.
    assert row(load, "weights, gradients, moments") == 4 * sum(weight.nbytes for weight in trained)
    assert row(load, "frozen weights") == sum(weight.nbytes for weight in frozen)


def test_the_published_model_takes_what_arithmetic_says() -> None:
    load = replace(load_of(ONE_GPU, 1), adapter=AdapterConfig(rank=16))
    # Of a layer: q 4096 + 4096, k and v 4096 + 1024 each, o 4096 + 4096, gate, up and down 4096 + 14336 each, times the rank.
    assert adapter_parameters(PUBLISHED, AdapterConfig(rank=16)) == 16 * (2 * 8192 + 2 * 5120 + 3 * 18_432)
    assert num_trained(load) == 41_943_040
    assert row(load, "frozen weights") / GIB == pytest.approx(15.8, abs=0.05)
    assert row(load, "weights, gradients, moments") / GIB == 0.625
    names = {line.name for line in plan_memory(load).rows}
    assert not names & {"gradient of the head", "gradient of the head, kept", "embedding and head hand over"}
    shards = replace(load_of({"shard": 8, **ONE_GPU}, 8), adapter=AdapterConfig(rank=16))
    assert row(shards, "frozen weights") == row(load, "frozen weights") / 8


@settings(max_examples=15, deadline=None)
@given(
    architecture=architectures,
    adapter=adapters,
    is_bfloat16=st.booleans(),
    recompute=st.sampled_from(["nothing", "selective", "full"]),
    lengths=st.lists(st.integers(5, 60), min_size=2, max_size=4),
)
def test_a_layer_keeps_what_the_plan_says(
    architecture: TransformerConfig, adapter: AdapterConfig, is_bfloat16: bool, recompute: str, lengths: list[int]
) -> None:
    dtype = torch.bfloat16 if is_bfloat16 else torch.float32
    # As FSDP2 hands it to the layer: the adapter as well in the dtype that is computed in.
    model = with_adapter(architecture, adapter, dtype).to(dtype)
    layer: Any = model.model.layers[0].to_empty(device="cpu").train()
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    kept = bytes_kept(layer, architecture, recompute, lengths)
    layout = LayoutConfig.model_validate({"recompute": recompute, "compute": str(dtype).removeprefix("torch.")})
    load = replace(load_of({}), architecture=architecture, layout=layout, adapter=adapter)
    planned = kept_by_layer(load)
    if adapter.dropout and recompute == "nothing":
        # A GPU keeps a byte of each number that may be dropped, a CPU as many as the number has.
        sizes = projection_sizes(architecture)
        planned += sum(sizes[target][0] for target in adapter.targets) * (load.width - 1)
    assert kept == pytest.approx(planned, rel=0.1)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_a_step_holds_what_the_plan_says(compute: str) -> None:
    """Two goes of six rows in a step: the most that was alive in it is what the plan says, less the reserve."""
    rows = batch_indices(0, 0, 12, 12)
    with tempfile.TemporaryDirectory() as name:  # not tmp_path, whose name may be too long for gloo
        folder = Path(name)
        data, start = sequence_data(folder), start_weights(folder, **STEP_MODEL)
        with process_group(0, 1, folder):
            for recompute in ("nothing", "selective", "full"):
                execution = {"layout": {"recompute": recompute, "compute": compute}, "rows_at_once": 6}
                options: dict[str, Any] = {"model": STEP_MODEL, "execution": execution, "adapter": {"rank": 4}}
                config = pretrain_config(batch_size=12, **options)
                mesh = build_mesh(config.execution.layout, torch.device("cpu"))
                objective = PretrainObjective(config, data, start.folder)
                model = objective.build_model(mesh).train()
                update = NetworkUpdate(model, config.optim)
                _train_step(objective, model, [update], 0, rows, mesh, {})  # from then on there are moments
                held = [value for one in update.optimizers for kept in one.state.values() for value in kept.values()]
                with Storages(held) as storages:
                    _train_step(objective, model, [update], 1, rows, mesh, {})
                plan = plan_memory(config.workload(data.vocabulary.size, data.context_len))
                reserve = sum(line.num_bytes for line in plan.rows if line.name == "reserve")
                assert storages.most == pytest.approx(plan.peak - reserve, rel=0.1), recompute


def test_a_step_takes_what_its_operations_take() -> None:
    """Of 50.44 GFLOP a token of 5,120, 4.03 are attention's, whose backward pass is the same; of 46.42 for weights two thirds
    are left, and three times 2 x 41.9 million for the adapter.
    """
    kept, again = (
        expected_step(
            replace(load_of({"compute": "bfloat16", "recompute": how}, 1), adapter=AdapterConfig()), GPUS["h100"]
        )
        for how in ("nothing", "full")
    )
    gflop = 4.03 + 46.42 * 2 / 3 + 6 * 0.0419
    assert kept.compute_s / 5120 == pytest.approx(gflop / 989_000 / EFFICIENCY, rel=1e-3)
    # The second forward pass of layers, without the head's 4.54.
    assert again.compute_s / kept.compute_s == pytest.approx((gflop + 45.90 / 3) / gflop, rel=1e-3)
    plain = expected_step(load_of({"compute": "bfloat16"}, 1), GPUS["h100"])
    assert kept.memory_s / plain.memory_s == pytest.approx(41_943_040 / 8_492_011_520)


def test_shards_send_frozen_weights_and_no_gradients_of_them() -> None:
    load = replace(load_of({"shard": 8, "compute": "bfloat16"}), adapter=AdapterConfig())
    sent = (8_492_011_520 * 2 * 2 + 41_943_040 * 4) * 7 / 8
    assert expected_step(load, GPUS["h100"]).links_s == pytest.approx(sent / 450e9)
    replicas = replace(load_of({}, 8), adapter=AdapterConfig())
    assert expected_step(replicas, GPUS["h100"]).links_s == pytest.approx(41_943_040 * 8 * 7 / 8 / 450e9)
