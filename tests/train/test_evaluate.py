"""What a language model's loss on other sequences is: against plain logits, and of what it cannot read."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model.weights import LanguageModel
from schemas.errors import ConfigError
from schemas.vocabulary import Vocabulary
from tests.model.small_lm import random_lm
from tests.train.small_data import CONTEXT_LEN, VOCABULARY, sequence_data, text_tokenizer
from train.batches import open_sequences
from train.evaluate import evaluate_language_model


@pytest.fixture
def lm() -> LanguageModel:
    return random_lm(VOCABULARY, text=text_tokenizer(), max_position_embeddings=CONTEXT_LEN)


def test_losses_are_those_of_each_document_read_alone(lm: LanguageModel, tmp_path: Path) -> None:
    data = sequence_data(tmp_path, num_rows=5)
    file = open_sequences(data.path)
    losses: dict[str, list[float]] = {"text": [], "vision": []}
    for row in range(len(file)):
        tokens, ends = file.tokens(row), np.cumsum(file.document_lengths(row))
        for document in np.split(tokens, ends)[: len(ends)]:
            ids = torch.from_numpy(document.astype(np.int64))
            with torch.no_grad():
                found = F.cross_entropy(lm.transformer(ids[None])[0, :-1], ids[1:], reduction="none")
            for token, loss in zip(ids[1:].tolist(), found.tolist(), strict=True):
                losses["vision" if token >= VOCABULARY.vision_offset else "text"].append(loss)
    figures = evaluate_language_model(lm, data, rows_at_once=2)
    assert figures["text"] == pytest.approx(np.mean(losses["text"]), rel=1e-5)
    assert figures["vision"] == pytest.approx(np.mean(losses["vision"]), rel=1e-5)
    assert figures["loss"] == pytest.approx(np.mean(losses["text"] + losses["vision"]), rel=1e-5)


def test_the_first_rows_alone(lm: LanguageModel, tmp_path: Path) -> None:
    data = sequence_data(tmp_path, num_rows=5)
    first = evaluate_language_model(lm, data, rows=2)
    assert first == pytest.approx(evaluate_language_model(lm, data, rows=2, rows_at_once=1), rel=1e-5)
    assert first["loss"] != pytest.approx(evaluate_language_model(lm, data)["loss"], rel=1e-3)
    assert evaluate_language_model(lm, data, rows=99) == evaluate_language_model(lm, data)


def test_what_the_model_cannot_read_is_refused(lm: LanguageModel, tmp_path: Path) -> None:
    data = sequence_data(tmp_path)
    with pytest.raises(ConfigError, match="other ids"):
        evaluate_language_model(lm, replace(data, vocabulary=Vocabulary(num_text=256, num_codes=32)))
    with pytest.raises(ConfigError, match=f"at most {CONTEXT_LEN}"):
        evaluate_language_model(lm, replace(data, context_len=CONTEXT_LEN + 1))
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match="found no sequence"):
        evaluate_language_model(lm, sequence_data(tmp_path / "none", num_rows=0))
