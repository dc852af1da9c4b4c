"""The average of the weights: its formula, where it begins, and what is exported."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.train.small_data import ALONE, frame_data, tokenizer_config
from tests.train.small_runs import run
from train.ema import average_name, averaged_tensors, load_average, update_average
from train.vision_tokenizer import CODEBOOK, TokenizerObjective

CONSTANT = {"learning_rate": 0.001, "schedule": "constant", "weight_decay": 0.0, "eps": 1e-4}


def test_the_average_is_movqgans_and_begins_with_the_first_step() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    state = averaged_tensors(model)
    expected = 0.0
    for step in range(30):
        value = float(np.sin(step) + 2)
        nn.init.constant_(model.get_parameter("0.weight"), value)
        model.get_buffer("1.running_mean").fill_(-value)
        update_average(state, model, 0.6, step)
        decay = min(0.6, (2 + step) / (11 + step)) if step else 0.0
        expected = decay * expected + (1 - decay) * value
        assert state[average_name("0.weight")].item() == pytest.approx(expected, rel=1e-5), step
        assert state[average_name("1.running_mean")].item() == pytest.approx(-expected, rel=1e-5), step
    assert average_name("1.num_batches_tracked") not in state
    load_average(state, model)
    assert model.get_parameter("0.weight").item() == pytest.approx(expected, rel=1e-5)


def test_what_is_exported_is_the_average_of_the_steps(tmp_path: Path) -> None:
    last = {steps: _export_at(tmp_path, steps) for steps in range(1, 5)}
    averaged = _export_at(tmp_path, 4, ema_decay=0.9999)
    for key, value in averaged.items():
        if not value.is_floating_point():
            continue
        expected = last[1][key].double()
        for step in range(1, 4):
            decay = (2 + step) / (11 + step)
            expected = decay * expected + (1 - decay) * last[step + 1][key].double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-6, msg=key)
    assert not torch.equal(averaged["encoder.conv_in.weight"], last[4]["encoder.conv_in.weight"])


def _export_at(folder: Path, steps: int, **changes: float) -> dict[str, torch.Tensor]:
    """The weights after so many steps of one and the same training."""
    data, name = frame_data(folder), f"run-{steps}-{len(changes)}"
    config = tokenizer_config(steps=steps, reset_every=100, optim=CONSTANT, **changes)
    return run(TokenizerObjective(config, data), folder / name)


def test_codes_that_move_take_their_average_with_them(tmp_path: Path) -> None:
    objective = TokenizerObjective(tokenizer_config(reset_every=2, ema_decay=0.999), frame_data(tmp_path))
    torch.manual_seed(0)
    model = objective.build_model(ALONE).train()
    objective.start(model, ALONE)
    state = objective.initial_state(model)
    (tokenizer, _), *_ = objective.networks(model)
    codebook = tokenizer.get_parameter(CODEBOOK)
    with torch.no_grad():
        codebook[3] = 1e3  # far from everything: nothing chooses it
    objective.loss(model, np.arange(4), 0, ALONE, state)
    objective.finish_step(model, 0, ALONE.device, state)
    assert float(state[average_name(CODEBOOK)][3, 0]) == 1e3
    chosen = int(state["code_uses_K"].argmax())
    with torch.no_grad():
        codebook[chosen] += 1.0
    objective.finish_step(model, 1, ALONE.device, state)
    assert float(codebook[3].detach().abs().max()) < 1e2
    assert torch.equal(state[average_name(CODEBOOK)][3], codebook[3])
    assert not torch.equal(state[average_name(CODEBOOK)][chosen], codebook[chosen])
