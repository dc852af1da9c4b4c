"""AdamW, its parameter groups, and the learning rate as a pure function of the step."""

import math

import torch
from pydantic import Field
from torch import nn

from schemas.recipe import Config


class OptimConfig(Config):
    """How weights are updated. Defaults are ours where the paper is silent, which is everywhere but the learning rate.

    Paper: Emu3 report, section 2.4: learning rate 5e-5, cosine to zero.
    """

    learning_rate: float = Field(default=5e-5, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    max_grad_norm: float = Field(default=5.0, gt=0)


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Step (from 0) of `steps` -> its learning rate: a linear warm-up, then a cosine that ends at zero."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """A model -> AdamW over its trainable parameters; matrices and kernels decay, norms and biases do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Use this learning rate from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = value
