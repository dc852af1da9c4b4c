"""What a training begins with: which weights a name means, what is written down of them, and what they cannot read."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs import pack as pack_module
from jobs import train as module
from jobs.train import TrainRecipe, train
from model.weights import digest
from pipeline.frame_chunks import ChunkConfig
from schemas.catalog import Lake
from schemas.checkpoints import CHECKPOINTS
from schemas.errors import ConfigError
from schemas.recipe import canonical_json
from schemas.runs import RUNS
from schemas.sequences import SEQUENCE_SETS
from tests.jobs.small_models import VOCABULARY, make_lake
from tests.train.small_data import DISCRIMINATOR, pretrain_config, tokenizer_config
from train.language import Start
from train.progress import TrainingResult

RECIPE = TrainRecipe(objective="pretrain", pretrain=pretrain_config())


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    """The small models, the language model under the id of its weights too, and empty sequence sets: `mine` and `kept` of
    the vision tokenizer that it learnt, `other` of another one.
    """
    made = make_lake(tmp_path)
    row = {"checkpoint_id": digest(tmp_path / "lm")[:16], "objective": "pretrain", "uri": str(tmp_path / "lm")}
    training = {"training_id": "t", "recipe": "{}", "data_id": "seqset", "data_sha256": "x", "step": 1, "losses": "[]"}
    made.append(CHECKPOINTS, [{**row, **training}], "r")
    text = {"kind": "tiny_bpe", "serialised": json.loads((tmp_path / "lm" / "text_tokenizer.json").read_text())}
    packed = {"recipe": "{}", "vocabulary": VOCABULARY.to_json(), "text_tokenizer": canonical_json(text)}
    counts = {"context_len": 64, "num_sequences": 0, "num_tokens": 0, "content_sha256": "x", "curated_ids": []}
    sets = [
        {"name": n, "seqset_id": n, "tokenizer_id": t, **packed, **counts}
        for n, t in (("mine", "tok"), ("kept", "tok"), ("other", "tik"))
    ]
    made.append(SEQUENCE_SETS, sets, "r")
    return made


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Start | None]:
    """What trainings began with, which are over as soon as they begin."""
    found: list[Start | None] = []

    def stub(
        config: Any, data: Any, storage: Path, *, start: Start | None, held_out: Any, on_progress: Any
    ) -> TrainingResult:
        found.append(start)
        return TrainingResult(tmp_path, f"{len(found):016x}", 8, [], 0)

    monkeypatch.setattr(module, "pretrain", stub)
    monkeypatch.setattr(module, "ensure_ray", lambda: None)
    monkeypatch.setattr(pack_module, "materialise", lambda lake, name: tmp_path / "rows.arrow")
    return found


def test_a_training_says_what_it_began_with(lake: Lake, begun: list[Start | None], tmp_path: Path) -> None:
    name = digest(tmp_path / "lm")
    by_id = train(lake, RECIPE, "mine", name[:8])
    assert begun == [Start(tmp_path / "lm", name)]
    rows = {row["checkpoint_id"]: row for row in lake.read(CHECKPOINTS).to_pylist()}
    assert rows[by_id.checkpoint_id]["start_id"] == name[:16]
    fresh = train(lake, RECIPE, "mine")
    assert begun[1] is None
    rows = {row["checkpoint_id"]: row for row in lake.read(CHECKPOINTS).to_pylist()}
    assert rows[fresh.checkpoint_id]["start_id"] is None
    assert rows[fresh.checkpoint_id]["training_id"] != rows[by_id.checkpoint_id]["training_id"]


def test_a_tokenizer_training_says_which_terms_it_is_without(
    lake: Lake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    curated = {"curated_id": "c", "content_sha256": "x"}
    monkeypatch.setattr(module, "set_row", lambda lake, name: curated)
    monkeypatch.setattr(module, "ensure_ray", lambda: None)
    monkeypatch.setattr(module, "_frame_data", lambda *given: None)
    done = TrainingResult(tmp_path, "0" * 16, 8, [], 0)
    monkeypatch.setattr(module, "train_vision_tokenizer", lambda *given, held_out, on_progress: done)
    config = tokenizer_config(adversarial=DISCRIMINATOR)
    recipe = TrainRecipe(objective="vision_tokenizer", frames=ChunkConfig(), vision_tokenizer=config)
    train(lake, recipe, "set")
    (outcome,) = [json.loads(run["outcome"]) for run in lake.read(RUNS).to_pylist() if run["status"] == "done"]
    assert list(outcome["left_out"]) == ["perceptual"]
    assert "without the perceptual term, which needs weights of LPIPS" in capsys.readouterr().err


def test_the_same_start_by_folder_is_the_same_training(lake: Lake, begun: list[Start | None], tmp_path: Path) -> None:
    first = train(lake, RECIPE, "mine", digest(tmp_path / "lm")[:16])
    again = train(lake, RECIPE, "mine", str(tmp_path / "lm"))
    assert (again.checkpoint_id, again.already_there, len(begun)) == (first.checkpoint_id, True, 1)


def test_codes_of_another_vision_tokenizer_are_refused(lake: Lake, begun: list[Start | None], tmp_path: Path) -> None:
    for start in (digest(tmp_path / "lm")[:16], str(tmp_path / "lm")):
        with pytest.raises(
            ConfigError, match="learnt codes of the vision tokenizer tok, and these sequences hold those of tik"
        ):
            train(lake, RECIPE, "other", start)
    assert begun == []


def test_names_that_are_no_model_are_refused(lake: Lake, begun: list[Start | None], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no folder of a model .* and .* names 0 pretrain or dpo checkpoints"):
        train(lake, RECIPE, "mine", str(tmp_path / "nowhere"))
    captioner = TrainRecipe.model_construct(objective="captioner")
    with pytest.raises(ConfigError, match="only language models"):
        train(lake, captioner, "mine", "latest")


def test_held_out_codes_of_another_vision_tokenizer_are_refused(lake: Lake, begun: list[Start | None]) -> None:
    with pytest.raises(ConfigError, match="found the held-out sequences 'other' in codes of the vision tokenizer tik"):
        train(lake, RECIPE, "mine", held_out="other")
    assert not begun


def test_a_finished_training_writes_no_held_out_sequences(
    lake: Lake, begun: list[Start | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    def materialise(lake: Lake, name: str) -> Path:
        written.append(name)
        return Path(name)

    monkeypatch.setattr(pack_module, "materialise", materialise)
    assert not train(lake, RECIPE, "mine", held_out="kept").already_there
    assert written == ["mine", "kept"]
    assert train(lake, RECIPE, "mine", held_out="kept").already_there
    assert written == ["mine", "kept"]


def test_clips_that_are_learnt_from_are_not_held_out(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = {"all": ["a", "b"], "held": ["b"]}
    monkeypatch.setattr(module, "set_row", lambda lake, name: {"curated_id": name, "content_sha256": name})
    monkeypatch.setattr(module, "read_set", lambda lake, name: pa.table({"clip_id": sets[name]}))
    recipe = TrainRecipe(objective="vision_tokenizer", frames=ChunkConfig(), vision_tokenizer=tokenizer_config())
    with pytest.raises(ConfigError, match="found 1 clips in both 'all' and the held-out 'held', such as b"):
        train(lake, recipe, "all", held_out="held")
