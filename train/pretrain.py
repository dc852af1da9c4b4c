"""Pre-training of the language model: next-token prediction over packed sequences of text, images and video.

Both stages of the published recipe are this objective with other data: stage 1 text and images at context 5120, stage 2
video as well at context 131072.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor, nn

from model.transformer import TRANSFORMER_SIZES, Transformer, TransformerConfig
from model.weights import describe_language_model
from schemas.document import TokenWeights
from schemas.errors import ConfigError
from schemas.recipe import later_option
from train.adapter import AdapterConfig, save_trained
from train.batches import Rows, SequenceData, SequenceFile, open_sequences, token_batch
from train.language import (
    LanguageExecutionConfig,
    SequenceLoss,
    Start,
    build_transformer,
    check_adapter,
    check_fits,
    check_held_out,
    check_split,
    due_samples,
    held_out_terms,
    sequence_terms,
    token_work,
)
from train.launch import run_training, training_identity
from train.loop import TrainingConfig, WeightsOnly
from train.losses import Normaliser, Term
from train.mesh import Mesh
from train.meter import Work
from train.planner import Workload
from train.progress import OnProgress, TrainingResult
from train.samples import Sample, check_samples

OBJECTIVE = "pretrain"
MAY_CHANGE = frozenset({"dropout", "max_position_embeddings"})  # from one stage to the next


class PretrainConfig(TrainingConfig):
    """Options of a pre-training. `model` changes single numbers of the named size; the vocabulary is the data's.

    Paper: Emu3 report, section 2.4: vision tokens weigh 0.5. A weight of 0 is not learnt, as in section 2.5: quality tuning
    learns vision tokens alone, understanding learns none.
    """

    size: str = "8b"
    model: dict[str, int | float] = Field(default_factory=dict)
    vision_weight: float = Field(default=0.5, ge=0, le=1)
    structure_weight: float = later_option(1.0, ge=0, le=1)
    """Of EOL, EOF and EOI, which stand between codes."""
    text_weight: float = later_option(1.0, ge=0, le=1)
    normalise: Normaliser = later_option("weights")
    """What the weighted sum is divided by: the sum of weights, or the number of tokens that have one."""
    adapter: AdapterConfig | None = later_option(None)
    """What is trained in place of the weights that it begins with, if not these themselves."""
    execution: LanguageExecutionConfig = LanguageExecutionConfig()

    @model_validator(mode="after")
    def _check_model(self) -> Self:
        if self.size not in TRANSFORMER_SIZES:
            raise ValueError(f"found the size {self.size!r}, expected one of {', '.join(TRANSFORMER_SIZES)}")
        if "vocab_size" in self.model:
            raise ValueError("found model.vocab_size, which follows from the data: leave it out")
        if not (self.vision_weight or self.text_weight):
            raise ValueError("found vision_weight and text_weight 0, expected one of them to be learnt")
        check_split(self.transformer_config(1), self.execution.layout)
        check_adapter(self.adapter, self.execution, self.optim)
        return self

    @property
    def token_weights(self) -> TokenWeights:
        """What each kind of token weighs."""
        return TokenWeights(self.vision_weight, self.structure_weight, self.text_weight)

    @property
    def loss(self) -> SequenceLoss:
        """How tokens weigh, and how their loss is worked out."""
        return SequenceLoss(self.token_weights, self.normalise, self.execution)

    def transformer_config(self, vocab_size: int) -> TransformerConfig:
        """The architecture over a vocabulary of this size."""
        base = TRANSFORMER_SIZES[self.size].model_dump()
        return TransformerConfig.model_validate({**base, **self.model, "vocab_size": vocab_size})

    def workload(self, vocab_size: int, context_len: int) -> Workload:
        """What a worker is to compute with rows of this length, as the planner asks it."""
        architecture = self.transformer_config(vocab_size)
        return self.execution.workload(architecture, self.batch_size, context_len, self.adapter)


@dataclass(frozen=True)
class PretrainObjective(WeightsOnly):
    """Packed rows -> the weighted next-token loss of a transformer, which begins with `weights`, a folder's, or afresh."""

    config: PretrainConfig
    data: SequenceData
    weights: Path | None = None
    held_out: SequenceData | None = None

    def num_rows(self) -> int:
        """Rows of the data."""
        return len(self._file())

    def holds_something_to_learn(self) -> bool:
        """Whether a row of the data has a token that weighs something; the first usually has."""
        weights = self.config.token_weights
        return any(
            bool(token_batch(self._file(), np.array([row]), self.data, weights).weights_BL.any())
            for row in range(self.num_rows())
        )

    def build_model(self, mesh: Mesh) -> nn.Module:
        """A transformer of the weights to begin with, or a fresh one, whose padding row is zero.

        Raises: ConfigError if the training does not fit into the memory of this worker's GPU.
        """
        vocabulary = self.data.vocabulary
        check_fits(self.config.workload(vocabulary.size, self.data.context_len), mesh)
        return build_transformer(
            self.config.transformer_config(vocabulary.size),
            mesh,
            self.weights,
            pad_token=vocabulary.pad,
            adapter=self.config.adapter,
        )

    def parts(self, rows: Rows) -> Sequence[Rows]:
        """Rows in groups of `rows_at_once`."""
        return self.config.execution.groups(rows)

    def loss(self, model: nn.Module, rows: Rows, step: int, mesh: Mesh, state: dict[str, Tensor]) -> dict[str, Term]:
        """Rows -> `loss`, and the plain cross-entropies of `text`, `vision` and each `quarter` of the documents."""
        return sequence_terms(model, self.data, rows, self.config.loss, mesh)

    def evaluate(self, model: nn.Module, mesh: Mesh) -> dict[str, Term]:
        """The same figures for the first rows of the held-out data."""
        if self.held_out is None:
            return {}
        return held_out_terms(model, self.held_out, self.config.loss, mesh)

    def samples(self, model: nn.Module, done: int, mesh: Mesh) -> list[Sample]:
        """Pictures of its prompts."""
        return due_samples(model, self.data, self.config, done, mesh)

    def work(self, rows: Rows) -> Work:
        """Tokens of rows, without padding, and the operations that they take."""
        architecture = self.config.transformer_config(self.data.vocabulary.size)
        return token_work(self._file(), rows, architecture, self.config.adapter)

    def export(self, model: nn.Module, folder: Path) -> None:
        """Weights, vocabulary and text tokenizer as a folder; an adapter merged into the weights, and on its own."""
        assert isinstance(model, Transformer)
        save_trained(folder, model, self.weights, self.data.vocabulary, self.data.text)

    def _file(self) -> SequenceFile:
        return open_sequences(self.data.path)


