import itertools
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._functorch.config as functorch_config
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file

from model.attention import AttentionPlan, SelfAttention, plan_attention
from model.rope import rotary_tables, rotate
from model.transformer import TransformerConfig
from model.weights import digest
from tests.train.small_data import TINY_MODEL, dpo_config, pair_data, pretrain_config, sequence_data, start_weights
from tests.train.small_runs import run, run_workers
from train.batches import SequenceData, write_sequence_file
from train.language import Start, build_transformer
from train.mesh import LayoutConfig, Mesh, _shared_rows
from train.preference import DpoObjective
from train.pretrain import PretrainObjective
from train.progress import read_losses

STEPS = 20
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "shard": {"shard": 2},
        "context": {"context": 2},
        "tensor": {"tensor": 2},
        "recomputed": {"shard": 2, "recompute": "full"},
        "selective": {"shard": 2, "recompute": "selective"},
        "context-selective": {"context": 2, "recompute": "selective"},
    },
    4: {
        "shard-tensor": {"shard": 2, "tensor": 2},
        "replicas": {"shard": 2},
        "shard-context": {"shard": 2, "context": 2},
        "context-tensor": {"context": 2, "tensor": 2},
        "context-4": {"context": 4},
    },
}


def _objective(folder: Path, num_workers: int, layout: dict[str, Any]) -> PretrainObjective:
    config = pretrain_config(
        steps=STEPS,
        # Gradients that are only rounding stay small.
        optim={"learning_rate": 0.003, "warmup_steps": 2, "eps": 1e-5},
        model={"num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
        execution={
            "num_workers": num_workers,
            "layout": layout,
            "log_every": 1,
            "checkpoint_every": 5,
            "evaluate_every": 10,
            "held_out_rows": 5,
        },
    )
    data = _rows_of_all_lengths(folder)
    return PretrainObjective(config, data, held_out=sequence_data(folder, seed=1))


def _rows_of_all_lengths(folder: Path) -> SequenceData:
    """Rows of one to nine documents, of lengths that no number of workers divides."""
    folder.mkdir(exist_ok=True)
    data, rng = sequence_data(folder), np.random.default_rng(5)
    rows, segments = [], []
    for _ in range(9):
        cuts = np.unique(rng.integers(1, 61, rng.integers(1, 10)))
        edges = [0, *cuts.tolist(), 61]
        rows.append(rng.integers(0, data.vocabulary.size, 61).astype(np.uint32))
        segments.append(
            [
                {"kind": "image", "item_id": str(start), "offset": start, "length": end - start}
                for start, end in itertools.pairwise(edges)
            ]
        )
    write_sequence_file(data.path, rows, segments)
    return data


def _train_in_layouts(rank: int, folder: Path, world: int) -> None:
    for layout, options in LAYOUTS[world].items():
        run(_objective(folder / f"data-{rank}", world, options), folder / layout)
    for giver, (layout, options) in zip([*LAYOUTS[world]][1:], LAYOUTS[world].items(), strict=False):
        if rank == 0:
            _hand_on(folder / giver, folder / f"{giver} to {layout}")
        dist.barrier()
        run(_objective(folder / f"data-{rank}", world, options), folder / f"{giver} to {layout}")


def _preferences(folder: Path, place: Path, num_workers: int, layout: dict[str, Any], name: str) -> DpoObjective:
    place.mkdir(exist_ok=True)
    execution = {"num_workers": num_workers, "layout": layout, "log_every": 1, "checkpoint_every": 3}
    # As far from the reference as rounding does not decide what is preferred.
    config = dpo_config(execution=execution, optim={"learning_rate": 0.002, "warmup_steps": 2, "eps": 1e-5})
    start = Start(folder / "start", digest(folder / "start"))
    return DpoObjective(config, pair_data(place), start, folder / name, sequence_data(place, seed=1))


def _train_preferences(rank: int, folder: Path) -> None:
    for name, layout in {"shard": {"shard": 2}, "tensor": {"tensor": 2}}.items():
        run(_preferences(folder, folder / f"data-{rank}", 2, layout, name), folder / name)


def test_preferences_are_learnt_alike_in_every_layout() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start_weights(folder, num_heads=4, num_kv_heads=2, head_dim=8)
        run(_preferences(folder, folder / "data", 1, {}, "alone"), folder / "alone")
        run_workers(2, folder, _train_preferences)
        for layout in ("shard", "tensor"):
            _assert_same_training(folder / "alone", folder / layout, 8, abs_error=1e-5)


ROUNDED: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "tensorwise": {"float8": "tensorwise"},
    "rowwise": {"float8": "rowwise", "recompute": "selective"},
}


