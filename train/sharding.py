"""A transformer over the workers of a mesh: its layers split, its activations recomputed, its weights sharded.

Everything is PyTorch's: DTensor for tensor and sequence parallelism, checkpoint wrappers, FSDP2. Gradients are sums over
rows, never averages, and are divided once all of them are there.

Shapes: B rows, L tokens, D hidden, V vocabulary.
"""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from model.transformer import Transformer
from train.head_loss import VocabularyShard
from train.mesh import Mesh

# What selective recomputation keeps: where the time goes.
KEPT_OPERATORS = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)


def place_transformer(model: Transformer, weights: Iterable[tuple[str, Tensor]], mesh: Mesh) -> None:
    """Give every worker its part of a transformer on the meta device, filled from whole weights, one after the other.

    Called by all workers with equal weights, so that nothing is sent.
    """
    layout = mesh.layout
    if layout.tensor > 1:
        _split(model, mesh)
    for index, layer in enumerate(model.model.layers):
        if layout.recompute != "nothing":
            how: dict[str, Any] = {} if layout.recompute == "full" else {"context_fn": _selective_contexts}
            model.model.layers[index] = layer = checkpoint_wrapper(layer, **how)
        if layout.compile:
            layer.compile()
    if mesh.weights is not None:
        _shard(model, mesh)
    model.to_empty(device=mesh.device)
    with torch.no_grad():
        for name, weight in weights:
            _fill(model.get_parameter(name), weight.to(mesh.device))


def head_of(model: Transformer, hidden_BLD: Tensor) -> tuple[Tensor, Tensor, VocabularyShard | None]:
    """A transformer and hidden states that it gave -> plain hidden states of all tokens, the rows of the head that this
    worker holds, and which they are.
    """
    head = model.lm_head.weight
    if not isinstance(head, DTensor):
        return hidden_BLD, head, None
    mesh = head.device_mesh
    assert isinstance(hidden_BLD, DTensor)
    whole = hidden_BLD.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    first = mesh.get_local_rank() * math.ceil(head.shape[0] / mesh.size())
    return whole, head.to_local(), VocabularyShard(first, mesh.get_group())


def gather_model(model: nn.Module, mesh: Mesh) -> nn.Module:
    """A network of whole weights, called by all workers: the model itself where each of them holds it, otherwise a copy on the
    CPU of the first one, and on the others one without weights.
    """
    if mesh.layout.is_whole:
        return model
    assert isinstance(model, Transformer)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    with torch.device("meta"):
        whole = Transformer(model.config)
    if weights:
        whole.load_state_dict(weights, assign=True)
    return whole


def _split(model: Transformer, mesh: Mesh) -> None:
    """Tensor parallelism, with the activations between layers split by tokens."""
    assert mesh.weights is not None
    tokens, whole = Shard(1), Replicate()
    outer: dict[str, ParallelStyle] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=whole, output_layouts=tokens),
        "model.norm": SequenceParallel(),
        "lm_head": ColwiseParallel(),
    }
    inner: dict[str, ParallelStyle] = {
        "input_layernorm": SequenceParallel(),
        "self_attn": PrepareModuleInput(
            input_layouts=(tokens, None, None, None), desired_input_layouts=(whole, None, None, None)
        ),
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(output_layouts=tokens),
        "post_attention_layernorm": SequenceParallel(),
        "mlp": PrepareModuleInput(input_layouts=(tokens,), desired_input_layouts=(whole,)),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=tokens),
    }
    group = mesh.weights["tensor"]
    parallelize_module(model, group, outer)
    for layer in model.model.layers:
        parallelize_module(layer, group, inner)


def _shard(model: Transformer, mesh: Mesh) -> None:
    """FSDP2: layers and the embedding one by one, what is left (norm and head) with the whole."""
    assert mesh.weights is not None
    dtype = getattr(torch, mesh.layout.compute)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    shard = partial(fully_shard, mesh=mesh.weights["replicate", "shard"], mp_policy=policy)
    for module in (*model.model.layers, model.model.embed_tokens, model):
        shard(module)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other way to leave the sum as it is
    register_fsdp_forward_method(model, "hidden")


def _fill(parameter: Tensor, whole: Tensor) -> None:
    if isinstance(parameter, DTensor):
        whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(whole)


def _selective_contexts() -> Any:
    def policy(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operator in KEPT_OPERATORS else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
