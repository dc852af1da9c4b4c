"""Direct preference optimisation: of two drawings for one prompt, make the better one likelier than the weights that it begins
with did, and the other one less likely; and go on predicting the next token of the better one.

A row of the data is a pair: the document of the chosen generation, then that of the rejected one, as the very tokens that
were sampled. Documents see nothing of each other, so the pair goes through the network in one pass. Dropout is off: the
reference has none, and noise in one of the two would be taken for a preference.

Paper: Emu3 report, section 2.5.1 names the DPO loss with next-token prediction; Rafailov et al. 2023 is the loss.

Shapes: B pairs, 2 chosen and rejected, L tokens, D hidden, V vocabulary, N tokens that count.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model.transformer import Transformer, TransformerConfig
from model.weights import describe_language_model
from schemas.document import TokenWeights
from schemas.errors import ConfigError, SchemaError
from schemas.recipe import later_option
from train.adapter import AdapterConfig, adapter_off, save_trained
from train.batches import Rows, SequenceData, SequenceFile, open_sequences, token_batch
from train.files import publish_file
from train.head_loss import HeadLossConfig, token_nll
from train.language import (
    LanguageExecutionConfig,
    Passed,
    SequenceLoss,
    Start,
    build_transformer,
    check_adapter,
    check_fits,
    check_held_out,
    check_split,
    due_samples,
    held_out_terms,
    pass_through,
)
from train.launch import run_training, training_identity
from train.loop import TrainingConfig, WeightsOnly
from train.losses import Term
from train.mesh import Mesh
from train.meter import Work
from train.parallelize import barrier, broadcast_int, rank, sum_of_rows
from train.planner import Workload
from train.progress import OnProgress, TrainingResult
from train.samples import Sample, check_samples

OBJECTIVE = "dpo"
REFERENCE_FILE = "reference.safetensors"
Counted = Literal["codes", "completion"]
WEIGHTS = {"codes": TokenWeights(1.0, 0.0, 0.0), "completion": TokenWeights(1.0, 1.0, 1.0)}


class DpoConfig(TrainingConfig):
    """Options of a preference training. The architecture is that of the weights that it begins with.

    All values are ours: the paper names the two losses and no number.
    """

    beta: float = Field(default=0.1, gt=0)
    """How much a nat counts by which a drawing becomes likelier than it was."""
    sft_weight: float = Field(default=1.0, ge=0)
    """Of the cross-entropy of the chosen drawing's next tokens, a mean over tokens and then over pairs."""
    counted: Counted = "codes"
    """Which tokens a drawing's probability is made of: `codes`, which the model had to choose, or the whole `completion` with
    the EOL, EOF, EOI and EOS that the grammar forces. The prompt and frames that were given never count."""
    normalise_length: bool = False
    """Whether a drawing's log-probability is divided by its number of tokens, for pairs of unequal size; then raise beta."""
    reference: Literal["stored", "copy", "base"] = "stored"
    """The log-probabilities of the weights that it begins with: worked out before the first step and `stored`, or worked out
    at each step by a frozen `copy`, which takes its room in memory and a quarter more time, or by the `base` of an adapter,
    which is there already: the model with its adapter switched off."""
    adapter: AdapterConfig | None = later_option(None)
    """What is trained in place of the weights that it begins with, if not these themselves."""
    execution: LanguageExecutionConfig = LanguageExecutionConfig()

    @model_validator(mode="after")
    def _check_head_loss(self) -> Self:
        if self.execution.head_loss.kind != "chunked":
            raise ValueError(
                f"found head_loss.kind {self.execution.head_loss.kind!r}, expected 'chunked': the others may round "
                "log-probabilities to the type of the weights, a nat and more for a picture"
            )
        if self.execution.layout.context > 1:
            raise ValueError("found layout.context, expected 1: a pair's probabilities are sums over all of its tokens")
        if self.reference == "copy" and not self.execution.layout.is_whole:
            raise ValueError("found reference 'copy' and a layout, expected 'stored': the copy is held whole")
        return self

    @model_validator(mode="after")
    def _check_adapter(self) -> Self:
        check_adapter(self.adapter, self.execution, self.optim)
        if self.adapter is None and self.reference == "base":
            raise ValueError("found reference 'base' and no adapter, expected 'stored': the weights themselves change")
        if self.adapter is not None and self.adapter.dropout:
            raise ValueError(
                f"found adapter.dropout {self.adapter.dropout}, expected 0: the reference has none, and noise in one of "
                "the two would be taken for a preference"
            )
        return self

    def workload(self, architecture: TransformerConfig, pair_len: int) -> Workload:
        """What a worker is to compute with pairs of this length, as the planner asks it."""
        load = self.execution.workload(architecture, self.batch_size, pair_len, self.adapter)
        return replace(load, is_whole_rows=True, has_frozen_copy=self.reference == "copy")


