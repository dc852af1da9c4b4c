"""How fast a training goes: what it works through in a second, and how much of the hardware that takes.

MFU counts what the mathematics needs, forward and backward: 6 operations for each weight that a token is multiplied with
(embeddings are looked up, not multiplied), and causal attention inside documents, half of the square. What is computed again
in the backward pass is not counted.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from model.transformer import TransformerConfig
from train.adapter import AdapterConfig, adapter_parameters, projection_sizes
from train.batches import Rows


@dataclass(frozen=True)
class Work:
    """Units to work through, what they are, and the floating-point operations of it; 0 where these are not counted."""

    units: int
    name: str
    flops: float = 0.0


def layer_matrices(config: TransformerConfig) -> int:
    """Numbers in the matrices of a layer: what each token is multiplied with there."""
    return sum(inputs * outputs for inputs, outputs in projection_sizes(config).values())


def transformer_flops(config: TransformerConfig, document_lens: Rows, adapter: AdapterConfig | None = None) -> float:
    """Lengths of packed documents, in tokens -> operations of a training step over them. With an adapter no gradients of the
    frozen weights are worked out: 4 operations for each of these, 6 for each of the adapter's.
    """
    heads = config.num_heads * config.head_dim
    weights = config.num_layers * layer_matrices(config) + config.hidden_size * config.vocab_size
    tokens, squares = float(document_lens.sum()), float((document_lens.astype(float) ** 2).sum())
    attention = 6.0 * config.num_layers * heads * squares
    if adapter is None:
        return 6.0 * weights * tokens + attention
    added = config.num_layers * adapter_parameters(config, adapter)
    return (4.0 * weights + 6.0 * added) * tokens + attention


class Meter:
    """Adds up steps, and says what a second of them held."""

    def __init__(self, num_workers: int, device: torch.device, peak_tflops: float | None) -> None:
        self._num_workers, self._device, self._peak_tflops = num_workers, device, peak_tflops
        self._began, self._units, self._flops, self._name = 0.0, 0, 0.0, "rows"
        self._waited_s: dict[str, float] = {}
        self.reset()

    def add(self, work: Work) -> None:
        """A step, over all workers."""
        self._units, self._name = self._units + work.units, work.name
        self._flops += work.flops

    def read(self) -> dict[str, float]:
        """Figures since the last reset: `tokens_per_s` (or what the units are), `memory_mib` at most, `checkpoint_wait` as the
        share of time in which that was waited for, `tflops_per_worker` and `mfu` where they are known.
        """
        seconds = time.monotonic() - self._began
        figures = {
            f"{self._name}_per_s": self._units / seconds,
            "memory_mib": _peak_memory_mib(self._device),
            **{f"{what}_wait": waited / seconds for what, waited in self._waited_s.items()},
        }
        if self._flops:
            tflops = self._flops / seconds / self._num_workers / 1e12
            figures["tflops_per_worker"] = tflops
            if self._peak_tflops is not None:
                figures["mfu"] = tflops / self._peak_tflops
        return figures

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What the block takes is no part of the training."""
        began = time.monotonic()
        yield
        self._began += time.monotonic() - began

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """What the block takes is waited for, while nothing is trained."""
        began = time.monotonic()
        yield
        self._waited_s[what] = self._waited_s.get(what, 0.0) + time.monotonic() - began

    def reset(self) -> None:
        """Count from now on."""
        self._began, self._units, self._flops = time.monotonic(), 0, 0.0
        self._waited_s = {}


def _peak_memory_mib(device: torch.device) -> float:
    """The most memory in use so far: the GPU's, or this process' own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
