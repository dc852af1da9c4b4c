"""An adapter's whole road: trained on Ray with a kill in the middle, a checkpoint like any other, and on its own in PEFT."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train.pretrain
from jobs.ask import AskRecipe, Question, ask
from jobs.export import export
from jobs.generate import Ask, GenerateRecipe, generate
from jobs.train import TrainRecipe
from jobs.train import train as train_on
from model.weights import digest, load_language_model
from schemas.catalog import Lake
from schemas.checkpoints import CHECKPOINTS
from schemas.document import VisionBlock, VisionDocument, write_document
from schemas.errors import ConfigError
from tests.jobs.small_models import VOCABULARY, make_lake
from tests.train.small_data import pretrain_config, text_tokenizer
from tests.train.small_runs import Killed
from train.batches import write_sequence_file

SHAPE = {"num_heads": 1, "num_kv_heads": 1, "head_dim": 32, "max_position_embeddings": 512}
# On one worker: as on one GPU, frozen weights in bfloat16 and the adapter's in float32.
ONE_GPU = {"layout": {"compute": "bfloat16", "recompute": "full"}, "log_every": 1}


def lake_with_rows(folder: Path) -> Lake:
    """The small models, and rows of their sequence set where a training looks for them."""
    folder.mkdir()
    lake, rng = make_lake(folder), np.random.default_rng(0)
    rows = []
    for _ in range(12):
        block = VisionBlock("image", rng.integers(0, VOCABULARY.num_codes, (1, 2, 3)))
        rows.append(write_document(VisionDocument(block, "red"), VOCABULARY, text_tokenizer()))
    segments = [[{"kind": "image", "item_id": f"{i}", "offset": 0, "length": len(r)}] for i, r in enumerate(rows)]
    (lake.folder / "cache").mkdir(exist_ok=True)
    write_sequence_file(lake.folder / "cache" / "rows-seqset.arrow", rows, segments)
    return lake


def recipe(**changes: Any) -> TrainRecipe:
    config = pretrain_config(model=SHAPE, batch_size=2, **changes)
    return TrainRecipe(objective="pretrain", pretrain=config)


@pytest.mark.slow
def test_a_killed_training_makes_a_model_and_an_adapter_that_others_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    wanted = recipe(adapter={"rank": 4, "dropout": 0.1}, execution=ONE_GPU)
    undisturbed = train_on(lake_with_rows(tmp_path / "one"), wanted, "set", "talker")
    lake, mark = lake_with_rows(tmp_path / "two"), tmp_path / "killed"
    base = digest(tmp_path / "two" / "lm")
    with monkeypatch.context() as patch:
        patch.setattr(train.pretrain, "PretrainObjective", partial(Killed, after=5, mark=mark))
        report = train_on(lake, wanted, "set", "talker")
    assert mark.exists()
    assert report.losses == undisturbed.losses
    assert len(report.losses) == 8
    assert report.losses[-1]["loss"] < report.losses[0]["loss"]
    assert report.checkpoint_id == undisturbed.checkpoint_id
    assert digest(tmp_path / "two" / "lm") == base
    (row,) = lake.read_where(CHECKPOINTS, "checkpoint_id", [report.checkpoint_id]).to_pylist()
    assert row["start_id"] == base[:16]

    # A model like any other: it draws, answers, and is what a later training begins with.
    assert len(generate(lake, [Ask("a", "image", 0)], "latest", GenerateRecipe(h=2, w=3))) == 1
    answering = AskRecipe.model_validate({"answer": {"max_new_tokens": 4}})
    assert len(ask(lake, [Question("What is it?")], report.checkpoint_id, answering)) == 1
    later = train_on(lake, recipe(steps=1), "set", report.checkpoint_id)
    (row,) = lake.read_where(CHECKPOINTS, "checkpoint_id", [later.checkpoint_id]).to_pylist()
    assert row["start_id"] == report.checkpoint_id

    # The adapter alone, on the base, is the same model.
    export(lake, "talker", tmp_path / "base", "llama")
    assert export(lake, report.checkpoint_id, tmp_path / "adapter", "adapter").folders == (str(tmp_path / "adapter"),)
    theirs = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    ours = load_language_model(report.folder).transformer
    tokens = torch.randint(0, VOCABULARY.size, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # Added to the weights here, to their products there: rounding differs, what is learned differs by far more.
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens), atol=1e-4, rtol=1e-4)
    start = load_file(tmp_path / "two" / "lm" / "model.safetensors")
    assert any(not torch.equal(start[name], weight) for name, weight in ours.state_dict().items())
    with pytest.raises(ConfigError, match="was trained whole"):
        export(lake, "talker", tmp_path / "none", "adapter")
