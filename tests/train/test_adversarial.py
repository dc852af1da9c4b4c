"""Two networks in one backward pass: each gets the gradients of its own loss, and nothing of the other's."""

from pathlib import Path

import numpy as np
import pytest
import torch

from model.vision_tokenizer.config import VISION_TOKENIZER_SIZES
from model.vision_tokenizer.tokenizer import VisionTokenizer
from tests.train.small_data import ALONE, DISCRIMINATOR, frame_data, tokenizer_config
from train.adversarial import AdversarialConfig, AdversarialTokenizer, tokenizer_of
from train.vision_tokenizer import TokenizerObjective


@pytest.fixture
def model() -> AdversarialTokenizer:
    torch.manual_seed(0)
    config = AdversarialConfig.model_validate(DISCRIMINATOR)
    return AdversarialTokenizer(VisionTokenizer(VISION_TOKENIZER_SIZES["tiny"]), config)


def test_each_network_gets_the_gradients_of_its_own_loss(model: AdversarialTokenizer) -> None:
    drawn, real = torch.randn(2, 2, 4, 3, 16, 16).unbind()
    drawn.requires_grad_()
    adversarial, judging = model.losses(drawn, real, started=True)
    (adversarial + judging).backward()
    together = {name: p.grad.clone() for name, p in model.discriminator.named_parameters()}
    to_drawn = drawn.grad.clone()
    model.zero_grad()
    # The two steps one after the other: the discriminator's with drawings as data, the generator's without its weights.
    judge = model.discriminator
    real_N, drawn_N = judge(real.flatten(0, 1)), judge(drawn.detach().flatten(0, 1))
    alone = 0.5 * (torch.relu(1 - real_N).mean() + torch.relu(1 + drawn_N).mean())
    assert judging.item() == pytest.approx(alone.item(), rel=1e-6)
    alone.backward()
    for name, parameter in judge.named_parameters():
        torch.testing.assert_close(together[name], parameter.grad, msg=name)
    (expected,) = torch.autograd.grad(-judge(drawn.flatten(0, 1)).mean(), drawn)
    torch.testing.assert_close(to_drawn, expected)
    assert to_drawn.any()


def test_before_its_start_it_has_gradients_of_zero(model: AdversarialTokenizer) -> None:
    drawn = torch.randn(2, 4, 3, 16, 16, requires_grad=True)
    adversarial, judging = model.losses(drawn, torch.randn(2, 4, 3, 16, 16), started=False)
    (adversarial + judging).backward()
    assert float(adversarial) == float(judging.detach()) == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in model.discriminator.parameters())


def test_the_loss_is_the_tokenizers_alone(tmp_path: Path) -> None:
    config = tokenizer_config(adversarial={**DISCRIMINATOR, "weight": 0.3, "start_step": 2})
    objective = TokenizerObjective(config, frame_data(tmp_path))
    torch.manual_seed(0)
    model = objective.build_model(ALONE).train()
    objective.start(model, ALONE)
    state = objective.initial_state(model)
    early = objective.loss(model, np.arange(4), 1, ALONE, state)
    assert float(early["adversarial"].weight) == float(early["discriminator"].weight) == 0.0
    terms = objective.loss(model, np.arange(4), 2, ALONE, state)
    figures = {name: float(term.mean) for name, term in terms.items()}
    quantizing = (0.25 + 1.0) * figures["commitment"]  # the codebook's distance is the commitment's
    expected = figures["pixels"] + quantizing + 0.3 * figures["adversarial"]
    assert figures["loss"] == pytest.approx(expected, rel=1e-5)
    assert figures["discriminator"] > 0


def test_two_networks_have_two_optimizers_that_share_nothing(tmp_path: Path) -> None:
    config = tokenizer_config(adversarial={**DISCRIMINATOR, "optim": {"learning_rate": 0.5, "betas": [0.5, 0.9]}})
    objective = TokenizerObjective(config, frame_data(tmp_path))
    model = objective.build_model(ALONE)
    (tokenizer, optim), (judge, judging) = objective.networks(model)
    assert tokenizer is tokenizer_of(model)
    assert optim == config.optim
    assert (judging.learning_rate, judging.betas) == (0.5, (0.5, 0.9))
    mine, other = ({id(p) for p in network.parameters()} for network in (tokenizer, judge))
    assert not mine & other
    assert mine | other == {id(p) for p in model.parameters()}
