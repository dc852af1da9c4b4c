import math
from typing import Literal

import pytest
import torch
from torch import nn

from model.transformer import TRANSFORMER_SIZES, Transformer, TransformerConfig
from schemas.errors import ConfigError
from train.optim import NetworkUpdate, OptimConfig, build_optimizers, learning_rate, set_learning_rate


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_warms_up_then_falls_to_zero_like_torchs_schedules(schedule: Literal["cosine", "linear"]) -> None:
    config = OptimConfig(learning_rate=0.1, warmup_steps=5, schedule=schedule)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.2, total_iters=4)
    after = {
        "cosine": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20),
        "linear": torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=20),
    }[schedule]
    both = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, after], milestones=[5])
    for step in range(25):
        assert learning_rate(config, step, 25) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), step
        optimizer.step()
        both.step()
    assert learning_rate(config, 25, 25) == 0.0


def test_the_last_step_still_learns() -> None:
    assert 0 < learning_rate(OptimConfig(learning_rate=1.0), 99, 100) < 1e-3


def test_matrices_decay_and_norms_do_not() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Conv2d(4, 4, 3))
    (optimizer,) = build_optimizers(model, OptimConfig(weight_decay=0.3))
    decaying, fixed = optimizer.param_groups
    assert decaying["weight_decay"] == 0.3
    assert fixed["weight_decay"] == 0.0
    assert [tuple(p.shape) for p in decaying["params"]] == [(4, 3), (4, 4, 3, 3)]
    assert {tuple(p.shape) for p in fixed["params"]} == {(4,)}


def test_an_update_is_adamws() -> None:
    config = OptimConfig(learning_rate=0.5, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    weight = nn.Parameter(torch.full((1, 1), 2.0))
    model = nn.Module()
    model.weight = weight
    optimizers = build_optimizers(model, config)
    set_learning_rate(optimizers, 0.25)
    weight.grad = torch.full((1, 1), -3.0)
    for optimizer in optimizers:
        optimizer.step()
    expected = 2.0 * (1 - 0.25 * 0.1) + 0.25 * 3.0 / (math.sqrt(9.0) + 1e-8)
    assert weight.item() == pytest.approx(expected, rel=1e-6)


def small_transformer() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(TransformerConfig.model_validate({**TRANSFORMER_SIZES["tiny"].model_dump(), "vocab_size": 99}))
    model.init_weights(0)
    return model


def test_muon_takes_the_matrices_inside_layers_and_nothing_else() -> None:
    model = small_transformer()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    adamw, muon = build_optimizers(model, OptimConfig(matrices="muon"))
    taken = [names[id(p)] for group in muon.param_groups for p in group["params"]]
    left = [names[id(p)] for group in adamw.param_groups for p in group["params"]]
    assert sorted(taken + left) == sorted(names.values())
    layers = len(model.model.layers)
    assert len(taken) == 7 * layers  # four projections of attention, three of the feed-forward
    assert all(".layers." in name and name.endswith("_proj.weight") for name in taken)


def test_an_update_by_muon_has_equal_singular_values_and_the_size_of_adamws() -> None:
    model = small_transformer()
    optimizers = build_optimizers(model, OptimConfig(learning_rate=0.01, weight_decay=0.0, matrices="muon"))
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    before = weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    step = weight.detach() - before
    values = torch.linalg.svdvals(step)
    assert float(values.max() / values.min()) < 3  # five rounds of Newton-Schulz leave them between 0.5 and 1.5
    assert float(step.square().mean().sqrt()) == pytest.approx(0.2 * 0.01, rel=0.3)  # AdamW's usual root mean square


def test_muon_without_a_stack_of_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="no linear layer"):
        build_optimizers(nn.Sequential(nn.Linear(3, 4)), OptimConfig(matrices="muon"))


def test_a_later_option_leaves_old_recipes_their_ids() -> None:
    assert "matrices" not in OptimConfig().model_dump()
    assert OptimConfig(matrices="muon").model_dump()["matrices"] == "muon"


def test_a_constant_rate_warms_up_and_stays() -> None:
    config = OptimConfig(learning_rate=0.1, warmup_steps=2, schedule="constant")
    assert [learning_rate(config, step, 5) for step in range(5)] == [0.05, 0.1, 0.1, 0.1, 0.1]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_grad_norm": 1.0}, [0.6, 0.8]),  # one factor for the whole
        ({"max_grad_norm": 1.0, "max_grad_value": 3.5}, [3.0, 3.5]),  # each number by itself
        ({"max_grad_norm": 50.0}, [3.0, 4.0]),
    ],
)
def test_gradients_are_cut_by_norm_or_by_value(limits: dict[str, float], expected: list[float]) -> None:
    network = nn.Linear(2, 1, bias=False)
    network.weight.grad = torch.tensor([[3.0, 4.0]])
    assert NetworkUpdate(network, OptimConfig.model_validate(limits)).clip() == pytest.approx(5.0)
    assert network.weight.grad.flatten().tolist() == pytest.approx(expected, rel=1e-5)
