import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train.language
from model.attention import plan_attention
from model.rope import rotary_tables
from model.transformer import TRANSFORMER_SIZES, DecoderLayer, Transformer, TransformerConfig
from schemas.errors import ConfigError
from tests.train.small_data import pretrain_config, sequence_data
from tests.train.small_runs import process_group, run_workers
from train.batches import batch_indices
from train.gpus import GIB, GPUS, gpu_named
from train.head_loss import HeadLossConfig
from train.loop import _train_step
from train.mesh import LayoutConfig, Mesh, build_mesh
from train.optim import NetworkUpdate
from train.planner import (
    Workload,
    check_memory,
    kept_by_layer,
    layer_parameters,
    num_parameters,
    plan_memory,
)
from train.pretrain import PretrainObjective
from train.sharding import _selective_contexts
from train.step_time import EFFICIENCY, expected_step

MIB = 1 << 20
PUBLISHED = TRANSFORMER_SIZES["8b"]
HEAD_DIM = 8


def load_of(
    layout: dict[str, Any], num_workers: int = 8, rows: int = 1, row_len: int = 5120, chunk_tokens: int = 1024
) -> Workload:
    """The published model, all rows of a worker at once."""
    options = LayoutConfig.model_validate(layout)
    return Workload(PUBLISHED, options, HeadLossConfig(chunk_tokens=chunk_tokens), num_workers, rows, rows, row_len)


def row(load: Workload, name: str) -> float:
    [found] = [line.num_bytes for line in plan_memory(load).rows if line.name == name]
    return found


architectures = st.builds(
    lambda hidden, keys, group, inner, layers, vocabulary: TransformerConfig(
        vocab_size=vocabulary,
        hidden_size=8 * hidden,
        intermediate_size=8 * inner,
        num_layers=layers,
        num_heads=keys * group,
        num_kv_heads=keys,
        head_dim=HEAD_DIM,
        dropout=0.0,
    ),
    *(st.integers(2, 12), st.integers(1, 3), st.integers(1, 4), st.integers(2, 30), st.integers(1, 4)),
    st.integers(1, 90),
)


@given(architectures)
def test_parameters_are_those_of_the_network(architecture: TransformerConfig) -> None:
    with torch.device("meta"):
        model = Transformer(architecture)
    assert num_parameters(architecture) == sum(weight.numel() for weight in model.parameters())
    assert layer_parameters(architecture) == sum(weight.numel() for weight in model.model.layers[0].parameters())


def test_the_published_model_takes_what_arithmetic_says() -> None:
    assert num_parameters(PUBLISHED) == 8_492_011_520
    assert row(load_of({}), "weights, gradients, moments") / GIB == pytest.approx(126.5, abs=0.05)
    assert row(load_of({"shard": 8}), "weights, gradients, moments") / GIB == pytest.approx(15.8, abs=0.05)
    assert row(load_of({"shard": 8, "context": 8}, 64), "weights, gradients, moments") / GIB == pytest.approx(
        1.98, abs=0.005
    )
    bfloat16 = load_of({"shard": 8, "compute": "bfloat16"})
    assert 2 * layer_parameters(PUBLISHED) / MIB == pytest.approx(416, abs=0.5)
    assert row(bfloat16, "head and last norm, gathered") / GIB == pytest.approx(1.41, abs=0.005)
    assert row(bfloat16, "gradient of the head") / GIB == pytest.approx(2.82, abs=0.005)


