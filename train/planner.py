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
from train.gpus import GIB
from train.head_loss import HeadLossConfig
from train.mesh import LayoutConfig

# Ours: the CUDA context and memory that falls between allocations; with other workers also what NCCL holds.
RESERVE_GIB, RESERVE_ALONE_GIB = 6.0, 2.0
MIN_CHUNK_TOKENS = 256

Moment = Literal["loss", "backward", "end"]
LOSS: tuple[Moment, ...] = ("loss",)
BACKWARD: tuple[Moment, ...] = ("backward",)
END: tuple[Moment, ...] = ("end",)
MOMENTS = (*LOSS, *BACKWARD, *END)


@dataclass(frozen=True)
class Workload:
    """A transformer, how it is spread, and the rows that go through it: `rows` of a worker in a step, `rows_at_once` of them
    together, each of `row_len` tokens with its padding.
    """

    architecture: TransformerConfig
    layout: LayoutConfig
    head_loss: HeadLossConfig
    num_workers: int
    rows: int
    rows_at_once: int
    row_len: int

    @property
    def width(self) -> int:
        """Bytes of a number that is computed with."""
        return 2 if self.layout.compute == "bfloat16" else 4

    @property
    def group(self) -> int:
        """Workers that hold the network together."""
        return self.layout.shard * self.layout.workers_per_row

    @property
    def readers(self) -> int:
        """Groups of workers that read rows of their own."""
        return self.num_workers // self.layout.workers_per_row

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
    def worst(self) -> Moment:
        """When it is most."""
        return max(MOMENTS, key=self.at)

    @property
    def peak(self) -> float:
        """Bytes at that moment."""
        return self.at(self.worst)


def layer_parameters(architecture: TransformerConfig) -> int:
    """Numbers that a layer learns."""
    a = architecture
    attention = a.hidden_size * a.head_dim * 2 * (a.num_heads + a.num_kv_heads)
    return attention + 3 * a.hidden_size * a.intermediate_size + 2 * a.hidden_size


def num_parameters(architecture: TransformerConfig) -> int:
    """Numbers that the network learns: layers, embedding, head and last norm."""
    a = architecture
    return a.num_layers * layer_parameters(a) + 2 * a.vocab_size * a.hidden_size + a.hidden_size


def kept_by_layer(load: Workload, recompute: str | None = None) -> float:
    """Bytes that a layer keeps of each token from the forward to the backward pass, under `recompute` or the layout's own.

    nothing: of each norm its input in float32, its output before and after the weight; queries, keys and values turned;
    attention's output, twice, and the logarithms of its sums; gate, its SiLU, up and their product; a byte of each dropped
    number. selective: the input, and what KEPT_OPERATORS gave. full: the input.

    Tensor parallelism divides all but the norms' outputs, which each worker needs whole.
    """
    a, b, tensor = load.architecture, load.width, load.layout.tensor
    heads, keys = a.num_heads * a.head_dim, 2 * a.num_kv_heads * a.head_dim
    sums = 4 * a.num_heads
    match recompute or load.layout.recompute:
        case "full":
            return a.hidden_size * b / tensor
        case "selective":
            products = 2 * a.hidden_size + heads + keys + 2 * a.intermediate_size
            return ((a.hidden_size + products + heads) * b + sums) / tensor
    norms = 2 * (4 + b) * a.hidden_size / tensor + 2 * b * a.hidden_size
    dropped = 2 * a.hidden_size if a.dropout else 0
    inner = (3 * heads + keys + 4 * a.intermediate_size) * b
    return norms + (inner + sums + dropped) / tensor


def plan_memory(load: Workload) -> MemoryPlan:
    """A workload -> what each worker holds. What is gathered is there only where weights are shared or computed in another
    dtype than they are kept in.
    """
    rows = [*_always(load), *_activations(load), *_loss(load), *_backward(load), *_end(load)]
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
    a, tensor = load.architecture, load.layout.tensor
    state = 16 * num_parameters(a) / load.group
    yield MemoryRow("weights, gradients, moments", state, MOMENTS, f"16 bytes a parameter, over {load.group} workers")
    if not load.layout.is_whole:
        root = (a.vocab_size / tensor + 1) * a.hidden_size * load.width
        yield MemoryRow("head and last norm, gathered", root, MOMENTS, "FSDP2 keeps its root unit through the step")
    reserve = RESERVE_GIB if load.num_workers > 1 else RESERVE_ALONE_GIB
    yield MemoryRow("reserve", reserve * GIB, MOMENTS, "fragmentation, NCCL, the CUDA context; ours")


