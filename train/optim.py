"""AdamW and Muon, what each of them updates, how gradients are clipped, and the learning rate as a pure function of the
step.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from schemas.errors import ConfigError
from schemas.recipe import Config, later_option


class OptimConfig(Config):
    """How weights are updated. Defaults are ours where the paper is silent, which is everywhere but the learning rate.

    Paper: Emu3 report, section 2.4: learning rate 5e-5, cosine to zero; section 2.5.1: linear to zero.
    """

    learning_rate: float = Field(default=5e-5, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    schedule: Literal["cosine", "linear", "constant"] = later_option("cosine")
    """How the learning rate falls to zero after the warm-up: cosine in pretraining, linear in quality tuning. MoVQGAN's is
    constant.
    """
    weight_decay: float = Field(default=0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    max_grad_norm: float = Field(default=5.0, gt=0)
    max_grad_value: float | None = later_option(None, gt=0)
    """Cut every number of a gradient to this size, as MoVQGAN does, and not the whole to `max_grad_norm`."""
    matrices: Literal["adamw", "muon"] = later_option("adamw")
    """What updates the matrices inside the layers. Muon (Jordan et al. 2024) learns more from each step; ours."""


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Step (from 0) of `steps` -> its learning rate: a linear warm-up, then the schedule, whose falls end at zero."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    if config.schedule == "linear":
        return config.learning_rate * max(0.0, 1.0 - done)
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


class NetworkUpdate:
    """The update of one network: its options and the optimizers of its parameters."""

    def __init__(self, network: nn.Module, config: OptimConfig) -> None:
        self.config = config
        self.optimizers = build_optimizers(network, config)
        self._parameters = list(network.parameters())

    def clip(self) -> float:
        """Cut the gradients to the size that the options allow, in place; their norm before that."""
        config = self.config
        if config.max_grad_value is None:
            norm = nn.utils.clip_grad_norm_(self._parameters, config.max_grad_norm)
            return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        nn.utils.clip_grad_value_(self._parameters, config.max_grad_value)
        return float(norm)

    def step(self, step: int, steps: int) -> float:
        """Update the parameters at step `step` of `steps`; the learning rate that was used."""
        rate = learning_rate(self.config, step, steps)
        set_learning_rate(self.optimizers, rate)
        for optimizer in self.optimizers:
            optimizer.step()
        return rate


def build_optimizers(model: nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """A model -> the optimizers of its trainable parameters, each parameter in one of them.

    With AdamW alone, matrices and kernels decay, norms and biases do not. Muon takes the matrices of linear layers inside
    the model's stack (modules below a `layers`) and leaves embeddings, the head and all else to AdamW.

    Raises: ConfigError if Muon is asked for and the model has no such matrix.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices: list[Tensor] = []
    if config.matrices == "muon":
        matrices = [weight for weight in _inner_matrices(model) if weight.requires_grad]
        if not matrices:
            raise ConfigError("optim.matrices = 'muon' found no linear layer inside a stack of layers: use 'adamw'")
    taken = {id(weight) for weight in matrices}
    rest = [parameter for parameter in parameters if id(parameter) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]  # an adapter has matrices alone
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)
    if not matrices:
        return [adamw]
    # Updates of AdamW's size, so that one learning rate and one weight decay serve both.
    muon = torch.optim.Muon(
        matrices, lr=config.learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return [adamw, muon]


def _inner_matrices(model: nn.Module) -> list[Tensor]:
    return [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "layers" in name.split(".")
    ]


def set_learning_rate(optimizers: Sequence[torch.optim.Optimizer], value: float) -> None:
    """Use this learning rate from the next step on."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = value