@pytest.mark.parametrize(("context", "stored_gib"), [(1, 32.0), (2, 16.0), (4, 8.0), (8, 4.0)])
def test_a_long_row_takes_what_arithmetic_says(context: int, stored_gib: float) -> None:
    layout = {"shard": 8 // context, "context": context, "compute": "bfloat16", "recompute": "full"}
    load = load_of(layout, row_len=131_072)
    assert row(load, "activations of 32 layers") / GIB == stored_gib
    assert row(load, "weights, gradients, moments") / GIB == pytest.approx(15.8, abs=0.05)
    if context == 8:  # half a GiB of keys and values for a whole row, an eighth of it a worker's own
        assert row(load, "keys and values of others") / GIB == 0.5 * 7 / 8


class Storages(TorchDispatchMode):
    """Bytes of all tensors that are alive, and the most there ever were."""

    def __init__(self, held: list[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        self._found: dict[int, StorageWeakRef] = {}
        self._see(held)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = len(self._found)
        self._see((out, args))
        if len(self._found) > known:
            self.most = max(self.most, self.alive())
        return out

    def _see(self, tree: Any) -> None:
        for tensor in tree_leaves(tree):
            if isinstance(tensor, torch.Tensor):
                storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
                self._found.setdefault(storage._cdata, StorageWeakRef(storage))

    def alive(self) -> int:
        self._found = {key: found for key, found in self._found.items() if not found.expired()}
        # Asked of the storage each time: FSDP2 empties and refills the same ones.
        storages = [torch.UntypedStorage._new_with_weak_ptr(found.cdata) for found in self._found.values()]
        return sum(storage.nbytes() for storage in storages if storage is not None)


def bytes_kept(layer: nn.Module, architecture: TransformerConfig, recompute: str, lengths: list[int]) -> float:
    """Bytes a token that a layer keeps for the backward pass of documents of these lengths."""
    if recompute != "nothing":
        how: dict[str, Any] = {} if recompute == "full" else {"context_fn": _selective_contexts}
        layer = checkpoint_wrapper(layer, **how)
    num_tokens, dtype = sum(lengths), next(layer.parameters()).dtype
    rotary = rotary_tables(torch.arange(num_tokens).unsqueeze(0), architecture.head_dim, 1e4)
    x_BLD = torch.randn(1, num_tokens, architecture.hidden_size, dtype=dtype, requires_grad=True)
    weights = sum(weight.nbytes for weight in layer.parameters())
    documents_BL = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).unsqueeze(0)
    plan = plan_attention(documents_BL, None)
    with Storages([]) as storages:
        out_BLD = layer(x_BLD * 1, rotary, plan)
        return (storages.alive() - sum(part.nbytes for part in (x_BLD, out_BLD, *rotary)) - weights) / num_tokens


@settings(max_examples=12, deadline=None)
@given(
    architecture=architectures,
    is_bfloat16=st.booleans(),
    recompute=st.sampled_from(["nothing", "selective", "full"]),
    lengths=st.lists(st.integers(5, 60), min_size=2, max_size=4),
)
def test_a_layer_keeps_what_the_plan_says(
    architecture: TransformerConfig, is_bfloat16: bool, recompute: str, lengths: list[int]
) -> None:
    dtype = torch.bfloat16 if is_bfloat16 else torch.float32
    layer = DecoderLayer(architecture, 0).to(dtype)
    kept = bytes_kept(layer, architecture, recompute, lengths)
    layout = LayoutConfig.model_validate({"recompute": recompute, "compute": str(dtype).removeprefix("torch.")})
    load = replace(load_of({}), architecture=architecture, layout=layout)
    assert kept == pytest.approx(kept_by_layer(load), rel=0.1)


STEP_MODEL = {
    "hidden_size": 64,
    "intermediate_size": 224,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
}


def _step_holds_as_planned(rank: int, folder: Path, num_workers: int, layouts: list[dict[str, Any]]) -> None:
    """Two goes of six rows in a step: the most that was alive in it is what the plan says, less the reserve."""
    mine = folder / f"data-{rank}"
    mine.mkdir()
    data, rows = sequence_data(mine), batch_indices(0, 0, 12, 12)
    for layout in layouts:
        execution = {"num_workers": num_workers, "layout": layout, "rows_at_once": 6}
        config = pretrain_config(batch_size=12, model=STEP_MODEL, execution=execution)
        objective, mesh = PretrainObjective(config, data), build_mesh(config.execution.layout, torch.device("cpu"))
        model = objective.build_model(mesh).train()
        update = NetworkUpdate(model, config.optim)
        _train_step(objective, model, [update], 0, rows, mesh, {})  # from then on there are moments
        held = [value for one in update.optimizers for kept in one.state.values() for value in kept.values()]
        with Storages(held) as storages:
            _train_step(objective, model, [update], 1, rows, mesh, {})
        load = config.workload(data.vocabulary.size, data.context_len)
        planned = plan_memory(load).peak - row(load, "reserve")
        assert storages.most == pytest.approx(planned, rel=0.1), layout


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_a_step_holds_what_the_plan_says(compute: str) -> None:
    layouts = [{"recompute": how, "compute": compute} for how in ("nothing", "selective", "full")]
    with tempfile.TemporaryDirectory() as name, process_group(0, 1, Path(name)):  # tmp_path may have too long a name
        _step_holds_as_planned(0, Path(name), 1, layouts)


@pytest.mark.slow
def test_a_step_of_a_tensor_group_holds_what_the_plan_says() -> None:
    layouts = [{"tensor": 2, "recompute": how} for how in ("nothing", "selective", "full")]
    with tempfile.TemporaryDirectory() as name:
        run_workers(2, Path(name), _step_holds_as_planned, 2, layouts)


def test_the_figures_of_a_step_are_those_of_paper_and_pencil() -> None:
    """Rows of 5,120 take 50.4 GFLOP a token, of 131,072 149.5; 989 TFLOP/s are 19,608 and 6,616 tokens a second."""
    for row_len, at_peak in ((5120, 19_608), (131_072, 6616)):
        load = load_of({"shard": 8, "compute": "bfloat16"}, row_len=row_len)
        step = expected_step(load, GPUS["h100"])
        per_worker = step.tokens / 8 / step.compute_s
        assert per_worker == pytest.approx(at_peak * EFFICIENCY, rel=1e-3)
        assert step.mfu == pytest.approx(EFFICIENCY * step.compute_s / step.step_s)
        assert step.days_per_trillion_tokens == pytest.approx(1e12 / (step.tokens_per_s_per_gpu * 8) / 86_400)


def test_recomputing_everything_costs_a_forward_pass_that_mfu_does_not_count() -> None:
    kept, again = (
        expected_step(load_of({"shard": 8, "compute": "bfloat16", "recompute": how}), GPUS["h100"])
        for how in ("nothing", "full")
    )
    # The head, 4.54 of 50.4 GFLOP, is not worked out again; 45.9 are by a third.
    assert again.compute_s / kept.compute_s == pytest.approx((50.44 + 45.90 / 3) / 50.44, rel=1e-3)
    assert again.mfu < kept.mfu


def test_float8_halves_the_products_of_layers_where_the_gpu_has_it() -> None:
    layout = {"shard": 8, "compute": "bfloat16"}
    plain, halved = (expected_step(load_of({**layout, "float8": kind}), GPUS["h100"]) for kind in ("off", "tensorwise"))
    # 218.1 million numbers in the matrices of each of 32 layers, 6 operations for each: 41.88 of 50.44 GFLOP.
    assert halved.compute_s / plain.compute_s == pytest.approx((50.44 - 41.88 * (1 - 989 / 1979)) / 50.44, rel=1e-3)
    with pytest.raises(ConfigError, match="the GPU a100, which multiplies none: set it to 'off'"):
        expected_step(load_of({**layout, "float8": "rowwise"}), GPUS["a100"])


def test_short_documents_cost_less() -> None:
    load = load_of({"shard": 8, "compute": "bfloat16"}, row_len=131_072)
    whole, parts = (expected_step(load, GPUS["h100"], length) for length in (None, 5120))
    assert parts.compute_s / whole.compute_s == pytest.approx(50.4 / 149.5, rel=5e-3)


def test_what_goes_over_links_is_counted_by_hand() -> None:
    """A step of one row: bfloat16 weights for both passes and float32 gradients are 8 bytes a parameter, of which an eighth
    is a worker's own.
    """
    inside = expected_step(load_of({"shard": 8, "compute": "bfloat16"}), GPUS["h100"])
    assert inside.links_s == pytest.approx(8_492_011_520 * 8 * 7 / 8 / 450e9)
    across = expected_step(load_of({"shard": 64, "compute": "bfloat16"}, 64), GPUS["h100"])
    assert across.links_s == pytest.approx(8_492_011_520 * 8 * 63 / 64 / 50e9)
    replicas = expected_step(load_of({"shard": 8, "compute": "bfloat16"}, 64), GPUS["h100"])
    assert replicas.links_s - inside.links_s == pytest.approx(8_492_011_520 / 8 * 8 * 7 / 8 / 50e9)
    # Of half a GiB of keys and values a layer, an eighth is a worker's own; both passes send it.
    layout = {"context": 8, "compute": "bfloat16"}
    context = expected_step(load_of(layout, row_len=131_072), GPUS["h100"])
    assert context.links_s - inside.links_s == pytest.approx(32 * 2 * 0.5 * GIB * 7 / 8 / 450e9)
    tensor = expected_step(load_of({"tensor": 8, "compute": "bfloat16"}), GPUS["h100"])
    # Four times a layer and pass, half of the hidden states of 5,120 tokens of 4,096 numbers; weights stay where they are.
    assert tensor.links_s == pytest.approx(32 * 2 * 4 * 5120 * 4096 * 2 * 7 / 8 / 450e9)


@pytest.mark.parametrize("change", [{"shard": 16}, {"tensor": 2}, {"context": 2}, {"recompute": "full"}])
def test_what_is_said_to_help_helps(change: dict[str, Any]) -> None:
    layout = {"shard": 8, "compute": "bfloat16"}
    before, after = load_of(layout, 32, 4), load_of({**layout, **change}, 32, 4)
    assert plan_memory(after).peak < plan_memory(before).peak


def test_a_training_that_cannot_fit_is_refused_with_what_to_change() -> None:
    load = load_of({"shard": 8, "compute": "bfloat16"}, rows=4)
    with pytest.raises(ConfigError) as refused:
        check_memory(load, 79.6 * GIB, "the GPU 'h100'")
    said = str(refused.value)
    assert "activations of 32 layers" in said
    assert "79.60 GiB, which the GPU 'h100' has" in said
    for change in ("layout.shard to 16", "layout.recompute to 'full'", "rows_at_once to 1"):
        assert change in said
    smaller = replace(load, rows_at_once=1, layout=load.layout.model_copy(update={"recompute": "full"}))
    check_memory(smaller, 79.6 * GIB, "the GPU 'h100'")


def test_large_chunks_of_logits_are_named() -> None:
    load = load_of({"shard": 8, "compute": "bfloat16", "recompute": "full"}, rows=8, chunk_tokens=40_960)
    with pytest.raises(ConfigError, match=r"logits of a chunk.*head_loss.chunk_tokens to 256"):
        check_memory(load, 79.6 * GIB, "the GPU 'h100'")


def test_a_worker_looks_at_its_gpu_before_it_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = PretrainObjective(pretrain_config(), sequence_data(tmp_path))
    mesh = Mesh(LayoutConfig(), torch.device("cuda", 3))
    monkeypatch.setattr(train.language, "gpu_memory", lambda device: 2 * GIB)
    monkeypatch.setattr(train.language, "Transformer", None)  # calling it would be another error
    with pytest.raises(ConfigError, match=r"expected at most 2.00 GiB, which the GPU cuda:3 has"):
        objective.build_model(mesh)


def test_an_unknown_gpu_is_refused() -> None:
    assert gpu_named("cpu") is None
    with pytest.raises(ConfigError, match="expected one of h100, h200, a100, or cpu"):
        gpu_named("k80")
