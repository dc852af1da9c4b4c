"""What a training needs on each worker, worked out from its options before anything starts.

A step is at its largest at one of three moments: when the head's loss is worked out and all layers hold what they kept for
the backward pass; in the backward pass of the last layer; or at the end, when the embedding and the head hand over their
gradients. Each row of the plan says at which of them it is there; the largest sum is what a worker needs.

Activations are counted as eager execution keeps them; compiled layers keep less. What an evaluation holds is less too.

Sizes: D hidden, H heads, K key-value heads, C channels of a head, I intermediate, V vocabulary, b bytes computed in.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from model.transformer import TransformerConfig
from schemas.errors import ConfigError
from train.adapter import AdapterConfig, Target, adapter_parameters, projection_sizes
from train.gpus import GIB
from train.head_loss import HeadLossConfig
from train.mesh import LayoutConfig
from train.meter import layer_matrices

# Ours: the CUDA context and memory that falls between allocations; with other workers also what NCCL holds.
RESERVE_GIB, RESERVE_ALONE_GIB = 6.0, 2.0
MIN_CHUNK_TOKENS = 256

Moment = Literal["loss", "backward", "end", "samples"]
LOSS: tuple[Moment, ...] = ("loss",)
BACKWARD: tuple[Moment, ...] = ("backward",)
END: tuple[Moment, ...] = ("end",)
SAMPLES: tuple[Moment, ...] = ("samples",)
ALWAYS = (*LOSS, *BACKWARD, *END, *SAMPLES)
# Linear layers that read the same numbers.
SHARED_INPUTS: tuple[tuple[Target, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("o_proj",),
    ("gate_proj", "up_proj"),
    ("down_proj",),
)


@dataclass(frozen=True)
class Workload:
    """A transformer, how it is spread, and the rows that go through it: `rows` of a worker in a step, `rows_at_once` of them
    together, each of `row_len` tokens with its padding. With an adapter nothing else is trained. With `is_whole_rows` several
    workers cannot share one. `has_frozen_copy`: beside it stands a whole one in float32 (the reference of preferences).
    `draws_samples`: now and then the first worker holds a whole copy in what is computed in.
    """

    architecture: TransformerConfig
    layout: LayoutConfig
    head_loss: HeadLossConfig
    num_workers: int
    rows: int
    rows_at_once: int
    row_len: int
    adapter: AdapterConfig | None = None
    is_whole_rows: bool = False
    has_frozen_copy: bool = False
    draws_samples: bool = False

    @property
    def width(self) -> int:
        """Bytes of a number that is computed with."""
        return 2 if self.layout.compute == "bfloat16" else 4

    @property
    def readers(self) -> int:
        """Groups of workers that read rows of their own."""
        return self.layout.readers(self.num_workers)

    @property
    def parts(self) -> int:
        """Times that a worker goes through the network in a step."""
        return math.ceil(self.rows / self.rows_at_once)

    @property
    def tokens(self) -> int:
        """Of rows that a worker goes through together, those that are its own; a tensor group shares them."""
        return self.rows_at_once * self.row_len // self.layout.context


@dataclass(frozen=True)
class MemoryRow:
    """Something that a worker holds, in bytes, at which moments, and why so much."""

    name: str
    num_bytes: float
    moments: tuple[Moment, ...]
    reason: str


@dataclass(frozen=True)
class MemoryPlan:
    """All that a worker holds."""

    rows: tuple[MemoryRow, ...]

    def at(self, moment: Moment) -> float:
        """Bytes at a moment."""
        return sum(row.num_bytes for row in self.rows if moment in row.moments)

    @property
    def moments(self) -> tuple[Moment, ...]:
        """Of those that there are, all but `samples` where no copy is drawn with."""
        return ALWAYS if any(row.moments == SAMPLES for row in self.rows) else (*LOSS, *BACKWARD, *END)

    @property
    def worst(self) -> Moment:
        """When it is most."""
        return max(self.moments, key=self.at)

    @property
    def peak(self) -> float:
        """Bytes at that moment."""
        return self.at(self.worst)


def layer_parameters(architecture: TransformerConfig) -> int:
    """Numbers that a layer learns: its matrices and two norms."""
    return layer_matrices(architecture) + 2 * architecture.hidden_size


def num_parameters(architecture: TransformerConfig) -> int:
    """Numbers that the network learns: layers, embedding, head and last norm."""
    a = architecture
    return a.num_layers * layer_parameters(a) + 2 * a.vocab_size * a.hidden_size + a.hidden_size


def num_trained(load: Workload) -> int:
    """Numbers that a training changes: all, or those of the adapter."""
    a = load.architecture
    return num_parameters(a) if load.adapter is None else a.num_layers * adapter_parameters(a, load.adapter)


def kept_by_layer(load: Workload, recompute: str | None = None) -> float:
    """Bytes that a layer keeps of each token from the forward to the backward pass, under `recompute` or the layout's own.

    nothing: of each norm its input, its scale and its output; queries, keys and values turned; attention's output, twice, and
    the logarithms of its sums; gate, up and their product; a byte of each dropped number. selective: the input, and what
    KEPT_OPERATORS gave. full: the input.

    Tensor parallelism divides all but the norms' outputs, which each worker needs whole. Beside an adapter weights are frozen,
    so that what goes into them is kept for the adapter's sake alone (`_kept_beside_adapter`).
    """
    a, b, tensor = load.architecture, load.width, load.layout.tensor
    heads, keys = a.num_heads * a.head_dim, 2 * a.num_kv_heads * a.head_dim
    sums = 4 * a.num_heads
    match recompute or load.layout.recompute:
        case "full":
            return a.hidden_size * b / tensor
        case "selective":
            products = 2 * a.hidden_size + heads + keys + 2 * a.intermediate_size + _adapter_products(load)
            return ((a.hidden_size + products + heads) * b + sums) / tensor
    if load.adapter is not None:
        return _kept_beside_adapter(load, load.adapter)
    norms = 2 * (b * a.hidden_size + 4) / tensor + 2 * b * a.hidden_size
    dropped = 2 * a.hidden_size if a.dropout else 0
    inner = (3 * heads + keys + 3 * a.intermediate_size) * b
    return norms + (inner + sums + dropped) / tensor


def keys_and_values(load: Workload) -> float:
    """Bytes of a token's keys and values on a worker."""
    return 2 * load.architecture.num_kv_heads * load.architecture.head_dim * load.width / load.layout.tensor