def pretrain(
    config: PretrainConfig,
    data: SequenceData,
    storage: Path,
    *,
    start: Start | None = None,
    held_out: SequenceData | None = None,
    on_progress: OnProgress | None = None,
) -> TrainingResult:
    """Packed sequences -> a trained language model in `storage`; at once if `storage` already holds it finished. It begins
    with fresh weights, or where `start` ended, and is evaluated on what is held out.

    Raises: ConfigError if options, data, start, folder or cluster do not fit one another.
    """
    if config.adapter is not None and start is None:
        raise ConfigError(
            "found an adapter and no weights to begin with, expected trained ones: beside fresh weights, which would stay as "
            "they are, it learns little. Give --from CHECKPOINT, or leave out the section adapter"
        )
    objective = PretrainObjective(config, data, start.folder if start else None, held_out)
    if held_out is not None:
        check_held_out(held_out, data)
    if start is not None:
        _check_start(start, config, data)
    longest = config.transformer_config(data.vocabulary.size).max_position_embeddings
    if data.context_len > longest:
        raise ConfigError(
            f"found sequences of {data.context_len} tokens, expected at most {longest}, the model's "
            "max_position_embeddings: pack to a shorter context or raise it"
        )
    if config.execution.samples is not None:
        check_samples(config.execution.samples, data, config.transformer_config(data.vocabulary.size))
    if objective.num_rows() == 0:
        raise ConfigError(f"found no sequence in {data.path}: pack a set that holds documents")
    if not objective.holds_something_to_learn():
        raise ConfigError(f"found no token that weighs something in {data.path}: pack other documents, or weigh others")
    identity = training_identity(OBJECTIVE, config, data.data_id, data.sha256, start.digest if start else None)
    return run_training(objective, identity, storage, on_progress)


def _check_start(start: Start, config: PretrainConfig, data: SequenceData) -> None:
    """Raises: ConfigError if the weights are of another architecture than the recipe's, or the sequences are written in
    other ids than those that the weights know.
    """
    found, vocabulary, text = describe_language_model(start.folder)
    if not data.is_written_in(vocabulary, text):
        raise ConfigError(
            f"the sequences {data.data_id} are written in {data.vocabulary}, and {start.folder} knows {vocabulary}, or "
            "another text tokenizer: pack them with --like a sequence set that its training read, or for published weights "
            "with their text tokenizer"
        )
    wanted = config.transformer_config(vocabulary.size)
    other = [
        f"{name} {theirs}, recipe {getattr(wanted, name)}"
        for name, theirs in found.model_dump().items()
        if name not in MAY_CHANGE and theirs != getattr(wanted, name)
    ]
    if other:
        raise ConfigError(f"{start.folder} is another architecture than the recipe's: {'; '.join(other)}")