def sequence_log_probs(passed: Passed, config: HeadLossConfig) -> tuple[Tensor, Tensor]:
    """What the network made of pairs -> log-probabilities of both documents (B, 2), float64 with gradients, and how many
    tokens they are sums of (B, 2). Tokens count whose weight is not 0.

    Each token's is float32, whatever the weights are. Their sums are float64: those of a picture are near 100,000 nats, where
    float32 goes in steps of 0.008, and differences of such sums are what is learnt.
    """
    batch = passed.batch
    counted_N = batch.weights_BL.flatten().nonzero().squeeze(1)
    hidden_ND = passed.hidden_BLD.flatten(0, 1).index_select(0, counted_N)
    nll_N = token_nll(hidden_ND, passed.head_VD, batch.labels_BL.flatten()[counted_N], config, passed.shard)
    num_pairs = len(batch.tokens_BL)
    pair_B1 = torch.arange(num_pairs, device=counted_N.device).unsqueeze(1)
    document_N = (2 * pair_B1 + batch.document_ids_BL).flatten()[counted_N]
    counts = torch.bincount(document_N, minlength=2 * num_pairs)
    sums = torch.stack([-part.sum() for part in nll_N.double().split(counts.tolist())])
    return sums.view(num_pairs, 2), counts.view(num_pairs, 2)


def preference_terms(
    log_probs_B2: Tensor, reference_B2: Tensor, counts_B2: Tensor, config: DpoConfig
) -> dict[str, Term]:
    """Log-probabilities of chosen and rejected documents, those of the reference, and their tokens -> the terms, means over
    pairs: `loss`, of `dpo` and `next_token`; `accuracy`, the share of pairs that the model has in the right order against the
    reference, and by how much (`margin`); and the nats by which documents have become likelier (`chosen_drift`,
    `rejected_drift`).
    """
    drift_B2 = log_probs_B2 - reference_B2
    scores_B2 = config.beta * (drift_B2 / counts_B2 if config.normalise_length else drift_B2)
    margin_B = scores_B2[:, 0] - scores_B2[:, 1]
    dpo_B = -F.logsigmoid(margin_B)
    next_token_B = -log_probs_B2[:, 0] / counts_B2[:, 0]
    figures = {
        "loss": dpo_B + config.sft_weight * next_token_B,
        "dpo": dpo_B,
        "next_token": next_token_B,
        "accuracy": (margin_B > 0).double(),
        "margin": margin_B,
        "chosen_drift": drift_B2[:, 0],
        "rejected_drift": drift_B2[:, 1],
    }
    num_pairs = torch.tensor(float(len(margin_B)), device=margin_B.device)
    return {name: Term(figure_B.sum(), num_pairs) for name, figure_B in figures.items()}