def _adapter_products(load: Workload) -> int:
    """Numbers of a token that the matrix products of a layer's adapter give."""
    if load.adapter is None:
        return 0
    sizes = projection_sizes(load.architecture)
    return sum(load.adapter.rank + sizes[target][1] for target in load.adapter.targets)


def _kept_beside_adapter(load: Workload, adapter: AdapterConfig) -> float:
    """As `kept_by_layer`, of frozen weights and an adapter: of each norm its input and scale; what goes into adapters, once for
    those that share it, or with dropout each one's own and a byte of each dropped number; what the first of their two
    matrices gives; queries, keys and values turned, attention's output and the logarithms of its sums; gate and up.
    """
    a, b = load.architecture, load.width
    heads, keys = a.num_heads * a.head_dim, 2 * a.num_kv_heads * a.head_dim
    sizes = projection_sizes(a)
    inputs = [sizes[target][0] for target in adapter.targets]
    shared = [sizes[group[0]][0] for group in SHARED_INPUTS if set(group) & set(adapter.targets)]
    entering = sum(inputs) * (b + 1) if adapter.dropout else sum(shared) * b
    dropped = 2 * a.hidden_size if a.dropout else 0
    inner = (2 * (a.hidden_size + heads + a.intermediate_size) + keys + adapter.rank * len(inputs)) * b
    return 8 + entering + inner + 4 * a.num_heads + dropped


def plan_memory(load: Workload) -> MemoryPlan:
    """A workload -> what each worker holds. What is gathered is there only where weights are shared or computed in another
    dtype than they are kept in.
    """
    rows = [*_always(load), *_activations(load), *_loss(load), *_backward(load), *_end(load), *_samples(load)]
    return MemoryPlan(tuple(row for row in rows if row.num_bytes))


def check_memory(load: Workload, available_bytes: float, where: str) -> None:
    """See that a workload fits into the memory of `where`.

    Raises: ConfigError that names what is too big, what there is, and what to change.
    """
    plan = plan_memory(load)
    if plan.peak <= available_bytes:
        return
    largest = max((row for row in plan.rows if plan.worst in row.moments), key=lambda row: row.num_bytes)
    remedies = "; ".join(f"{change} ({gib(peak)} GiB)" for change, peak in _remedies(load, plan.peak))
    raise ConfigError(
        f"found a training that needs {gib(plan.peak)} GiB on each worker, {gib(largest.num_bytes)} of them for "
        f"{largest.name}, expected at most {gib(available_bytes)} GiB, which {where} has: "
        f"{remedies or 'take a GPU with more memory'}"
    )


def gpu_memory(device: torch.device) -> int:
    """Bytes that a GPU has, whoever uses them now."""
    return torch.cuda.mem_get_info(device)[1]


def gib(num_bytes: float) -> str:
    """Bytes as text, in GiB."""
    return f"{num_bytes / GIB:.2f}"


