import math

import pytest
import torch
from torch import nn

from train.optim import OptimConfig, build_optimizer, learning_rate, set_learning_rate


def test_warms_up_then_falls_to_zero_like_torchs_schedules() -> None:
    config = OptimConfig(learning_rate=0.1, warmup_steps=5)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.2, total_iters=4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    both = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[5])
    for step in range(25):
        assert learning_rate(config, step, 25) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), step
        optimizer.step()
        both.step()
    assert learning_rate(config, 25, 25) == 0.0


def test_the_last_step_still_learns() -> None:
    assert 0 < learning_rate(OptimConfig(learning_rate=1.0), 99, 100) < 1e-3


def test_matrices_decay_and_norms_do_not() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Conv2d(4, 4, 3))
    decaying, fixed = build_optimizer(model, OptimConfig(weight_decay=0.3)).param_groups
    assert decaying["weight_decay"] == 0.3
    assert fixed["weight_decay"] == 0.0
    assert [tuple(p.shape) for p in decaying["params"]] == [(4, 3), (4, 4, 3, 3)]
    assert {tuple(p.shape) for p in fixed["params"]} == {(4,)}


def test_an_update_is_adamws() -> None:
    config = OptimConfig(learning_rate=0.5, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    weight = nn.Parameter(torch.full((1, 1), 2.0))
    model = nn.Module()
    model.weight = weight
    optimizer = build_optimizer(model, config)
    set_learning_rate(optimizer, 0.25)
    weight.grad = torch.full((1, 1), -3.0)
    optimizer.step()
    expected = 2.0 * (1 - 0.25 * 0.1) + 0.25 * 3.0 / (math.sqrt(9.0) + 1e-8)
    assert weight.item() == pytest.approx(expected, rel=1e-6)
