"""Pre-training of the language model: next-token prediction over packed sequences of text, images and video.

Both stages of the published recipe are this objective with other data: stage 1 text and images at context 5120, stage 2
video as well at context 131072.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from model.transformer import TRANSFORMER_SIZES, Transformer, TransformerConfig
from model.weights import save_language_model
from schemas.errors import ConfigError
from train.batches import Rows, SequenceData, SequenceFile, open_sequences, token_batch
from train.head_loss import HeadLossConfig
from train.launch import run_training, training_identity
from train.loop import ExecutionConfig, TrainingConfig, WeightsOnly
from train.losses import Term, next_token_loss
from train.progress import OnProgress, TrainingResult

OBJECTIVE = "pretrain"


class LanguageExecutionConfig(ExecutionConfig):
    """How the training of a language model runs, which leaves its result alone up to rounding."""

    head_loss: HeadLossConfig = HeadLossConfig()


class PretrainConfig(TrainingConfig):
    """Options of a pre-training. `model` changes single numbers of the named size; the vocabulary is the data's.

    Paper: Emu3 report, section 2.4: vision tokens weigh 0.5.
    """

    size: str = "8b"
    model: dict[str, int | float] = Field(default_factory=dict)
    vision_weight: float = Field(default=0.5, gt=0, le=1)
    execution: LanguageExecutionConfig = LanguageExecutionConfig()

    @model_validator(mode="after")
    def _check_model(self) -> Self:
        if self.size not in TRANSFORMER_SIZES:
            raise ValueError(f"found the size {self.size!r}, expected one of {', '.join(TRANSFORMER_SIZES)}")
        if "vocab_size" in self.model:
            raise ValueError("found model.vocab_size, which follows from the data: leave it out")
        self.transformer_config(1)
        return self

    def transformer_config(self, vocab_size: int) -> TransformerConfig:
        """The architecture over a vocabulary of this size."""
        base = TRANSFORMER_SIZES[self.size].model_dump()
        return TransformerConfig.model_validate({**base, **self.model, "vocab_size": vocab_size})


@dataclass(frozen=True)
class PretrainObjective(WeightsOnly):
    """Packed rows -> the weighted next-token loss of a transformer."""

    config: PretrainConfig
    data: SequenceData

    def num_rows(self) -> int:
        """Rows of the data."""
        return len(self._file())

    def build_model(self) -> nn.Module:
        """A fresh transformer, whose padding row is zero."""
        vocabulary = self.data.vocabulary
        model = Transformer(self.config.transformer_config(vocabulary.size))
        model.init_weights(vocabulary.pad)
        return model

    def loss(
        self, model: nn.Module, rows: Rows, step: int, device: torch.device, state: dict[str, Tensor]
    ) -> dict[str, Term]:
        """Rows -> `loss`, and the plain cross-entropies of `text` and `vision`."""
        batch = token_batch(self._file(), rows, self.data, self.config.vision_weight).to(device)
        assert isinstance(model, Transformer)
        hidden_BLD = model.hidden(
            batch.tokens_BL, positions_BL=batch.positions_BL, document_ids_BL=batch.document_ids_BL
        )
        offset, how = self.data.vocabulary.vision_offset, self.config.execution.head_loss
        return next_token_loss(hidden_BLD, model.lm_head.weight, batch.labels_BL, batch.weights_BL, offset, how)

    def export(self, model: nn.Module, folder: Path) -> None:
        """Weights, vocabulary and text tokenizer as a folder."""
        assert isinstance(model, Transformer)
        save_language_model(folder, model, self.data.vocabulary, self.data.text)

    def _file(self) -> SequenceFile:
        return open_sequences(self.data.path)


def pretrain(
    config: PretrainConfig, data: SequenceData, storage: Path, *, on_progress: OnProgress | None = None
) -> TrainingResult:
    """Packed sequences -> a trained language model in `storage`; at once if `storage` already holds it finished.

    Raises: ConfigError if options, data, folder or cluster do not fit one another.
    """
    objective = PretrainObjective(config, data)
    longest = config.transformer_config(data.vocabulary.size).max_position_embeddings
    if data.context_len > longest:
        raise ConfigError(
            f"found sequences of {data.context_len} tokens, expected at most {longest}, the model's "
            "max_position_embeddings: pack to a shorter context or raise it"
        )
    if objective.num_rows() == 0:
        raise ConfigError(f"found no sequence in {data.path}: pack a set that holds documents")
    identity = training_identity(OBJECTIVE, config, data.data_id, data.sha256)
    return run_training(objective, identity, storage, on_progress)
