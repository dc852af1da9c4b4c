"""What all trainings of the language model share: how it is spread, what goes through it, and how it is evaluated.

Shapes: B rows, L tokens, D hidden, V vocabulary.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor, nn

from model.transformer import Transformer, TransformerConfig
from model.weights import read_transformer
from schemas.document import TokenWeights
from schemas.errors import ConfigError
from schemas.recipe import later_option
from train.adapter import AdapterConfig, add_adapter
from train.batches import Rows, SequenceData, SequenceFile, TokenBatch, open_sequences, token_batch, worker_share
from train.head_loss import HeadLossConfig, VocabularyShard
from train.loop import ExecutionConfig, TrainingConfig
from train.losses import Normaliser, Term, next_token_loss, sum_of
from train.mesh import LayoutConfig, Mesh
from train.meter import Work, transformer_flops
from train.optim import OptimConfig
from train.parallelize import rank
from train.planner import Workload, check_memory, gpu_memory
from train.samples import Sample, SamplesConfig, draw_samples
from train.sharding import gather_model, head_of, place_transformer


class LanguageExecutionConfig(ExecutionConfig):
    """How the training of a language model runs, which leaves its result alone up to rounding."""

    head_loss: HeadLossConfig = later_option(HeadLossConfig())
    rows_at_once: int | None = later_option(None, ge=1)
    """Rows that go through the network together on a worker, whose memory it sets; gradients are added. None: all of them."""
    layout: LayoutConfig = later_option(LayoutConfig())
    samples: SamplesConfig | None = later_option(None)
    """What the model draws now and then, to be looked at."""

    @model_validator(mode="after")
    def _check_head(self) -> Self:
        if self.layout.tensor > 1 and self.head_loss.kind != "chunked":
            raise ValueError(f"found head_loss.kind {self.head_loss.kind!r} with layout.tensor, expected 'chunked'")
        return self

    @property
    def spread(self) -> LayoutConfig:
        """How the network is spread over the workers."""
        return self.layout

    def groups(self, rows: Rows) -> list[Rows]:
        """A worker's rows of a step in groups of `rows_at_once`."""
        size = self.rows_at_once or len(rows)
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def workload(
        self, architecture: TransformerConfig, batch_size: int, context_len: int, adapter: AdapterConfig | None = None
    ) -> Workload:
        """What a worker is to compute with rows of this length, as the planner asks it."""
        rows = math.ceil(batch_size / self.layout.readers(self.num_workers))
        return Workload(
            architecture,
            self.layout,
            self.head_loss,
            self.num_workers,
            rows,
            min(self.rows_at_once or rows, rows),
            self.layout.row_length(context_len),
            adapter,
            draws_samples=self.samples is not None,
        )


def check_split(architecture: TransformerConfig, layout: LayoutConfig) -> None:
    """Raises: ValueError if layers cannot be shared out as `layout.tensor` asks."""
    keys, inner, tensor = architecture.num_kv_heads, architecture.intermediate_size, layout.tensor
    if keys % tensor or inner % tensor:
        raise ValueError(
            f"found {keys} key-value heads and an intermediate_size of {inner}, expected multiples of layout.tensor {tensor}"
        )


def check_adapter(adapter: AdapterConfig | None, execution: LanguageExecutionConfig, optim: OptimConfig) -> None:
    """Raises: ValueError for an adapter in a layout that PEFT's layers do not know, updated by Muon, or with samples that need
    its frozen weights in one place.
    """
    if adapter is None:
        return
    layout = execution.layout
    if execution.samples is not None and (not layout.is_whole or layout.compile):
        raise ValueError(
            "found samples, an adapter and a layout, expected the whole network in float32 on each worker, not compiled: leave "
            "the samples out, and look at what `outback export TRAINING FOLDER` writes meanwhile"
        )
    if optim.matrices == "muon":
        raise ValueError("found optim.matrices 'muon' and an adapter, expected 'adamw': Muon is for whole matrices")
    if layout.float8 != "off":
        raise ValueError(
            f"found an adapter and layout.float8 {layout.float8!r}, expected 'off': PEFT's layers multiply as they are"
        )
    if layout.tensor > 1:
        raise ValueError(
            f"found an adapter and layout.tensor {layout.tensor}, expected 1: PEFT's layers cannot be split; use layout.shard, "
            "which an adapter rarely needs, or train without one"
        )


@dataclass(frozen=True)
class Start:
    """Weights to begin with: a folder of ours or as published, and the digest of its tensors."""

    folder: Path
    digest: str


@dataclass(frozen=True)
class SequenceLoss:
    """How the tokens of sequences weigh, what their loss is divided by, and how it is worked out."""

    weights: TokenWeights
    normalise: Normaliser
    execution: LanguageExecutionConfig


@dataclass(frozen=True)
class Passed:
    """What the network made of this worker's tokens: hidden states (B, L, D), the rows of the head that it holds (V, D), and
    which they are.
    """

    hidden_BLD: Tensor
    head_VD: Tensor
    shard: VocabularyShard | None
    batch: TokenBatch