def _always(load: Workload) -> Iterator[MemoryRow]:
    a, tensor, group = load.architecture, load.layout.tensor, load.layout.group
    state = 16 * num_trained(load) / group
    yield MemoryRow("weights, gradients, moments", state, ALWAYS, f"16 bytes a parameter, over {group} workers")
    if load.adapter is not None:
        frozen = load.width * num_parameters(a) / group
        yield MemoryRow("frozen weights", frozen, ALWAYS, f"{load.width} bytes a parameter, over {group} workers")
    if not load.layout.is_whole:
        root = (a.vocab_size / tensor + 1) * a.hidden_size * load.width
        yield MemoryRow("head and last norm, gathered", root, ALWAYS, "FSDP2 keeps its root unit through the step")
    if load.has_frozen_copy:
        yield MemoryRow("frozen copy", 4 * num_parameters(a), ALWAYS, "the reference, float32, whole on each worker")
    reserve = RESERVE_GIB if load.num_workers > 1 else RESERVE_ALONE_GIB
    yield MemoryRow("reserve", reserve * GIB, ALWAYS, "fragmentation, NCCL, the CUDA context; ours")


def _activations(load: Workload) -> Iterator[MemoryRow]:
    a, b, tensor = load.architecture, load.width, load.layout.tensor
    size, layers = kept_by_layer(load), a.num_layers
    held = (*LOSS, *BACKWARD)
    reason = f"{size / 1024:.1f} KiB a token, {load.tokens} tokens at once, recompute {load.layout.recompute!r}"
    yield MemoryRow(f"activations of {layers} layers", layers * size * load.tokens, held, reason)
    last_norm, rotary = 2 * b * a.hidden_size / tensor, 8 * a.head_dim
    embedded = (b + bool(a.dropout)) * a.hidden_size / tensor
    if load.adapter is None:
        outer = (last_norm + rotary + embedded) * load.tokens
        yield MemoryRow("activations around them", outer, held, "embedding, last norm, rotary tables")
    else:  # a frozen embedding keeps nothing
        outer = (last_norm + rotary) * load.tokens
        yield MemoryRow("activations around them", outer, LOSS, "last norm, rotary tables")
    if load.layout.context > 1:
        is_kept = load.layout.recompute == "nothing"
        others = keys_and_values(load) * (load.layout.context - 1) * load.tokens * (layers if is_kept else 1)
        kept = held if is_kept else BACKWARD
        yield MemoryRow("keys and values of others", others, kept, "of whole rows, gathered over context")


def _loss(load: Workload) -> Iterator[MemoryRow]:
    """Tokens that are worked on together have float32 logits, and their slopes in the dtype of the head; the gradient of
    the head is added up in float32, that of hidden states is as they are.
    """
    a, b, tensor = load.architecture, load.width, load.layout.tensor
    is_chunked = load.head_loss.kind != "whole"
    chunk = min(load.head_loss.chunk_tokens, load.tokens) if is_chunked else load.tokens
    # Made whole: logits, as float32, their log-softmax and its slopes; in chunks: float32 in place.
    size = 4 + (b if b < 4 else 0) if is_chunked else 12 + (b if b < 4 else 0)
    yield MemoryRow(
        "logits of a chunk", chunk * a.vocab_size / tensor * size, LOSS, f"{chunk} tokens, {size} bytes each"
    )
    head = 0 if load.adapter is not None else 4 * a.vocab_size * a.hidden_size / tensor
    yield MemoryRow("gradient of the head", head, LOSS, "added up in float32")
    hidden = load.tokens * a.hidden_size * b * (3 if tensor > 1 else 1)
    yield MemoryRow("gradients of hidden states", hidden, LOSS, "all tokens at once, and whole with tensor")


def _backward(load: Workload) -> Iterator[MemoryRow]:
    a, b, tensor, tokens = load.architecture, load.width, load.layout.tensor, load.tokens
    again = 0.0
    if load.layout.recompute != "nothing":
        again = kept_by_layer(load, "nothing")
    if load.layout.recompute == "selective":  # most of it is there; input and outputs of two products are there besides
        again += 3 * a.hidden_size * b / tensor - kept_by_layer(load)
    yield MemoryRow("a layer's activations, made again", again * tokens, BACKWARD, "one layer at a time")
    yield MemoryRow("slopes inside a layer", _slopes(load) * tokens, BACKWARD, "of its MLP or its attention")
    if load.layout.is_whole:
        return
    # The layer, the next one, its gradient, and the float32 message that shares out the gradient of the one before.
    if load.adapter is not None:
        added = adapter_parameters(a, load.adapter)
        both = (layer_parameters(a) + added) * 2 * b + added * (b + 4)
        yield MemoryRow("layers, gathered", both, BACKWARD, "one, one ahead, an adapter's gradient and its message")
        return
    layer = layer_parameters(a) / tensor * (2 * b + b + 4)
    yield MemoryRow("layers, gathered", layer, BACKWARD, "one, one ahead, a gradient and its float32 message")
    yield MemoryRow("gradient of the head, kept", a.vocab_size * a.hidden_size / tensor * b, BACKWARD, "until the end")


