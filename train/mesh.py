"""Which worker holds which part of a network and of a batch: one device mesh for all kinds of parallelism.

Workers are numbered so that those that talk most are neighbours: tensor parallelism innermost, then the parts of a row
(context), then the shards of the weights, then whole replicas. Workers of one tensor or context group read the same rows.

Shapes: B rows, L tokens of a row, S tokens of a worker's part of it, K key-value heads, C channels of a head.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from model.attention import AttentionPlan, Piece, SharedRows
from schemas.recipe import Config
from train.batches import TokenBatch


class LayoutConfig(Config):
    """How one training is spread over its workers, which leaves its result alone up to rounding.

    Workers beyond `shard` x `context` x `tensor` are replicas, which read other rows: 16 workers with `shard = 8` are two
    replicas of eight (hybrid sharding). With everything at 1 each worker holds the whole network.
    """

    shard: int = Field(default=1, ge=1)
    """Workers that share weights, gradients and optimizer state among them (FSDP2); each reads other rows."""
    context: int = Field(default=1, ge=1)
    """Workers that share the tokens of a row among them; they share weights as well."""
    tensor: int = Field(default=1, ge=1)
    """Workers that share each layer and the vocabulary among them (tensor and sequence parallelism)."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """What is computed in; weights, gradients and optimizer state are float32 in any case."""
    float8: Literal["off", "tensorwise", "rowwise"] = "off"
    """Matrix products inside layers multiply numbers of 8 bits, scaled by tensor (the fastest) or by row (closer), for GPUs
    from H100 on; a CPU rounds alike, at no gain. With `compute = "bfloat16"`, and best compiled.
    """
    recompute: Literal["nothing", "selective", "full"] = "nothing"
    """Activations that the backward pass works out again: none, all but those of matrix products and attention, or all but
    the input of each layer."""
    compile: bool = False
    """Layers are compiled: a minute at the start, faster steps on a GPU. With `selective` the compiler chooses what it works
    out again: all but products and attention, as without it.
    """

    @model_validator(mode="after")
    def _check_float8(self) -> Self:
        if self.float8 != "off" and (self.compute != "bfloat16" or self.tensor > 1):
            raise ValueError(
                f"found float8 {self.float8!r} with compute {self.compute!r} and tensor {self.tensor}, expected 'bfloat16' and "
                "1: what is not a matrix product needs more bits, and scales are those of whole matrices"
            )
        return self

    @property
    def is_whole(self) -> bool:
        """Whether each worker holds the whole network in float32."""
        return self.group == 1 and self.compute == "float32"

    @property
    def group(self) -> int:
        """Workers that hold the network together."""
        return self.shard * self.workers_per_row

    @property
    def workers_per_row(self) -> int:
        """Workers that read the same rows."""
        return self.context * self.tensor

    def readers(self, num_workers: int) -> int:
        """Of so many workers, the groups that read rows of their own."""
        return num_workers // self.workers_per_row

    def row_length(self, context_len: int) -> int:
        """What rows are padded to, so that every worker has as much of them, and float8 multiplies of sizes that it knows."""
        parts = self.tensor * (2 * self.context if self.context > 1 else 1)
        if self.float8 != "off":
            parts *= 16
        return math.ceil(context_len / parts) * parts


@dataclass(frozen=True)
class Mesh:
    """This worker's place among all. `weights` has the dimensions replicate, shard (which context is part of) and tensor;
    `rows` has data, context and tensor. Both are None where each worker holds the whole network.
    """

    layout: LayoutConfig
    device: torch.device
    weights: DeviceMesh | None = None
    rows: DeviceMesh | None = None

    @property
    def data_rank(self) -> int:
        """Which share of a batch's rows this worker reads, from 0."""
        if self.rows is not None:
            return self.rows.get_local_rank("data")
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def data_size(self) -> int:
        """How many shares there are."""
        if self.rows is not None:
            return self.rows.size(0)
        return dist.get_world_size() if dist.is_initialized() else 1

    def share_context(self, batch: TokenBatch) -> tuple[TokenBatch, AttentionPlan | None]:
        """Whole rows -> this worker's tokens of them, and who sees whom; the rows themselves without context parallelism.

        Of each row cut into twice as many parts as workers, a worker has one from the head and its mirror from the tail, as
        later tokens see more: all work as much.
        """
        size = self.layout.context
        if size == 1:
            return batch, None
        assert self.rows is not None
        worker, group = self.rows.get_local_rank("context"), self.rows.get_group("context")
        part = batch.tokens_BL.shape[1] // (2 * size)
        parts = [range(index * part, (index + 1) * part) for index in (worker, 2 * size - 1 - worker)]
        places = torch.tensor([place for part in parts for place in part], device=self.device)
        gather = partial(_gather, group=group, size=size)
        plan = AttentionPlan(shared=_shared_rows(batch.document_ids_BL, parts, gather))
        return batch.columns(places), plan


def build_mesh(layout: LayoutConfig, device: torch.device) -> Mesh:
    """A layout -> this worker's place, called by all workers, whose number is a multiple of what the layout shares among."""
    if layout.is_whole:
        return Mesh(layout, device)
    world = dist.get_world_size()
    weights = init_device_mesh(
        device.type,
        (world // layout.group, layout.shard * layout.context, layout.tensor),
        mesh_dim_names=("replicate", "shard", "tensor"),
    )
    rows = init_device_mesh(
        device.type,
        (layout.readers(world), layout.context, layout.tensor),
        mesh_dim_names=("data", "context", "tensor"),
    )
    return Mesh(layout, device, weights, rows)


def _shared_rows(document_ids_BL: Tensor, parts: list[range], gather: Any) -> SharedRows:
    lengths: list[int] = []
    pieces: list[Piece] = []
    for ids_L in document_ids_BL.cpu():
        sizes = torch.unique_consecutive(ids_L, return_counts=True)[1].tolist()
        ends = torch.tensor(sizes).cumsum(0).tolist()
        for part in parts:
            for index, (size, end) in enumerate(zip(sizes, ends, strict=True)):
                first, last = max(part.start, end - size), min(part.stop, end)
                if first < last:
                    pieces.append(Piece(last - first, len(lengths) + index, last - (end - size)))
        lengths += sizes
    return SharedRows(gather, lengths, pieces)


def _gather(part_BSKC: Tensor, group: dist.ProcessGroup, size: int) -> Tensor:
    whole: Tensor = _Gather.apply(part_BSKC, group, size)  # type: ignore[no-untyped-call]
    return whole


class _Gather(torch.autograd.Function):
    """Parts of rows as `share_context` deals them -> whole rows; backward, the sum of what all workers found for a part."""

    @staticmethod
    def forward(ctx: Any, part_BSKC: Tensor, group: dist.ProcessGroup, size: int) -> Tensor:
        ctx.group, ctx.size = group, size
        all_WBSKC = part_BSKC.new_empty((size, *part_BSKC.shape))
        dist.all_gather_into_tensor(all_WBSKC.flatten(0, 1), part_BSKC.contiguous(), group)
        heads, tails = all_WBSKC.chunk(2, dim=2)
        return torch.cat([*heads, *tails.flip(0)], dim=1)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        chunks = upstream[0].chunk(2 * ctx.size, dim=1)
        parts = [torch.cat([chunks[worker], chunks[-1 - worker]], dim=1) for worker in range(ctx.size)]
        mine = torch.empty_like(parts[0])
        dist.reduce_scatter_tensor(mine, torch.cat(parts), group=ctx.group)
        return mine, None, None