def _train_rounded(rank: int, folder: Path) -> None:
    for name, options in ROUNDED.items():
        layout = {"shard": 2, "compute": "bfloat16", **options}
        run(_objective(folder / f"data-{rank}", 2, layout), folder / name)


def test_computing_in_fewer_bits_keeps_float32_weights() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(_objective(folder / "data", 1, {}), folder / "alone")
        run_workers(2, folder, _train_rounded)
        exact, *rounded = (
            [line["loss"] for line in read_losses(folder / name / "progress.jsonl")] for name in ("alone", *ROUNDED)
        )
        names = load_file(folder / "alone" / "weights" / "model.safetensors").keys()
        for name, losses, error in zip(ROUNDED, rounded, (0.001, 0.003, 0.003), strict=True):
            assert losses == pytest.approx(exact, rel=error)
            weights = load_file(folder / name / "weights" / "model.safetensors")
            assert weights.keys() == names
            assert {value.dtype for value in weights.values()} == {torch.float32}
            # Updates far smaller than bfloat16 could hold arrived.
            assert any(not torch.equal(value, value.bfloat16().float()) for value in weights.values())
        assert len({tuple(losses) for losses in (exact, *rounded)}) == 4


def _hand_on(giver: Path, taker: Path) -> None:
    """The newest checkpoint of a training as all that another one has."""
    shutil.copytree(giver / "checkpoints" / "step_00000015", taker / "checkpoints" / "step_00000015")


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_every_layout_takes_the_steps_of_one_worker(world: int) -> None:
    with tempfile.TemporaryDirectory() as name:  # not tmp_path, whose name may be too long for the children
        folder = Path(name)
        alone = run(_objective(folder / "data", 1, {}), folder / "alone")
        run_workers(world, folder, _train_in_layouts, world)
        takers = [f"{giver} to {taker}" for giver, taker in zip([*LAYOUTS[world]][1:], LAYOUTS[world], strict=False)]
        for layout in LAYOUTS[world]:
            takers.append(f"{layout} to alone")
            _hand_on(folder / layout, folder / takers[-1])
            run(_objective(folder / "data", 1, {}), folder / takers[-1])
        for name in (*LAYOUTS[world], *takers):
            _assert_same_training(folder / "alone", folder / name, STEPS if name in LAYOUTS[world] else 5)
            found = load_file(folder / name / "weights" / "model.safetensors")
            for key, value in alone.items():
                assert float((found[key] - value).abs().max()) <= 1e-5, f"{name}: {key}"


def _assert_same_training(expected: Path, found: Path, num_steps: int, abs_error: float = 0.0) -> None:
    mine, theirs = (read_losses(folder / "progress.jsonl") for folder in (expected, found))
    assert len(theirs) == num_steps
    for right, line in zip(mine[-num_steps:], theirs, strict=True):
        assert right.keys() == line.keys()
        for figure in right:
            near = pytest.approx(right[figure], rel=1e-5, abs=abs_error)
            assert line[figure] == near, f"{found.name}: {figure} of {right['step']}"