def _slopes(load: Workload) -> float:
    """Bytes of a token that the backward pass of a layer makes and drops: in the MLP the slopes of gate and up, and of the
    layer's ends; in attention those of queries, added up in float32, and of keys and values, which the kernel makes for
    each query head and which travel back to those who gave them.
    """
    a, b, layout = load.architecture, load.width, load.layout
    heads = a.num_heads * a.head_dim
    messages = 2 * keys_and_values(load) * layout.tensor if layout.context > 1 else 0
    mlp = 2 * a.intermediate_size * b
    attention = heads * (4 + 2 * b) + (2 * heads * b + messages) * layout.context
    return (2 * a.hidden_size * b + max(mlp, attention)) / layout.tensor


def _end(load: Workload) -> Iterator[MemoryRow]:
    a, b = load.architecture, load.width
    if load.layout.is_whole:
        copy = 4 * num_trained(load) if load.num_workers > 1 else 0
        yield MemoryRow("gradients in one message", copy, END, "summed over workers at once, float32")
        return
    if load.adapter is not None:
        return  # neither has a gradient
    # The embedding gathered, its gradient, the float32 message, and the gradient of the head that waits.
    size = a.vocab_size * a.hidden_size / load.layout.tensor * (3 * b + 4)
    yield MemoryRow("embedding and head hand over", size, END, "embedding, two gradients, a float32 message")


def _samples(load: Workload) -> Iterator[MemoryRow]:
    if load.draws_samples and not load.layout.is_whole:
        copy = load.width * num_parameters(load.architecture)
        yield MemoryRow("a whole copy", copy, SAMPLES, "on the first worker, to draw with")


def _remedies(load: Workload, peak: float) -> list[tuple[str, float]]:
    """Changes that lower the peak, and what it is after each, the best first."""
    found = [(change, plan_memory(other).peak) for change, other in _changes(load)]
    return sorted(((change, after) for change, after in found if after < peak), key=lambda pair: pair[1])


def _changes(load: Workload) -> Iterator[tuple[str, Workload]]:
    layout = load.layout
    if load.has_frozen_copy:
        yield "set reference to 'stored'", replace(load, has_frozen_copy=False)
    else:
        yield from _spread(load)
    if load.draws_samples:
        yield "leave out execution.samples", replace(load, draws_samples=False)
    for kind in {"nothing": ("selective", "full"), "selective": ("full",)}.get(layout.recompute, ()):
        yield f"set execution.layout.recompute to {kind!r}", _with(load, recompute=kind)
    if load.rows_at_once > 1:
        yield "set execution.rows_at_once to 1", replace(load, rows_at_once=1)
    if load.head_loss.chunk_tokens > MIN_CHUNK_TOKENS or load.head_loss.kind == "whole":
        small = HeadLossConfig(chunk_tokens=MIN_CHUNK_TOKENS)
        yield f"set execution.head_loss.chunk_tokens to {MIN_CHUNK_TOKENS}, chunked", replace(load, head_loss=small)


def _spread(load: Workload) -> Iterator[tuple[str, Workload]]:
    """The network, and rows, over more workers, and the network in fewer bits."""
    layout, readers, workers = load.layout, load.readers, 2 * load.num_workers
    if readers > layout.shard:
        yield f"set execution.layout.shard to {readers}", _with(load, shard=readers)
    for kind, size in {"shard": layout.shard, "context": layout.context}.items():
        if kind == "shard" or not load.is_whole_rows:
            yield (
                f"set execution.num_workers to {workers} and execution.layout.{kind} to {2 * size}",
                _with_workers(load, layout.model_copy(update={kind: 2 * size}), workers),
            )
    if layout.compute == "float32":
        yield "set execution.layout.compute to 'bfloat16'", _with(load, compute="bfloat16")


def _with(load: Workload, **changes: str | int) -> Workload:
    return replace(load, layout=load.layout.model_copy(update=changes))


def _with_workers(load: Workload, layout: LayoutConfig, num_workers: int) -> Workload:
    """The same batch over more workers."""
    rows = max(1, load.rows * load.readers // layout.readers(num_workers))
    return replace(load, layout=layout, num_workers=num_workers, rows=rows, rows_at_once=min(rows, load.rows_at_once))
