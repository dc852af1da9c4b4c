"""How long a step of a language model should take: the most that is known before it was ever run.

Compute and what goes over the links are taken to overlap: the slower of the two is the step. Efficiency is assumed, so this
is an expectation to hold a measurement against, never a result.
"""

from dataclasses import dataclass

import numpy as np

from train.gpus import NODE_SIZE, Gpu
from train.meter import transformer_flops
from train.planner import Workload, kept_by_layer, num_parameters

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
    """A workload, a kind of GPU and the length of documents, one a row unless given -> the time of a step."""
    rows = load.rows * load.readers
    useful = rows * transformer_flops(load.architecture, _documents(load.row_len, document_len))
    peak = gpu.tflops(load.layout.compute) * 1e12 * load.num_workers
    compute_s = (useful + _repeated(load, useful)) / (peak * EFFICIENCY)
    links_s, memory_s = _links_s(load, gpu), _memory_s(load, gpu)
    step_s, tokens = max(compute_s, links_s) + memory_s, rows * load.row_len
    return StepTime(compute_s, links_s, memory_s, tokens, tokens / step_s / load.num_workers, useful / (step_s * peak))


def _documents(row_len: int, document_len: int | None) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    size = min(document_len or row_len, row_len)
    lengths = [size] * (row_len // size) + [row_len % size] * bool(row_len % size)
    return np.array(lengths, np.int64)


def _repeated(load: Workload, useful: float) -> float:
    """Operations of the second forward pass of all layers. Selective recomputation repeats no matrix product."""
    if load.layout.recompute != "full":
        return 0.0
    tokens = load.rows * load.readers * load.row_len
    return (useful - 6.0 * load.architecture.hidden_size * load.architecture.vocab_size * tokens) / 3


def _memory_s(load: Workload, gpu: Gpu) -> float:
    """The optimizer's reading and writing, and what selective recomputation writes and reads once more."""
    traffic = STATE_TRAFFIC * num_parameters(load.architecture) / load.group
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

    parameters = num_parameters(load.architecture)
    if layout.is_whole:
        return seconds(2 * 4 * parameters, load.num_workers, load.num_workers)
    shards, mine = layout.shard * layout.context, parameters / layout.tensor
    total = load.parts * (
        # Layers and embedding are gathered for both passes; gradients are shared out in float32.
        seconds(mine * (2 * load.width + 4), shards, load.group)
        + seconds(2 * 4 * mine / shards, load.num_workers // load.group, load.num_workers)
    )
    passes = 2 if layout.recompute == "nothing" else 3
    layers = load.architecture.num_layers * load.parts
    hidden = load.tokens * load.architecture.hidden_size * load.width
    total += layers * passes * seconds(4 * hidden, layout.tensor, layout.tensor)
    keys = 2 * load.architecture.num_kv_heads * load.architecture.head_dim * load.width / layout.tensor
    whole = keys * load.tokens * layout.context
    return total + layers * passes * seconds(whole, layout.context, layout.workers_per_row)