@dataclass(frozen=True)
class DpoObjective(WeightsOnly):
    """Pairs -> the preference loss of a transformer, which begins with the weights of `start`. `storage` is the training's
    own folder.
    """

    config: DpoConfig
    data: SequenceData
    begin: Start
    storage: Path
    held_out: SequenceData | None = None

    def num_rows(self) -> int:
        """Pairs of the data."""
        return len(self._file())

    def build_model(self, mesh: Mesh) -> nn.Module:
        """A transformer of the weights to begin with, without dropout.

        Raises: ConfigError if the training does not fit into the memory of this worker's GPU.
        """
        architecture, _, _ = describe_language_model(self.begin.folder)
        check_fits(self.config.workload(architecture, self.data.context_len), mesh)
        return load_start(self.begin.folder, mesh, self.data.vocabulary.pad, self.config.adapter)

    def parts(self, rows: Rows) -> Sequence[Rows]:
        """Pairs in groups of `rows_at_once`."""
        return self.config.execution.groups(rows)

    def start(self, model: nn.Module, mesh: Mesh) -> None:
        """Work the reference's log-probabilities out while the model still is the reference."""
        if self.config.reference != "stored" or broadcast_int(int(self.reference_file.exists())):
            return
        found_N2 = self._measure(model, mesh)
        stored_reference.cache_clear()
        if rank() == 0:
            with publish_file(self.reference_file) as draft:
                save_file({"log_probs": found_N2}, draft, metadata=self._facts())
                draft.chmod(0o644)  # safetensors makes it private
        barrier()

    def loss(self, model: nn.Module, rows: Rows, step: int, mesh: Mesh, state: dict[str, Tensor]) -> dict[str, Term]:
        """Pairs -> the terms of `preference_terms`."""
        log_probs_B2, counts_B2 = self._log_probs(model, rows, mesh)
        return preference_terms(log_probs_B2, self._reference(model, rows, mesh), counts_B2, self.config)

    def evaluate(self, model: nn.Module, mesh: Mesh) -> dict[str, Term]:
        """The next-token loss of held-out sequences, as in pretraining: what preferences must not cost."""
        if self.held_out is None:
            return {}
        return held_out_terms(
            model, self.held_out, SequenceLoss(TokenWeights(), "weights", self.config.execution), mesh
        )

    def samples(self, model: nn.Module, done: int, mesh: Mesh) -> list[Sample]:
        """Pictures of its prompts."""
        return due_samples(model, self.data, self.config, done, mesh)

    def work(self, rows: Rows) -> Work:
        """Tokens of pairs."""
        file = self._file()
        return Work(sum(len(file.tokens(int(row))) for row in rows), "tokens")

    def export(self, model: nn.Module, folder: Path) -> None:
        """Weights, vocabulary and text tokenizer as a folder; an adapter merged into the weights, and on its own."""
        assert isinstance(model, Transformer)
        save_trained(folder, model, self.begin.folder, self.data.vocabulary, self.data.text)

    @property
    def reference_file(self) -> Path:
        """Where the reference's log-probabilities are kept."""
        return self.storage / REFERENCE_FILE

    def _log_probs(self, model: nn.Module, rows: Rows, mesh: Mesh) -> tuple[Tensor, Tensor]:
        file = self._file()
        longest = max(len(file.tokens(int(row))) for row in rows)
        data = replace(self.data, context_len=longest)
        length = mesh.layout.row_length(longest)
        batch = token_batch(file, rows, data, WEIGHTS[self.config.counted], length).to(mesh.device)
        return sequence_log_probs(pass_through(model, batch, mesh), self.config.execution.head_loss)

    @torch.no_grad()
    def _reference(self, model: nn.Module, rows: Rows, mesh: Mesh) -> Tensor:
        if self.config.reference == "stored":
            return stored_reference(self.reference_file, tuple(self._facts().items()))[rows].to(mesh.device)
        if self.config.reference == "base":
            with adapter_off(model):
                return self._log_probs(model, rows, mesh)[0]
        copy = _frozen_copy(self.begin, mesh, self.data.vocabulary.pad)
        return self._log_probs(copy, rows, mesh)[0]

    @torch.no_grad()
    def _measure(self, model: nn.Module, mesh: Mesh) -> Tensor:
        """Log-probabilities of all pairs (num_rows, 2), float64, by all workers together."""
        num_pairs = self.num_rows()
        size = self.config.execution.rows_at_once or -(-self.config.batch_size // mesh.data_size)
        found_N2 = torch.zeros(num_pairs, 2, dtype=torch.float64)
        for first in range(0, num_pairs, size * mesh.data_size):
            places = first + mesh.data_rank * size + np.arange(size)
            # Beyond the end from the start again: workers that share weights take equally many passes.
            measured_B2, _ = self._log_probs(model, places % num_pairs, mesh)
            is_new = places < num_pairs
            found_N2[places[is_new]] = measured_B2.cpu()[torch.from_numpy(is_new)]
        return sum_of_rows(found_N2, mesh.layout)

    def _facts(self) -> dict[str, str]:
        """What stored log-probabilities depend on."""
        return {"weights": self.begin.digest, "data": self.data.sha256, "counted": self.config.counted}

    def _file(self) -> SequenceFile:
        return open_sequences(self.data.path)


def load_start(folder: Path, mesh: Mesh, pad_token: int, adapter: AdapterConfig | None = None) -> Transformer:
    """A folder of ours, or a published checkpoint -> this worker's part of the transformer, without dropout, and with a fresh
    adapter if one is to be trained.
    """
    config, _, _ = describe_language_model(folder)
    config = config.model_copy(update={"dropout": 0.0})
    return build_transformer(config, mesh, folder, pad_token=pad_token, adapter=adapter)


@lru_cache(maxsize=1)
def _frozen_copy(start: Start, mesh: Mesh, pad_token: int) -> Transformer:
    return load_start(start.folder, mesh, pad_token).eval().requires_grad_(False)


@lru_cache(maxsize=1)
def stored_reference(path: Path, facts: tuple[tuple[str, str], ...]) -> Tensor:
    """A reference file and what it must be of -> log-probabilities of chosen and rejected documents (num_rows, 2).

    Raises: ConfigError if it is gone, or of other weights or pairs: the model is no longer the reference, so it cannot be
        worked out again.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            found, log_probs_N2 = handle.metadata(), handle.get_tensor("log_probs")
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"the reference's log-probabilities {path} cannot be read ({error}): remove {path.parent} to begin anew"
        ) from error
    if found != dict(facts):
        raise ConfigError(
            f"found log-probabilities of {found} in {path}, expected {dict(facts)}: remove {path.parent} to begin anew"
        )
    reference_N2: Tensor = log_probs_N2
    return reference_N2


def train_preferences(
    config: DpoConfig,
    data: SequenceData,
    storage: Path,
    *,
    start: Start,
    held_out: SequenceData | None = None,
    on_progress: OnProgress | None = None,
) -> TrainingResult:
    """Pairs -> a language model in `storage` that prefers what was chosen; at once if `storage` already holds it finished.

    Raises: ConfigError if options, data, start, folder or cluster do not fit one another.
    """
    check_pairs(data, start)
    architecture, _, _ = describe_language_model(start.folder)
    try:
        check_split(architecture, config.execution.layout)
    except ValueError as error:
        raise ConfigError(f"{error}, of the weights in {start.folder}") from error
    if held_out is not None:
        check_held_out(held_out, data)
    if config.execution.samples is not None:
        check_samples(config.execution.samples, data, architecture)
    objective = DpoObjective(config, data, start, storage.absolute(), held_out)
    identity = training_identity(OBJECTIVE, config, data.data_id, data.sha256, start.digest)
    return run_training(objective, identity, storage, on_progress)


def check_pairs(data: SequenceData, start: Start) -> None:
    """Raises: ConfigError if there are no pairs, if they are written in other ids than those that the weights know, or if a
    document is longer than they can see; SchemaError if a row is no pair.
    """
    config, vocabulary, text = describe_language_model(start.folder)
    if not data.is_written_in(vocabulary, text):
        raise ConfigError(
            f"the pairs {data.data_id} are written in {data.vocabulary}, and {start.folder} knows {vocabulary}, or another "
            "text tokenizer: begin with the checkpoint that drew them, or one that was trained from it"
        )
    file = open_sequences(data.path)
    if len(file) == 0:
        raise ConfigError(f"found no pair in {data.path}: prefer among more generations")
    for row in range(len(file)):
        lengths = file.document_lengths(row)
        if len(lengths) != 2 or len(file.answers(row)) != 2:
            raise SchemaError(f"row {row} of {data.path} holds {len(lengths)} documents, expected chosen and rejected")
        if lengths.max() > config.max_position_embeddings:
            raise ConfigError(
                f"pair {row} of {data.data_id} holds a document of {lengths.max()} tokens, expected at most "
                f"{config.max_position_embeddings}, the model's max_position_embeddings, and none is cut: `outback prefer` "
                f"with --set context_len={config.max_position_embeddings} leaves such pairs out"
            )
