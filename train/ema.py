"""The exponential moving average of a network's weights, which draws better than any single step's (Yaz et al. 2019).

It is kept among the tensors of a training, so a checkpoint holds it. Running statistics are averaged with the weights that
they belong to.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def average_name(name: str) -> str:
    """A tensor's name -> that of its average."""
    return f"ema.{name}"


def averaged_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A network -> copies of its floating-point tensors, by the names under which the average is kept."""
    return {average_name(name): tensor.detach().clone() for name, tensor in _floating(model).items()}


@torch.no_grad()
def update_average(state: Mapping[str, Tensor], model: nn.Module, decay: float, step: int) -> None:
    """After the update of step `step`: move the average towards the weights, in place.

    It begins with the weights after the first step. Early on it looks back a shorter way, (1 + n) / (10 + n) after n steps,
    as MoVQGAN's does.
    """
    done = step + 1
    decay = min(decay, (1 + done) / (10 + done)) if step > 0 else 0.0
    current = _floating(model)
    torch._foreach_lerp_([state[average_name(name)] for name in current], list(current.values()), 1.0 - decay)


@torch.no_grad()
def load_average(state: Mapping[str, Tensor], model: nn.Module) -> None:
    """Give the network the average as its weights."""
    for name, tensor in _floating(model).items():
        tensor.copy_(state[average_name(name)])


def _floating(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