CONFIG = TransformerConfig(
    vocab_size=8,
    hidden_size=16,
    intermediate_size=8,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    dropout=0.0,
)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=7), min_size=1, max_size=2),
    num_workers=st.integers(2, 4),
)
def test_rows_dealt_out_attend_as_whole_ones_do(lengths: list[list[int]], num_workers: int) -> None:
    longest = max(sum(row) for row in lengths)
    length = 2 * num_workers * -(-longest // (2 * num_workers))
    documents_BL = torch.full((len(lengths), length), 99)
    for row, sizes in enumerate(lengths):
        documents_BL[row, : sum(sizes)] = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    torch.manual_seed(0)
    attention = SelfAttention(CONFIG, 0)
    x_BLD = torch.randn(len(lengths), length, CONFIG.hidden_size, requires_grad=True)
    wanted_BLD = torch.randn_like(x_BLD)
    cos, sin = rotary_tables(torch.arange(length).expand(len(lengths), length), CONFIG.head_dim, 100.0)
    whole_BLD = attention(x_BLD, (cos, sin), plan_attention(documents_BL, None), None)
    [whole_grad] = torch.autograd.grad((whole_BLD * wanted_BLD).sum(), x_BLD)
    keys = {
        name: torch.unflatten(layer(x_BLD), -1, (-1, CONFIG.head_dim))
        for name, layer in (("key", attention.k_proj), ("value", attention.v_proj))
    }
    total = torch.zeros(())
    for worker in range(num_workers):
        part = length // (2 * num_workers)
        parts = [range(index * part, (index + 1) * part) for index in (worker, 2 * num_workers - 1 - worker)]
        places = torch.tensor([place for one in parts for place in one])
        given_out = iter((rotate(keys["key"], cos, sin), keys["value"]))
        plan = AttentionPlan(shared=_shared_rows(documents_BL, parts, partial(next, given_out)))
        mine_BSD = attention(x_BLD[:, places], (cos[:, places], sin[:, places]), plan, None)
        torch.testing.assert_close(mine_BSD, whole_BLD[:, places], atol=1e-6, rtol=1e-5)
        total = total + (mine_BSD * wanted_BLD[:, places]).sum()
    [grad] = torch.autograd.grad(total, x_BLD)
    torch.testing.assert_close(grad, whole_grad, atol=1e-5, rtol=1e-5)


@given(st.integers(1, 300), st.integers(1, 4), st.integers(1, 4))
def test_rows_are_padded_so_that_all_workers_have_as_much(context_len: int, context: int, tensor: int) -> None:
    length = LayoutConfig(context=context, tensor=tensor).row_length(context_len)
    pieces = 2 * context if context > 1 else 1
    assert length >= context_len
    assert length % pieces == 0
    assert length // context % tensor == 0
    assert length - context_len < pieces * tensor


@given(st.integers(1, 300), st.integers(1, 4), st.integers(1, 5))
def test_float8_multiplies_as_many_tokens_as_its_kernels_know(context_len: int, context: int, rows: int) -> None:
    layout = LayoutConfig(context=context, compute="bfloat16", float8="rowwise")
    length = layout.row_length(context_len)
    assert length >= context_len
    assert rows * length // context % 16 == 0
    assert length - context_len < 32 * context


def test_a_gpu_multiplies_float8_of_such_numbers_alone() -> None:
    """Torch's own checks of shapes, on the meta device."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    for kind in ("tensorwise", "rowwise"):
        with torch.device("meta"):
            layer = torch.nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)
            rows, others = (torch.zeros(size, 64, dtype=torch.bfloat16, requires_grad=True) for size in (64, 61))
        layer = convert_to_float8_training(layer, config=Float8LinearConfig.from_recipe_name(kind))
        layer(rows).sum().backward()
        with pytest.raises(RuntimeError, match="divisible by 16"):
            layer(others).sum().backward()


@pytest.mark.parametrize("recompute", ["nothing", "selective", "full"])
def test_layers_are_compiled_whatever_is_recomputed(recompute: str) -> None:
    config = pretrain_config().transformer_config(300)
    tokens, documents = torch.arange(64).view(1, 64), torch.arange(64).div(20, rounding_mode="floor").view(1, 64)
    gradients = []
    torch._dynamo.reset()
    with functorch_config.patch(aggressive_recomputation=False):  # put back as it was at the end
        for is_compiled in (False, True):
            torch._dynamo.utils.counters.clear()
            layout = LayoutConfig.model_validate({"compile": is_compiled, "recompute": recompute})
            torch.manual_seed(0)
            model = build_transformer(config, Mesh(layout, torch.device("cpu")), None, pad_token=0).train()
            model.hidden(tokens, document_ids_BL=documents).square().sum().backward()
            names = [name.replace("_checkpoint_wrapped_module.", "") for name, _ in model.named_parameters()]
            gradients.append(dict(zip(names, [weight.grad for weight in model.parameters()], strict=True)))
            assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == is_compiled
        assert functorch_config.aggressive_recomputation == (recompute == "selective")
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, atol=1e-3, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    ("workers", "layout", "more", "said"),
    [
        (3, {"shard": 2}, {}, "multiple of shard x context x tensor = 2"),
        (4, {"shard": 4}, {"batch_size": 6}, "as many rows for each worker that reads its own: 4 do"),
        (2, {"tensor": 2}, {}, "multiples of layout.tensor 2"),
        (
            1,
            {"float8": "rowwise"},
            {},
            "found float8 'rowwise' with compute 'float32' and tensor 1, expected 'bfloat16'",
        ),
        (2, {"shard": 2}, {"optim": {"matrices": "muon"}}, "Muon needs whole matrices"),
        (2, {"tensor": 2}, {"execution": {"head_loss": {"kind": "whole"}}}, "expected 'chunked'"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(
    workers: int, layout: dict[str, Any], more: dict[str, Any], said: str
) -> None:
    execution = {"num_workers": workers, "layout": layout, **more.get("execution", {})}
    with pytest.raises(ValidationError, match=said):
        pretrain_config(**{**more, "execution": execution}, model=TINY_MODEL)


def test_muon_and_a_layout_are_refused_for_preferences_too() -> None:
    execution = {"num_workers": 2, "layout": {"shard": 2}}
    assert dpo_config(execution=execution).optim.matrices == "adamw"
    with pytest.raises(ValidationError, match="Muon needs whole matrices"):
        dpo_config(execution=execution, optim={"matrices": "muon"})
