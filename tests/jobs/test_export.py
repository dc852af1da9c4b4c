"""Trainings that are not finished, exported: the weights of the step that is named, and a training that does not notice."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from jobs import train as train_module
from jobs.export import export
from jobs.train import TrainRecipe, load_training_recipe, train, training_folder
from model.vision_tokenizer.config import VisionTokenizerConfig
from model.vision_tokenizer.tokenizer import VisionTokenizer
from model.weights import digest, load_language_model, save_vision_tokenizer
from schemas.catalog import Lake
from schemas.checkpoints import CHECKPOINTS
from schemas.errors import ConfigError, OutbackError
from schemas.recipe import canonical_json
from schemas.runs import RUNS
from schemas.sequences import SEQUENCE_SETS
from schemas.vision_tokens import TOKENIZERS
from tests.train.small_data import VOCABULARY, pretrain_config, sequence_data, start_weights, text_tokenizer
from tests.train.small_runs import run, run_workers, workers
from train import snapshot
from train.batches import SequenceData
from train.checkpoint import finished, latest
from train.loop import TrainingFolder
from train.pretrain import PretrainConfig, PretrainObjective
from train.progress import TrainingResult, read_losses

MODEL = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
LAYOUTS: dict[str, dict[str, Any]] = {"shard": {"shard": 2}, "tensor": {"tensor": 2}}


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose name is short enough for groups of workers."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture
def lake(short: Path) -> Lake:
    """A sequence set `mine`, and the vision tokenizer of its codes, as transformers knows it."""
    made = Lake.open(short / "lake")
    size = VisionTokenizerConfig(codebook_size=16, ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(1,))
    save_vision_tokenizer(short / "vision", VisionTokenizer(size).eval())
    where = {"uri": str(short / "vision"), "preparation": "{}"}
    made.append(TOKENIZERS, [{"tokenizer_id": "tok", "checkpoint_id": "seer", **where}], "r")
    text = canonical_json({"kind": "tiny_bpe", "serialised": json.loads(text_tokenizer().to_json())})
    row = {"name": "mine", "seqset_id": "set-0", "tokenizer_id": "tok", "recipe": "{}", "content_sha256": "sha-0"}
    counts = {"context_len": 64, "num_sequences": 12, "num_tokens": 0, "curated_ids": []}
    ids = {"vocabulary": VOCABULARY.to_json(), "text_tokenizer": text}
    made.append(SEQUENCE_SETS, [{**row, **ids, **counts}], "r")
    return made


def config(layout: dict[str, Any], steps: int, **execution: Any) -> PretrainConfig:
    # The same rate at every step: a training of six steps ends where one of eight is after six.
    optim = {"learning_rate": 0.01, "warmup_steps": 2, "schedule": "constant"}
    spread = {"num_workers": 2 if layout else 1, "layout": layout, "keep_last": 5, **execution}
    return pretrain_config(steps=steps, optim=optim, model=MODEL, execution=spread)


Body = Callable[[PretrainConfig, SequenceData, Path], None]


def begin(lake: Lake, options: PretrainConfig, monkeypatch: pytest.MonkeyPatch, body: Body, **given: Any) -> str:
    """Give the command of a training whose driver dies once `body` has trained; its id, as `show runs` has it."""
    folder = lake.folder.parent / "rows"
    folder.mkdir(exist_ok=True)

    def pretrain(config: PretrainConfig, data: SequenceData, storage: Path, **_: Any) -> TrainingResult:
        body(config, data, storage)
        raise OutbackError("the machine is gone")

    monkeypatch.setattr(train_module, "pretrain", pretrain)
    monkeypatch.setattr(train_module, "ensure_ray", lambda: None)
    monkeypatch.setattr(train_module, "sequence_data", lambda lake, name: sequence_data(folder))
    with pytest.raises(OutbackError, match="the machine is gone"):
        train(lake, TrainRecipe(objective="pretrain", pretrain=options), "mine", **given)
    runs = sorted(lake.read(RUNS).to_pylist(), key=lambda row: row["written_at"])
    return str(json.loads(runs[-1]["inputs"])["training_id"])


def alone(config: PretrainConfig, data: SequenceData, storage: Path) -> None:
    run(PretrainObjective(config, data), storage)


def _run_all(rank: int, folder: Path, trainings: list[tuple[PretrainObjective, Path]]) -> None:
    for objective, storage in trainings:
        run(objective, storage)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_stopped_training_is_exported_as_it_was_after_each_step(
    short: Path, lake: Lake, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def spread(options: PretrainConfig, data: SequenceData, storage: Path) -> None:
        ends = [(PretrainObjective(config(LAYOUTS[name], steps), data), short / f"ends-{steps}") for steps in (3, 6)]
        run_workers(2, short, _run_all, [(PretrainObjective(options, data), storage), *ends])

    training = begin(lake, config(LAYOUTS[name], 8), monkeypatch, spread)
    newest = export(lake, training[:6], short / "newest", "outback")
    earlier = export(lake, training, short / "earlier", "outback", step=3)
    for report, path, steps in ((newest, "newest", 6), (earlier, "earlier", 3)):
        expected = TrainingFolder(short / f"ends-{steps}").weights
        assert (report.step, report.checkpoint_id) == (steps, digest(expected)[:16])
        right, found = (load_file(folder / "model.safetensors") for folder in (expected, short / path))
        assert right.keys() == found.keys()
        assert all(torch.equal(right[key], found[key]) for key in right)
    assert not [path for path in short.iterdir() if path.name.startswith(".")]


def test_every_form_of_a_stopped_training_computes_the_same(
    short: Path, lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    training = begin(lake, config({}, 8), monkeypatch, alone)
    for form in ("llama", "transformers", "official", "outback"):
        assert export(lake, training, short / form, form).step == 6  # type: ignore[arg-type]
    ours = load_language_model(short / "outback").transformer
    tokens_BL = torch.randint(0, VOCABULARY.vision_offset, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected_BLV = ours(tokens_BL)
        llama = transformers.AutoModelForCausalLM.from_pretrained(short / "llama").eval()
        torch.testing.assert_close(llama(tokens_BL).logits, expected_BLV, atol=1e-5, rtol=1e-5)
        both = transformers.Emu3ForConditionalGeneration.from_pretrained(short / "transformers").eval()
        torch.testing.assert_close(both(tokens_BL).logits, expected_BLV, atol=1e-5, rtol=1e-5)
    official = load_file(short / "official" / "language_model" / "model.safetensors")
    assert torch.equal(official["lm_head.weight"], ours.lm_head.weight)
    assert (short / "official" / "vision_tokenizer" / "config.json").is_file()


def test_another_training_begins_with_what_was_exported(
    short: Path, lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = begin(lake, config({}, 8), monkeypatch, alone)
    report = export(lake, training, short / "so far", "outback")
    seen: list[Any] = []

    def pretrain(config: PretrainConfig, data: SequenceData, storage: Path, *, start: Any, **_: Any) -> TrainingResult:
        seen.append(start)
        return TrainingResult(short, "0" * 16, 8, [], 0)

    monkeypatch.setattr(train_module, "pretrain", pretrain)
    recipe = TrainRecipe(objective="pretrain", pretrain=config({}, 2))
    train(lake, recipe, "mine", str(short / "so far"))
    assert seen[0].digest[:16] == report.checkpoint_id


def test_a_preference_training_is_exported_with_the_architecture_that_it_began_with(
    short: Path, lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = start_weights(short)
    training = begin(lake, pretrain_config(model={"dropout": 0.1}), monkeypatch, alone, start=str(start.folder))
    rows = lake.read(RUNS).to_pylist()
    inputs = json.loads(rows[0]["inputs"])
    assert inputs["start"] == str(start.folder)
    # The same checkpoints as those of preferences, whose recipe names no architecture.
    dpo = load_training_recipe("dpo")
    dpo_inputs = json.dumps({**inputs, "training_id": "dpo"})
    shutil.copytree(training_folder(lake, training), training_folder(lake, "dpo"))
    lake.append(RUNS, [{**rows[0], "run_id": "dpo", "recipe": dpo.canonical_json(), "inputs": dpo_inputs}], "r")
    by_recipe = export(lake, training, short / "a", "outback")
    by_start = export(lake, "dpo", short / "b", "outback")
    assert (by_recipe.checkpoint_id, by_recipe.step) == (by_start.checkpoint_id, by_start.step)


def test_a_finished_training_is_exported_by_either_name(
    short: Path, lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = begin(lake, config({}, 8), monkeypatch, alone)
    weights = TrainingFolder(training_folder(lake, training)).weights
    row = {"checkpoint_id": digest(weights)[:16], "objective": "pretrain", "training_id": training, "recipe": "{}"}
    facts = {"data_id": "set-0", "data_sha256": "x", "step": 8, "losses": "[]", "uri": str(weights)}
    lake.append(CHECKPOINTS, [{**row, **facts}], "r")
    for name, step in ((training, None), (row["checkpoint_id"], None), ("latest", None), (training, 8)):
        report = export(lake, name, short / f"{name}-{step}", "outback", step)
        assert (report.checkpoint_id, report.step) == (row["checkpoint_id"], 8)
    assert export(lake, row["checkpoint_id"], short / "early", "llama", 3).step == 3


def test_a_checkpoint_that_is_pruned_while_it_is_read_gives_way_to_the_newest(
    short: Path, lake: Lake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    training = begin(lake, config({}, 8), monkeypatch, alone)
    checkpoints = TrainingFolder(training_folder(lake, training)).checkpoints
    newer = short / "newer"
    (checkpoints / "step_00000006").rename(newer)  # not written yet
    fill = snapshot._fill

    def pruned_meanwhile(model: Any, source: Path) -> None:
        if newer.exists():
            newer.rename(checkpoints / "step_00000006")
            next(source.glob("*.distcp")).unlink()  # the first file to go
        fill(model, source)

    monkeypatch.setattr(snapshot, "_fill", pruned_meanwhile)
    assert export(lake, training, short / "found", "outback").step == 6
    assert "step 3 was removed by its training" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="step_00000003 cannot be read"):
        export(lake, training, short / "named", "outback", 3)
    shutil.rmtree(checkpoints / "step_00000003")
    with pytest.raises(ConfigError, match=r"found no checkpoint of step 3 in .*; there are steps 6"):
        export(lake, training, short / "named", "outback", 3)
    assert not (short / "named").exists()
    assert not [path for path in short.iterdir() if path.name.startswith(".")]


def test_a_checkpoint_that_is_damaged_is_an_error(short: Path, lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    training = begin(lake, config({}, 8), monkeypatch, alone)
    [(_, source)] = finished(TrainingFolder(training_folder(lake, training)).checkpoints)[-1:]
    next(source.glob("*.distcp")).unlink()
    with pytest.raises(ConfigError, match="step_00000006 cannot be read"):
        export(lake, training, short / "found", "llama")
    assert not (short / "found").exists()


def test_names_of_nothing_are_refused(short: Path, lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="'nowhere' names 0 pretrain or dpo checkpoints"):
        export(lake, "nowhere", short / "found", "llama")
    with pytest.raises(ConfigError, match="found step 3 of 'latest', expected a training"):
        export(lake, "latest", short / "found", "llama", 3)
    training = begin(lake, config({}, 2), monkeypatch, alone)
    with pytest.raises(ConfigError, match=r"found no checkpoint in .*the first comes after"):
        export(lake, training, short / "found", "llama")


@pytest.mark.slow
def test_a_training_that_is_exported_again_and_again_does_not_notice(
    short: Path, lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = config({"shard": 2}, 300, checkpoint_every=10, keep_last=1)
    exported: list[int] = []

    def watched(options: PretrainConfig, data: SequenceData, storage: Path) -> None:
        folder, objective = TrainingFolder(storage), PretrainObjective(options, data)
        run_workers(2, short, _run_all, [(objective, short / "undisturbed")])
        (short / "meet").unlink(missing_ok=True)
        with workers(2, short, _run_all, [(objective, storage)]):
            while not folder.result.exists():
                if latest(folder.checkpoints) is None:
                    continue
                report = export(lake, storage.name, short / f"at-{len(exported)}", "outback")
                if not folder.result.exists():
                    exported.append(report.step)
                    load_language_model(short / f"at-{len(exported) - 1}")

    training = begin(lake, options, monkeypatch, watched)
    assert len(exported) > 1
    assert exported == sorted(exported)
    here, there = (TrainingFolder(path) for path in (short / "undisturbed", training_folder(lake, training)))
    assert read_losses(here.progress) == read_losses(there.progress)
    assert digest(here.weights) == digest(there.weights)
