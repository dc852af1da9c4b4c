"""A transformer over the workers of a mesh: its layers split, its activations recomputed, its weights sharded.

Everything is PyTorch's: DTensor for tensor and sequence parallelism, checkpoint wrappers, FSDP2. Gradients are sums over
rows, never averages, and are divided once all of them are there.

Shapes: B rows, L tokens, D hidden, V vocabulary.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch._functorch.config as functorch_config
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
from schemas.errors import ConfigError
from train.adapter import adapter_of, like
from train.head_loss import VocabularyShard
from train.mesh import LayoutConfig, Mesh

FLOAT8_CAPABILITY = (9, 0)
# What selective recomputation keeps: where the time goes.
KEPT_OPERATORS = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten._scaled_mm.default,
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
    if layout.float8 != "off":
        _round_products(model, layout.float8, mesh.device)
    if layout.tensor > 1:
        _split(model, mesh)
    _compile_and_recompute(model, layout)
    if mesh.weights is not None:
        _shard(model, mesh)
    model.to_empty(device=mesh.device)
    with torch.no_grad():
        for name, weight in weights:
            _fill(model.get_parameter(name), weight.to(mesh.device))


def _compile_and_recompute(model: Transformer, layout: LayoutConfig) -> None:
    """Layers are compiled inside what recomputes them: attention over packed documents breaks their graphs, and a graph around
    the wrapper would then not be compiled at all. What compiled parts keep nobody outside can choose, so that of the compiler
    itself is asked what `selective` means.
    """
    is_selective = layout.recompute == "selective"
    for index, layer in enumerate(model.model.layers):
        if layout.compile:
            layer.compile()
        if layout.recompute == "full" or (is_selective and not layout.compile):
            how: dict[str, Any] = {"context_fn": _selective_contexts} if is_selective else {}
            model.model.layers[index] = checkpoint_wrapper(layer, **how)
    if layout.compile and is_selective:
        functorch_config.aggressive_recomputation = True


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
    """A network of whole weights, called by all workers: the model's own where each of them holds it, otherwise a copy on the
    CPU of the first one, and on the others one without weights. Frozen weights are not gathered: they are what they were.
    Layers are plain ones: nothing wraps or compiles them.
    """
    layout = mesh.layout
    if layout.is_whole and layout.recompute == "nothing" and not layout.compile:
        return model
    assert isinstance(model, Transformer)
    if layout.is_whole:
        plain = like(model)
        plain.load_state_dict(model.state_dict(), assign=True)
        return plain
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights = get_model_state_dict(model, options=options)
    whole = like(model)
    if weights:
        whole.load_state_dict(weights, assign=True, strict=adapter_of(model) is None)
    return whole


def _round_products(model: Transformer, scaling: str, device: torch.device) -> None:
    """Matrix products inside layers in float8, by torchao, forward and backward; names and weights stay as they are.

    Raises: ConfigError if the GPU cannot multiply such numbers.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from torchao.float8.float8_linear import Float8Linear

    if device.type == "cuda" and torch.cuda.get_device_capability(device) < FLOAT8_CAPABILITY:
        raise ConfigError(
            f"found layout.float8 {scaling!r} on {torch.cuda.get_device_name(device)}, expected a GPU that multiplies float8 "
            "(H100 or later): set layout.float8 to 'off'"
        )
    config = replace(Float8LinearConfig.from_recipe_name(scaling), emulate=device.type != "cuda")
    for layer in model.model.layers:
        convert_to_float8_training(layer, module_filter_fn=_is_multiple_of_16, config=config)
    if not any(isinstance(module, Float8Linear) for module in model.modules()):
        raise ConfigError(
            f"found layout.float8 {scaling!r} and no layer of which both sizes are multiples of 16: set it to 'off'"
        )


def _is_multiple_of_16(module: nn.Module, name: str) -> bool:
    """The kernels know no other sizes."""
    return isinstance(module, nn.Linear) and module.in_features % 16 == 0 and module.out_features % 16 == 0


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
