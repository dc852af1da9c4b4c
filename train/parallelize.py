"""Data parallelism: workers hold equal weights, read different rows, and add up their gradients.

Sums, never averages of averages: gradients of the loss total and the loss weight are added over the workers and then
divided, so one and many workers compute the same step up to rounding. Everything is a no-op without a process group.

Shapes: B clips, C channels, T frames, H W pixels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.losses import Term
from train.mesh import LayoutConfig


def num_workers() -> int:
    """Workers of this training, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This worker's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def reduce_step(model: nn.Module, terms: Mapping[str, Term], layout: LayoutConfig) -> dict[str, float]:
    """After the backward pass of the total of `loss` on each worker: leave the gradients of the global mean in place.

    Returns the global mean of each term; a term that nothing was weighed for is left out.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    figures = _stacked(terms)
    if not layout.is_whole:  # gradients are added up already
        figures = sum_of_rows(figures, layout)
    elif num_workers() > 1:
        # One message: small ones cost a round trip each.
        flat = torch.cat([gradient.flatten() for gradient in gradients] + [figures])
        dist.all_reduce(flat)
        offset = 0
        for gradient in gradients:
            gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
            offset += gradient.numel()
        figures = flat[offset:]
    sums = _unstacked(figures, terms)
    torch._foreach_div_(gradients, sums["loss"][1] or 1.0)
    return _means(sums)


def reduce_figures(terms: Mapping[str, Term], layout: LayoutConfig) -> dict[str, float]:
    """The global mean of each term; a term that nothing was weighed for is left out."""
    return _means(_unstacked(sum_of_rows(_stacked(terms), layout), terms))


def _stacked(terms: Mapping[str, Term]) -> Tensor:
    return torch.stack([part.detach().float() for term in terms.values() for part in (term.total, term.weight)])


def _unstacked(figures: Tensor, terms: Mapping[str, Term]) -> dict[str, list[float]]:
    return {name: figures[2 * index : 2 * index + 2].tolist() for index, name in enumerate(terms)}


def _means(sums: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: total / weight for name, (total, weight) in sums.items() if weight}


def sum_of_rows(figures: Tensor, layout: LayoutConfig) -> Tensor:
    """The sum over all rows; workers of a tensor group have the same ones."""
    return sum_over_workers(figures) / layout.tensor


def sum_over_workers(values: Tensor) -> Tensor:
    """The sum of a tensor over all workers, without gradients."""
    if num_workers() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def copy_from_first(values: Tensor) -> None:
    """Overwrite a tensor with rank 0's, so that what rounding decides is decided once."""
    if num_workers() > 1:
        dist.broadcast(values, src=0)


def barrier() -> None:
    """Wait for all workers."""
    if num_workers() > 1:
        dist.barrier()


def share_batch_norm(model: nn.Module) -> None:
    """Make every BatchNorm of the model normalise by the global batch, so that its split over workers changes nothing.

    PyTorch's own SyncBatchNorm refuses CPU tensors. State-dict keys stay as they are.
    """
    if num_workers() > 1:
        for module in model.modules():
            if type(module) is nn.BatchNorm3d:
                module.__class__ = SharedBatchNorm3d


class SharedBatchNorm3d(nn.BatchNorm3d):
    """BatchNorm over the clips of all workers in training; equal shares are assumed nowhere."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002, the base class names it so
        """Features (B, C, T, H, W) -> normalised ones."""
        if not self.training:
            return super().forward(input)
        count = torch.full((1,), float(input.numel() // input.shape[1]), device=input.device)
        sums = torch.cat([input.sum(dim=(0, 2, 3, 4)), input.square().sum(dim=(0, 2, 3, 4)), count])
        total: Tensor = _SumWithGradient.apply(sums)  # type: ignore[no-untyped-call]
        channels = input.shape[1]
        mean_C = total[:channels] / total[-1]
        variance_C = total[channels:-1] / total[-1] - mean_C.square()
        with torch.no_grad():
            buffers = dict(self.named_buffers())
            buffers["num_batches_tracked"] += 1
            buffers["running_mean"].lerp_(mean_C, self.momentum or 0.0)
            buffers["running_var"].lerp_(variance_C * total[-1] / (total[-1] - 1), self.momentum or 0.0)
        scale_C = torch.rsqrt(variance_C + self.eps) * self.weight
        shift_C = self.bias - mean_C * scale_C
        return torch.addcmul(shift_C.view(1, -1, 1, 1, 1), input, scale_C.view(1, -1, 1, 1, 1))


class _SumWithGradient(torch.autograd.Function):
    """Sum over workers. Every worker's loss depends on the sum, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return sum_over_workers(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return sum_over_workers(gradients[0].contiguous())


def broadcast_int(value: int) -> int:
    """Rank 0's value, on every worker."""
    holder = torch.tensor([value])
    if num_workers() > 1:
        dist.broadcast(holder, src=0)
    return int(holder)
