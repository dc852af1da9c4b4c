import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from schemas.errors import ConfigError
from tests.train.small_data import VOCABULARY, pretrain_config, sequence_data
from train.batches import SequenceFile, write_sequence_file
from train.pretrain import PretrainConfig, PretrainObjective, pretrain


def test_a_packed_row_costs_what_its_documents_cost_alone(tmp_path: Path) -> None:
    # Independent of packing: each document as a batch of its own, without document ids, positions or padding.
    data = sequence_data(tmp_path, num_rows=3)
    objective = PretrainObjective(pretrain_config(), data)
    torch.manual_seed(0)
    model = objective.build_model().eval()
    terms = objective.loss(model, np.arange(3), 0, torch.device("cpu"), {})
    file = SequenceFile(data.path)
    total = weight = 0.0
    for row in range(3):
        start = 0
        for length in file.document_lengths(row):
            document = torch.from_numpy(file.tokens(row)[start : start + length].astype(np.int64))
            start += int(length)
            log_probs = torch.log_softmax(model(document[None])[0], -1)
            for place, target in enumerate(document[1:].tolist()):
                share = 0.5 if target >= VOCABULARY.vision_offset else 1.0
                total -= share * float(log_probs[place, target])
                weight += share
    assert float(terms["loss"].weight) == weight
    assert float(terms["loss"].total) == pytest.approx(total, rel=1e-5)


def test_the_padding_row_starts_at_zero(tmp_path: Path) -> None:
    model = PretrainObjective(pretrain_config(), sequence_data(tmp_path)).build_model()
    embedding = model.get_parameter("model.embed_tokens.weight")
    assert embedding.shape[0] == VOCABULARY.size
    assert not embedding[VOCABULARY.pad].any()
    assert embedding[VOCABULARY.bos].any()


def test_sequences_longer_than_the_model_sees_are_refused(tmp_path: Path) -> None:
    config = pretrain_config(model={"max_position_embeddings": 32})
    with pytest.raises(ConfigError, match="found sequences of 64 tokens, expected at most 32"):
        pretrain(config, sequence_data(tmp_path), tmp_path / "run")


def test_an_empty_set_is_refused(tmp_path: Path) -> None:
    data = sequence_data(tmp_path)
    path = tmp_path / "empty.arrow"
    write_sequence_file(path, [], [])
    with pytest.raises(ConfigError, match="found no sequence"):
        pretrain(pretrain_config(), dataclasses.replace(data, path=path), tmp_path / "run")


def test_published_defaults_are_the_papers() -> None:
    config = PretrainConfig(steps=1, batch_size=1)
    assert (config.size, config.vision_weight, config.optim.learning_rate) == ("8b", 0.5, 5e-5)
    assert config.transformer_config(184_622).dropout == 0.1


def test_wrong_models_are_refused() -> None:
    with pytest.raises(ValidationError, match="vocab_size"):
        pretrain_config(model={"vocab_size": 7})
    with pytest.raises(ValidationError, match="hidden_dim"):
        pretrain_config(model={"hidden_dim": 7})
    with pytest.raises(ValidationError, match="one row for each worker"):
        pretrain_config(batch_size=1, execution={"num_workers": 2})