def build_transformer(
    config: TransformerConfig,
    mesh: Mesh,
    weights: Path | None,
    *,
    pad_token: int,
    adapter: AdapterConfig | None = None,
) -> Transformer:
    """This worker's part of a transformer with the weights of a folder, or fresh ones, whose padding row is zero. With an
    adapter these are frozen, and what is trained is a fresh adapter.
    """
    with torch.device("meta"):
        model = Transformer(config)
    given = model.fresh_weights(pad_token) if weights is None else read_transformer(model, weights).items()
    if adapter is not None:
        given = add_adapter(model, adapter, given, getattr(torch, mesh.layout.compute))
    place_transformer(model, given, mesh)
    return model


def check_fits(load: Workload, mesh: Mesh) -> None:
    """Raises: ConfigError if a training does not fit into the memory of this worker's GPU."""
    if mesh.device.type == "cuda":
        check_memory(load, gpu_memory(mesh.device), f"the GPU {mesh.device}")


def pass_through(model: nn.Module, batch: TokenBatch, mesh: Mesh) -> Passed:
    """Whole rows on this worker's device -> what the network makes of this worker's tokens of them."""
    batch, plan = mesh.share_context(batch)
    assert isinstance(model, Transformer)
    documents_BL = batch.document_ids_BL if plan is None else None
    hidden_BLD = model.hidden(batch.tokens_BL, positions_BL=batch.positions_BL, document_ids_BL=documents_BL, plan=plan)
    return Passed(*head_of(model, hidden_BLD), batch)


def sequence_terms(
    model: nn.Module, data: SequenceData, rows: Rows, loss: SequenceLoss, mesh: Mesh, num_counted: int | None = None
) -> dict[str, Term]:
    """The terms of rows of packed sequences, or of the first `num_counted` of them."""
    length = mesh.layout.row_length(data.context_len)
    batch = token_batch(open_sequences(data.path), rows, data, loss.weights, length).to(mesh.device)
    if num_counted is not None:
        batch.weights_BL[max(0, num_counted) :] = 0.0
    passed = pass_through(model, batch, mesh)
    return next_token_loss(
        passed.hidden_BLD,
        passed.head_VD,
        passed.batch.labels_BL,
        passed.batch.weights_BL,
        data.vocabulary.vision_offset,
        loss.execution.head_loss,
        loss.normalise,
        passed.shard,
        passed.batch.quarters_BL,
    )


def held_out_terms(model: nn.Module, data: SequenceData, loss: SequenceLoss, mesh: Mesh) -> dict[str, Term]:
    """The terms of this worker's share of the first `held_out_rows` rows."""
    rows = np.arange(min(len(open_sequences(data.path)), loss.execution.held_out_rows))
    share = worker_share(rows, mesh.data_rank, mesh.data_size)
    # All workers go through the network equally often: those with a row less see one again, which counts nothing.
    num_counted, num_equal = len(share), -(-len(rows) // mesh.data_size)
    share = np.concatenate([share, rows[: num_equal - num_counted]])
    found, start = [], 0
    for group in loss.execution.groups(share):
        found.append(sequence_terms(model, data, group, loss, mesh, num_counted - start))
        start += len(group)
    return {name: sum_of([terms[name] for terms in found]) for name in found[0]}


def due_samples(model: nn.Module, data: SequenceData, config: TrainingConfig, done: int, mesh: Mesh) -> list[Sample]:
    """What a model draws after these many steps on the first worker, nothing if it is not asked for now. Called by all workers:
    where they hold parts of the network, the first one gets a whole copy for a while, in what is computed in.
    """
    assert isinstance(config.execution, LanguageExecutionConfig)
    samples = config.execution.samples
    if samples is None or not config.is_due(samples.every, done):
        return []
    whole = gather_model(model, mesh)
    if rank() != 0:
        return []
    assert isinstance(whole, Transformer)
    if not mesh.layout.is_whole:
        whole = whole.to(mesh.device, getattr(torch, mesh.layout.compute))
    return draw_samples(whole, data, samples)


def token_work(file: SequenceFile, rows: Rows, config: TransformerConfig, adapter: AdapterConfig | None = None) -> Work:
    """Tokens of rows, without padding, and the operations that a training step takes for them."""
    lengths = np.concatenate([file.document_lengths(int(row)) for row in rows])
    return Work(int(lengths.sum()), "tokens", transformer_flops(config, lengths, adapter))


def check_held_out(held_out: SequenceData, data: SequenceData) -> None:
    """Raises: ConfigError if the held-out data is written in other ids, or holds what is trained on."""
    if not held_out.is_written_in(data.vocabulary, data.text):
        raise ConfigError(
            f"the held-out sequences {held_out.data_id} are written in other ids than {data.data_id}: pack them with --like it"
        )
    file = open_sequences(held_out.path)
    if not len(file):
        raise ConfigError(f"found no sequence in {held_out.path}: hold out a set that holds documents")
    shared = file.item_ids() & open_sequences(data.path).item_ids()
    if shared:
        raise ConfigError(
            f"found {len(shared)} documents in both {data.data_id} and the held-out {held_out.data_id}, such as "
            f"{min(shared)}: hold out others"
        )
