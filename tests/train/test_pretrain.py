import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from model.text_tokenizer import TinyBpe
from model.transformer import Transformer
from model.weights import digest
from schemas.document import TextDocument, write_document
from schemas.errors import ConfigError
from schemas.vocabulary import Vocabulary
from tests.train.small_data import ALONE, VOCABULARY, pretrain_config, sequence_data, text_tokenizer
from tests.train.small_runs import run
from train.batches import SequenceFile, write_sequence_file
from train.head_loss import HeadLossConfig
from train.language import Start
from train.launch import training_identity
from train.losses import Term, next_token_loss
from train.pretrain import PretrainConfig, PretrainObjective, pretrain


def test_a_packed_row_costs_what_its_documents_cost_alone(tmp_path: Path) -> None:
    # Independent of packing: each document as a batch of its own, without document ids, positions or padding.
    data = sequence_data(tmp_path, num_rows=3)
    objective = PretrainObjective(pretrain_config(), data)
    torch.manual_seed(0)
    model = objective.build_model(ALONE).eval()
    terms = objective.loss(model, np.arange(3), 0, ALONE, {})
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
    model = PretrainObjective(pretrain_config(), sequence_data(tmp_path)).build_model(ALONE)
    embedding = model.get_parameter("model.embed_tokens.weight")
    assert embedding.shape[0] == VOCABULARY.size
    assert not embedding[VOCABULARY.pad].any()
    assert embedding[VOCABULARY.bos].any()


def test_sequences_longer_than_the_model_sees_are_refused(tmp_path: Path) -> None:
    config = pretrain_config(model={"max_position_embeddings": 32})
    with pytest.raises(ConfigError, match="found sequences of 64 tokens, expected at most 32"):
        pretrain(config, sequence_data(tmp_path), tmp_path / "run")


def test_a_set_without_anything_that_weighs_is_refused(tmp_path: Path) -> None:
    data = sequence_data(tmp_path)
    text = write_document(TextDocument("red"), VOCABULARY, text_tokenizer())
    segment = {"kind": "text", "item_id": "a", "offset": 0, "length": len(text)}
    write_sequence_file(tmp_path / "texts.arrow", [text], [[segment]])
    only_vision = pretrain_config(text_weight=0.0, structure_weight=0.0)
    with pytest.raises(ConfigError, match="found no token that weighs something"):
        pretrain(only_vision, dataclasses.replace(data, path=tmp_path / "texts.arrow"), tmp_path / "run")


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


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Weights of a short training."""
    folder = tmp_path_factory.mktemp("begun")
    run(PretrainObjective(pretrain_config(steps=2), sequence_data(folder)), folder / "run")
    return Start(folder / "run" / "weights", digest(folder / "run" / "weights"))


def test_a_later_stage_begins_where_the_one_before_ended(begun: Start, tmp_path: Path) -> None:
    config = pretrain_config(steps=30, model={"dropout": 0.3, "max_position_embeddings": 256}, text_weight=0.0)
    objective = PretrainObjective(config, sequence_data(tmp_path), begun.folder)
    model = objective.build_model(ALONE)
    assert digest(model) == begun.digest
    assert isinstance(model, Transformer)
    assert (model.config.dropout, model.config.max_position_embeddings) == (0.3, 256)
    fresh = PretrainObjective(config, sequence_data(tmp_path)).build_model(ALONE)
    assert digest(fresh) != begun.digest


def test_the_identity_of_a_training_names_where_it_began() -> None:
    config = pretrain_config()
    identities = [training_identity("pretrain", config, "data", "sha", start) for start in (None, "a", "b")]
    assert len({identity.config_hash for identity in identities}) == 3
    # Trainings that were begun before there were other starts and weights are still the same trainings.
    assert identities[0].config_hash == "e82bca4267eb766f"


@pytest.mark.parametrize(
    ("model", "said"),
    [({"num_layers": 3}, "num_layers 2, recipe 3"), ({"rope_theta": 7.0}, "rope_theta 1000000.0, recipe 7")],
)
def test_weights_of_another_architecture_are_refused(
    begun: Start, tmp_path: Path, model: dict[str, float], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        pretrain(pretrain_config(model=model), sequence_data(tmp_path), tmp_path / "run", start=begun)


def test_sequences_in_other_ids_are_refused(begun: Start, tmp_path: Path) -> None:
    data = sequence_data(tmp_path)
    other_text = dataclasses.replace(data, text=TinyBpe.train(["another text"] * 3, 260))
    other_codes = dataclasses.replace(data, vocabulary=Vocabulary(256, 32))
    for other in (other_text, other_codes):
        with pytest.raises(ConfigError, match="pack them with --like"):
            pretrain(pretrain_config(), other, tmp_path / "run", start=begun)


def test_only_what_weighs_is_learnt(tmp_path: Path) -> None:
    data = sequence_data(tmp_path)
    rows = np.arange(6)
    terms = {}
    for name, weights in {
        "vision": {"text_weight": 0.0, "structure_weight": 0.0},
        "text": {"vision_weight": 0.0},
    }.items():
        objective = PretrainObjective(pretrain_config(**weights), data)
        torch.manual_seed(0)
        terms[name] = objective.loss(objective.build_model(ALONE), rows, 0, ALONE, {})
    for name, other in (("vision", "text"), ("text", "vision")):
        assert float(terms[name][name].weight) > 0
        assert float(terms[name][other].weight) == 0
    with pytest.raises(ValidationError, match="expected one of them to be learnt"):
        pretrain_config(vision_weight=0.0, text_weight=0.0)


def test_the_loss_is_worked_out_as_the_options_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, rows = sequence_data(tmp_path), np.arange(4)
    asked: list[HeadLossConfig] = []

    def spy(*arguments: Any) -> dict[str, Term]:
        asked.append(arguments[5])
        return next_token_loss(*arguments)

    monkeypatch.setattr("train.language.next_token_loss", spy)
    weights = []
    for options in ({}, {"normalise": "tokens", "execution": {"head_loss": {"kind": "whole"}}}):
        objective = PretrainObjective(pretrain_config(**options), data)
        weights.append(float(objective.loss(objective.build_model(ALONE), rows, 0, ALONE, {})["loss"].weight))
    assert weights[0] < weights[1] == int(weights[1])
    assert [how.kind for how in asked] == ["chunked", "whole"]


def test_wrong_models_are_refused() -> None:
    with pytest.raises(ValidationError, match="vocab_size"):
        pretrain_config(model={"vocab_size": 7})
    with pytest.raises(ValidationError, match="hidden_dim"):
        pretrain_config(model={"hidden_dim": 7})
    with pytest.raises(ValidationError, match="one row for each worker"):
        pretrain_config(batch_size=1, execution={"num_workers": 2})
