"""How long a step of a language model should take: the most that is known before it was ever run.

Compute and what goes over the links are taken to overlap: the slower of the two is the step. Efficiency is assumed, so this
is an expectation to hold a measurement against, never a result.
"""

from dataclasses import dataclass

import numpy as np

from schemas.errors import ConfigError
from train.gpus import NODE_SIZE, Gpu
from train.meter import layer_matrices, transformer_flops
from train.planner import Workload, kept_by_layer, keys_and_values, num_parameters, num_trained

EFFICIENCY = 0.4  # ours: what large dense models reach of the peak on H100s is 0.35 to 0.48
STATE_TRAFFIC = 28  # bytes a parameter that AdamW reads (weight, gradient, moments) and writes (weight, moments)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by what takes them, and what follows. `mfu` as in train.meter."""

    compute_s: float
    links_s: float
    memory_s: float
    tokens: int
    tokens_per_s_per_gpu: float
    mfu: float

    @property
    def step_s(self) -> float:
        """All of it."""
        return max(self.compute_s, self.links_s) + self.memory_s

    @property
    def days_per_trillion_tokens(self) -> float:
        """How long a trillion tokens take."""
        return 1e12 / (self.tokens / self.step_s) / 86_400


def expected_step(load: Workload, gpu: Gpu, document_len: int | None = None) -> StepTime:
    """A workload, a kind of GPU and the length of documents, one a row unless given -> the time of a step.

    Raises: ConfigError if the GPU has not what the layout asks for.
    """
    rows = load.rows * load.readers
    documents = _documents(load.row_len, document_len)
    useful = rows * transformer_flops(load.architecture, documents, load.adapter)
    peak = gpu.tflops(load.layout.compute) * 1e12 * load.num_workers
    operations = useful + _repeated(load, rows * transformer_flops(load.architecture, documents))
    compute_s = (operations - _gained(load, gpu)) / (peak * EFFICIENCY)
    links_s, memory_s = _links_s(load, gpu), _memory_s(load, gpu)
    step_s, tokens = max(compute_s, links_s) + memory_s, rows * load.row_len
    return StepTime(compute_s, links_s, memory_s, tokens, tokens / step_s / load.num_workers, useful / (step_s * peak))


def _documents(row_len: int, document_len: int | None) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    size = min(document_len or row_len, row_len)
    lengths = [size] * (row_len // size) + [row_len % size] * bool(row_len % size)
    return np.array(lengths, np.int64)


def _repeated(load: Workload, plain: float) -> float:
    """Operations of the second forward pass of all layers, a third of what they take without an adapter, whose own are too few
    to count here. Selective recomputation repeats no matrix product.
    """
    if load.layout.recompute != "full":
        return 0.0
    tokens = load.rows * load.readers * load.row_len
    return (plain - 6.0 * load.architecture.hidden_size * load.architecture.vocab_size * tokens) / 3


def _gained(load: Workload, gpu: Gpu) -> float:
    """Operations of bfloat16 that could be done in the time that float8 saves: products inside layers take less, the rest as
    long. What rounding itself takes is not counted.

    Raises: ConfigError if the GPU multiplies no float8.
    """
    if load.layout.float8 == "off":
        return 0.0
    if gpu.float8_tflops is None:
        raise ConfigError(
            f"found layout.float8 {load.layout.float8!r} and the GPU {gpu.name}, which multiplies none: set it to 'off'"
        )
    tokens = load.rows * load.readers * load.row_len
    each = 8.0 if load.layout.recompute == "full" else 6.0
    products = each * load.architecture.num_layers * layer_matrices(load.architecture) * tokens
    return products * (1 - gpu.bfloat16_tflops / gpu.float8_tflops)


def _memory_s(load: Workload, gpu: Gpu) -> float:
    """The optimizer's reading and writing, and what selective recomputation writes and reads once more."""
    traffic = STATE_TRAFFIC * num_trained(load) / load.layout.group
    if load.layout.recompute == "selective":
        again = kept_by_layer(load, "nothing") - kept_by_layer(load)
        traffic += 2 * max(0.0, again) * load.architecture.num_layers * load.tokens * load.parts
    return traffic / (gpu.memory_gb_s * 1e9)


def _links_s(load: Workload, gpu: Gpu) -> float:
    """What a worker sends in a step, over the slowest link of each group: tensor inside, then context, shards, replicas."""
    layout = load.layout

    def seconds(num_bytes: float, size: int, extent: int) -> float:
        """A ring of `size` workers, the last of which are `extent` apart, passes all parts but one's own on."""
        speed = gpu.node_gb_s if extent <= NODE_SIZE else gpu.network_gb_s
        return num_bytes * (size - 1) / size / (speed * 1e9)

    parameters, trained = num_parameters(load.architecture), num_trained(load)
    if layout.is_whole:
        return seconds(2 * 4 * trained, load.num_workers, load.num_workers)
    shards, mine = layout.shard * layout.context, parameters / layout.tensor
    gradients = trained / layout.tensor
    total = load.parts * (
        # Layers and embedding are gathered for both passes; gradients are shared out in float32.
        seconds(mine * 2 * load.width + gradients * 4, shards, load.layout.group)
        + seconds(2 * 4 * gradients / shards, load.num_workers // load.layout.group, load.num_workers)
    )
    passes = 2 if layout.recompute == "nothing" else 3
    layers = load.architecture.num_layers * load.parts
    hidden = load.tokens * load.architecture.hidden_size * load.width
    total += layers * passes * seconds(4 * hidden, layout.tensor, layout.tensor)
    whole = keys_and_values(load) * load.tokens * layout.context
    return total + layers * passes * seconds(whole, layout.context, layout.workers_per_row)
