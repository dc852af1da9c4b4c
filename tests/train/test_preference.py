"""The preference loss against plain logits, and preference trainings: what they learn, that they resume, what they refuse."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from model.text_tokenizer import TinyBpe
from model.transformer import Transformer
from model.weights import digest, load_language_model
from schemas.errors import ConfigError, SchemaError
from schemas.vocabulary import Vocabulary
from tests.train.small_data import (
    ALONE,
    VOCABULARY,
    dpo_config,
    pair_data,
    picture,
    sequence_data,
    start_weights,
    text_tokenizer,
    write_pairs,
)
from train.batches import SequenceFile, TokenBatch
from train.head_loss import HeadLossConfig
from train.language import Passed, Start
from train.launch import training_identity
from train.loop import TrainingFolder, run_loop
from train.preference import (
    DpoConfig,
    DpoObjective,
    check_pairs,
    sequence_log_probs,
    stored_reference,
    train_preferences,
)
from train.progress import read_losses

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _reference_of_this_test() -> Iterator[None]:
    yield
    stored_reference.cache_clear()


def make_objective(folder: Path, config: DpoConfig) -> DpoObjective:
    return DpoObjective(config, pair_data(folder), start_weights(folder), folder / "run")


@torch.no_grad()
def plain_log_probs(model: Transformer, file: SequenceFile, row: int, counted: str) -> list[float]:
    """Each document of a pair alone, by all logits at once: what `sequence_log_probs` must add up to."""
    found, start = [], 0
    for length in file.document_lengths(row).tolist():
        document = torch.from_numpy(file.tokens(row)[start : start + length].astype(np.int64))
        start += length
        log_probs = torch.log_softmax(model(document[None])[0].double(), -1)
        drawn_from = int((document == VOCABULARY.img).nonzero()) + 1
        places = [
            place
            for place in range(drawn_from, length)
            if counted == "completion" or int(document[place]) >= VOCABULARY.vision_offset
        ]
        found.append(sum(float(log_probs[place - 1, document[place]]) for place in places))
    return found


@pytest.mark.parametrize("counted", ["codes", "completion"])
def test_a_pair_has_the_log_probabilities_of_its_documents_alone(tmp_path: Path, counted: str) -> None:
    objective = make_objective(tmp_path, dpo_config(counted=counted))
    model = objective.build_model(ALONE).eval()
    assert isinstance(model, Transformer)
    found, counts = objective._log_probs(model, np.arange(10), ALONE)
    file = SequenceFile(objective.data.path)
    for row in range(10):
        assert found[row].tolist() == pytest.approx(plain_log_probs(model, file, row, counted), abs=1e-4)
    h, w = 2, 3  # of pair 1
    assert counts[1].tolist() == [h * w if counted == "codes" else h * (w + 1) + 3] * 2


def test_the_terms_are_those_of_the_formula(tmp_path: Path) -> None:
    objective = make_objective(tmp_path, dpo_config(beta=0.3, sft_weight=0.5))
    objective.start(objective.build_model(ALONE).eval(), ALONE)
    other = objective.build_model(ALONE).eval()
    assert isinstance(other, Transformer)
    with torch.no_grad():
        other.lm_head.weight.add_(
            torch.randn(other.lm_head.weight.shape, generator=torch.Generator().manual_seed(1)) * 0.1
        )
    rows = np.array([7, 2, 5])
    terms = objective.loss(other, rows, 3, ALONE, {})
    file, before = SequenceFile(objective.data.path), objective.build_model(ALONE).eval()
    assert isinstance(before, Transformer)
    expected: dict[str, list[float]] = {name: [] for name in terms}
    for row in rows.tolist():
        (chosen, rejected), (chosen_before, rejected_before) = (
            plain_log_probs(model, file, row, "codes") for model in (other, before)
        )
        margin = 0.3 * ((chosen - chosen_before) - (rejected - rejected_before))
        num_codes = (1 + row % 2) * (2 + row % 3)
        dpo, next_token = math.log1p(math.exp(-margin)), -chosen / num_codes
        facts = {"loss": dpo + 0.5 * next_token, "dpo": dpo, "next_token": next_token, "accuracy": float(margin > 0)}
        drifts = {"chosen_drift": chosen - chosen_before, "rejected_drift": rejected - rejected_before}
        for name, value in {**facts, "margin": margin, **drifts}.items():
            expected[name].append(value)
    for name, term in terms.items():
        assert float(term.weight) == 3
        assert float(term.mean) == pytest.approx(float(np.mean(expected[name])), abs=1e-4), name
    assert {0.0, 1.0} == set(expected["accuracy"])


def test_before_the_first_step_nothing_is_preferred(tmp_path: Path) -> None:
    objective = make_objective(tmp_path, dpo_config())
    model = objective.build_model(ALONE)
    assert digest(model) == objective.begin.digest
    objective.start(model, ALONE)
    terms = objective.loss(model, np.arange(10), 0, ALONE, {})  # in train mode, with weights that had dropout
    for name in ("margin", "chosen_drift", "rejected_drift"):
        assert float(terms[name].mean) == pytest.approx(0.0, abs=1e-4), name
    assert float(terms["dpo"].mean) == pytest.approx(math.log(2), abs=1e-4)


def test_a_picture_in_bfloat16_keeps_its_log_probability() -> None:
    num, dim, size = 8190, 48, 4096
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, num + 1, dim, generator=generator).bfloat16()
    head = (torch.randn(size, dim, generator=generator) * 0.3).bfloat16()
    labels = torch.randint(0, size, (2, num + 1), generator=generator)
    weights = torch.ones(2, num + 1)
    weights[:, 0] = 0.0  # as of a prompt
    documents = torch.zeros(2, num + 1, dtype=torch.long)
    documents[1] = 1  # a pair each: one with a chosen document alone, one with a rejected one
    batch = TokenBatch(labels, labels, weights, documents, documents, documents)
    with torch.no_grad():
        found, counts = sequence_log_probs(Passed(hidden, head, None, batch), HeadLossConfig())
        logits = hidden.double() @ head.double().T
        truth = -F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(2, -1)[:, 1:].sum(1)
    assert counts.tolist() == [[num, 0], [0, num]]
    assert abs(truth[0]) > 10_000
    assert (found.diagonal() - truth).abs().max() < 0.01


def run(objective: DpoObjective, storage: Path | None = None) -> Path:
    storage = storage or objective.storage
    identity = training_identity("dpo", objective.config, "data", "sha", objective.begin.digest)
    run_loop(dataclasses.replace(objective, storage=storage), identity, storage)
    return TrainingFolder(storage).weights


def prefer_high_codes(rng: np.random.Generator, caption: str) -> tuple[np.ndarray, np.ndarray]:
    """A pair whose better picture is made of the upper half of the codes."""
    half = VOCABULARY.num_codes // 2
    return picture(caption, rng.integers(half, 2 * half, (2, 3))), picture(caption, rng.integers(0, half, (2, 3)))


@pytest.mark.parametrize("reference", ["stored", "copy"])
def test_it_learns_what_is_preferred_and_prefers_it_for_prompts_that_it_has_not_seen(
    tmp_path: Path, reference: str
) -> None:
    rng = np.random.default_rng(0)
    data = write_pairs(tmp_path, [prefer_high_codes(rng, "abcdefgh"[index % 8]) for index in range(32)])
    config = dpo_config(steps=40, batch_size=8, reference=reference, execution={"log_every": 1})
    objective = DpoObjective(config, data, start_weights(tmp_path), tmp_path / "run")
    weights = run(objective)
    first, *_, last = read_losses(tmp_path / "run" / "progress.jsonl")
    assert abs(first["margin"]) < 1e-4
    assert last["margin"] > 0.3
    assert last["accuracy"] > 0.9
    assert last["loss"] < first["loss"]
    assert last["chosen_drift"] > last["rejected_drift"]
    share = {name: _share_of_high_codes(folder) for name, folder in (("old", objective.begin.folder), ("new", weights))}
    assert share["new"] > share["old"] + 0.2, share


def _share_of_high_codes(folder: Path) -> float:
    """Of the codes that are drawn for unseen prompts, how many are of the upper half."""
    from model.generate import VisionRequest, generate_vision
    from model.sampling import SamplingConfig

    requests = [
        VisionRequest(prompt, "image", (1, 2, 3), None, seed) for prompt in ("z", "yx", "w") for seed in range(8)
    ]
    drawn = np.concatenate(generate_vision(load_language_model(folder), requests, SamplingConfig(guidance=1.0)))
    codes = drawn[drawn >= VOCABULARY.vision_offset] - VOCABULARY.vision_offset
    return float((codes >= VOCABULARY.num_codes // 2).mean())


@dataclasses.dataclass(frozen=True)
class Interrupted(DpoObjective):
    """Fails once it has done some steps."""

    after: int = 0

    def finish_step(self, model, step, device, state) -> None:  # type: ignore[no-untyped-def]
        if step + 1 == self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("reference", ["stored", "copy"])
@pytest.mark.parametrize("after", [2, 7])  # before and after the first checkpoint
def test_an_interrupted_training_ends_with_the_same_bits(tmp_path: Path, after: int, reference: str) -> None:
    objective = make_objective(tmp_path, dpo_config(reference=reference))
    whole = load_file(run(objective) / "model.safetensors")
    parts = tmp_path / "parts"
    fields = {field.name: getattr(objective, field.name) for field in dataclasses.fields(objective)}
    with pytest.raises(KeyboardInterrupt):
        run(Interrupted(**fields, after=after), parts)
    stored_reference.cache_clear()  # another process reads the file again
    resumed = load_file(run(objective, parts) / "model.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    first, second = (json.loads((folder / "result.json").read_text()) for folder in (tmp_path / "run", parts))
    assert first == second


def test_the_reference_is_worked_out_once_and_known_by_its_weights(tmp_path: Path) -> None:
    objective = make_objective(tmp_path, dpo_config())
    run(objective)
    file = objective.reference_file
    tensors, written = load_file(file), file.stat().st_mtime_ns
    objective.start(objective.build_model(ALONE), ALONE)  # as after a kill before the first checkpoint
    assert file.stat().st_mtime_ns == written
    rows = np.arange(4)
    for other in (
        dataclasses.replace(objective, begin=Start(objective.begin.folder, "of other weights")),
        dataclasses.replace(objective, data=dataclasses.replace(objective.data, sha256="other pairs")),
        dataclasses.replace(objective, config=dpo_config(counted="completion")),
    ):
        with pytest.raises(ConfigError, match=r"expected .* to begin anew"):
            other.loss(objective.build_model(ALONE), rows, 5, ALONE, {})
    file.unlink()
    stored_reference.cache_clear()
    with pytest.raises(ConfigError, match="cannot be read"):
        objective.loss(objective.build_model(ALONE), rows, 5, ALONE, {})
    save_file(tensors, file, metadata=objective._facts())
    objective.loss(objective.build_model(ALONE), rows, 5, ALONE, {})


def test_both_references_and_groups_take_the_same_steps(tmp_path: Path) -> None:
    made = {
        name: load_file(run(make_objective(tmp_path, config), tmp_path / name) / "model.safetensors")
        for name, config in {
            "stored": dpo_config(),
            "copy": dpo_config(reference="copy"),
            "groups": dpo_config(execution={"rows_at_once": 1}),
        }.items()
    }
    for name in ("copy", "groups"):
        worst = max(float((made[name][key] - value).abs().max()) for key, value in made["stored"].items())
        assert worst <= 2e-5, f"{name} differs by {worst}"


def test_pairs_that_the_weights_cannot_read_are_refused(tmp_path: Path) -> None:
    data, start = pair_data(tmp_path), start_weights(tmp_path)
    check_pairs(data, start)
    for other in (
        dataclasses.replace(data, vocabulary=Vocabulary(256, 32)),
        dataclasses.replace(data, text=TinyBpe.train(["another text"] * 3, 260)),
    ):
        with pytest.raises(ConfigError, match="begin with the checkpoint that drew them"):
            check_pairs(other, start)
    with pytest.raises(SchemaError, match=r"holds .* documents, expected chosen and rejected"):
        check_pairs(sequence_data(tmp_path), start)
    (tmp_path / "empty").mkdir()
    nothing = write_pairs(tmp_path / "empty", [])
    with pytest.raises(ConfigError, match="found no pair"):
        check_pairs(nothing, start)


def test_a_pair_longer_than_the_context_is_refused_and_not_cut(tmp_path: Path) -> None:
    long, short = picture("red" * 4, np.zeros((2, 3))), picture("red" * 4, np.ones((2, 3)))
    (tmp_path / "pairs").mkdir()
    data = write_pairs(tmp_path / "pairs", [(long, short)])
    fits = start_weights(tmp_path, max_position_embeddings=len(long))
    check_pairs(data, fits)
    cramped = start_weights(tmp_path, max_position_embeddings=len(long) - 1)
    with pytest.raises(ConfigError, match=f"a document of {len(long)} tokens, expected at most {len(long) - 1}"):
        train_preferences(dpo_config(), data, tmp_path / "run", start=cramped)
    assert not (tmp_path / "run").exists()


def test_weights_that_cannot_be_split_are_refused_before_the_start(tmp_path: Path) -> None:
    start, config = start_weights(tmp_path), dpo_config(execution={"num_workers": 2, "layout": {"tensor": 2}})
    with pytest.raises(
        ConfigError, match=r"found 1 key-value heads .* multiples of layout.tensor 2, of the weights in"
    ):
        train_preferences(config, pair_data(tmp_path), tmp_path / "run", start=start)
    assert not (tmp_path / "run").exists()


def test_ways_to_work_out_the_loss_that_round_are_refused() -> None:
    assert dpo_config().execution.head_loss.kind == "chunked"
    with pytest.raises(ValidationError, match="round"):
        dpo_config(execution={"head_loss": {"kind": "whole"}})


def test_length_normalisation_divides_by_what_counts(tmp_path: Path) -> None:
    assert text_tokenizer().num_text == 256
    terms = {}
    for beta, normalise in ((0.6, True), (0.1, False)):
        objective = make_objective(tmp_path, dpo_config(beta=beta, normalise_length=normalise))
        objective.start(objective.build_model(ALONE), ALONE)
        other = objective.build_model(ALONE)
        with torch.no_grad():
            other.get_parameter("lm_head.weight").mul_(1.5)
        terms[normalise] = objective.loss(other, np.array([1]), 0, ALONE, {})  # a pair of 6 codes each
    assert float(terms[True]["margin"].mean) == pytest.approx(float(terms[False]["margin"].mean), rel=1e-6)
    assert abs(float(terms[True]["margin"].mean)) > 0.01
