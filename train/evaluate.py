"""The loss of a language model on sequences, its training's own or others in the same ids, without training it."""

import torch

from model.weights import LanguageModel
from schemas.document import TokenWeights
from schemas.errors import ConfigError
from train.batches import SequenceData, open_sequences
from train.language import LanguageExecutionConfig, SequenceLoss, held_out_terms
from train.mesh import LayoutConfig, Mesh


def evaluate_language_model(
    lm: LanguageModel, data: SequenceData, *, rows: int | None = None, rows_at_once: int = 8
) -> dict[str, float]:
    """The first `rows` rows, or all -> `loss`, the mean over all tokens, that of `text` and `vision` tokens, and of each
    `quarter` of the documents, in nats a token. Control tokens count as text.

    Raises: ConfigError if the rows are in other ids than the model knows, longer than its context, or none.
    """
    longest = lm.transformer.config.max_position_embeddings
    if not data.is_written_in(lm.vocabulary, lm.text):
        raise ConfigError(
            f"the sequences {data.data_id} are written in other ids than the model knows: pack them with --like a "
            "sequence set that its training read"
        )
    if data.context_len > longest:
        raise ConfigError(
            f"found sequences of {data.context_len} tokens, expected at most {longest}, the model's context"
        )
    found = len(open_sequences(data.path))
    if found == 0:
        raise ConfigError(f"found no sequence in {data.path}: pack a set that holds documents")
    execution = LanguageExecutionConfig(rows_at_once=rows_at_once, held_out_rows=min(rows or found, found))
    loss = SequenceLoss(TokenWeights(1.0, 1.0, 1.0), "weights", execution)
    mesh = Mesh(LayoutConfig(), next(lm.transformer.parameters()).device)
    lm.transformer.eval()
    with torch.inference_mode():
        terms = held_out_terms(lm.transformer, data, loss, mesh)
    return {name: float(term.total / term.weight) for name, term in terms.items() if term.weight > 0}