def _activations(load: Workload) -> Iterator[MemoryRow]:
    a, b, tensor = load.architecture, load.width, load.layout.tensor
    size, layers = kept_by_layer(load), a.num_layers
    held = (*LOSS, *BACKWARD)
    reason = f"{size / 1024:.1f} KiB a token, {load.tokens} tokens at once, recompute {load.layout.recompute!r}"
    yield MemoryRow(f"activations of {layers} layers", layers * size * load.tokens, held, reason)
    last_norm, rotary = (4 + 2 * b) * a.hidden_size / tensor, 8 * a.head_dim
    embedded = (b + bool(a.dropout)) * a.hidden_size / tensor
    outer = (last_norm + rotary + embedded) * load.tokens
    yield MemoryRow("activations around them", outer, held, "embedding, last norm, rotary tables")
    if load.layout.context > 1:
        is_kept = load.layout.recompute == "nothing"
        others = _keys_and_values(load) * (load.layout.context - 1) * load.tokens * (layers if is_kept else 1)
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
    head = 4 * a.vocab_size * a.hidden_size / tensor
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
    messages = 2 * _keys_and_values(load) * layout.tensor if layout.context > 1 else 0
    mlp = 2 * a.intermediate_size * b
    attention = heads * (4 + 2 * b) + (2 * heads * b + messages) * layout.context
    return (2 * a.hidden_size * b + max(mlp, attention)) / layout.tensor


def _keys_and_values(load: Workload) -> float:
    """Bytes of a token's keys and values on a worker."""
    return 2 * load.architecture.num_kv_heads * load.architecture.head_dim * load.width / load.layout.tensor


def _end(load: Workload) -> Iterator[MemoryRow]:
    a, b = load.architecture, load.width
    if load.layout.is_whole:
        copy = 4 * num_parameters(a) if load.num_workers > 1 else 0
        yield MemoryRow("gradients in one message", copy, END, "summed over workers at once, float32")
        return
    # The embedding gathered, its gradient, the float32 message, and the gradient of the head that waits.
    size = a.vocab_size * a.hidden_size / load.layout.tensor * (3 * b + 4)
    yield MemoryRow("embedding and head hand over", size, END, "embedding, two gradients, a float32 message")


def _remedies(load: Workload, peak: float) -> list[tuple[str, float]]:
    """Changes that lower the peak, and what it is after each, the best first."""
    found = [(change, plan_memory(other).peak) for change, other in _changes(load)]
    return sorted(((change, after) for change, after in found if after < peak), key=lambda pair: pair[1])


def _changes(load: Workload) -> Iterator[tuple[str, Workload]]:
    layout, readers = load.layout, load.readers
    if readers > layout.shard:
        yield (
            f"set execution.layout.shard to {readers}",
            replace(load, layout=layout.model_copy(update={"shard": readers})),
        )
    more = layout.model_copy(update={"shard": 2 * layout.shard})
    workers = 2 * load.num_workers
    yield (
        f"set execution.num_workers to {workers} and execution.layout.shard to {2 * layout.shard}",
        _with_workers(load, more, workers),
    )
    if layout.compute == "float32":
        yield "set execution.layout.compute to 'bfloat16'", _with(load, compute="bfloat16")
    for kind in {"nothing": ("selective", "full"), "selective": ("full",)}.get(layout.recompute, ()):
        yield f"set execution.layout.recompute to {kind!r}", _with(load, recompute=kind)
    if load.rows_at_once > 1:
        yield "set execution.rows_at_once to 1", replace(load, rows_at_once=1)
    more = layout.model_copy(update={"context": 2 * layout.context})
    yield (
        f"set execution.num_workers to {workers} and execution.layout.context to {2 * layout.context}",
        _with_workers(load, more, workers),
    )
    if load.head_loss.chunk_tokens > MIN_CHUNK_TOKENS or load.head_loss.kind == "whole":
        small = HeadLossConfig(chunk_tokens=MIN_CHUNK_TOKENS)
        yield f"set execution.head_loss.chunk_tokens to {MIN_CHUNK_TOKENS}, chunked", replace(load, head_loss=small)


def _with(load: Workload, **changes: str) -> Workload:
    return replace(load, layout=load.layout.model_copy(update=changes))


def _with_workers(load: Workload, layout: LayoutConfig, num_workers: int) -> Workload:
    """The same batch over more workers."""
    rows = max(1, load.rows * load.readers // (num_workers // layout.workers_per_row))
    return replace(load, layout=layout, num_workers=num_workers, rows=rows, rows_at_once=min(rows, load.rows_at_once))
