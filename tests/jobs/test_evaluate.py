"""The loss of a lake's checkpoint on a sequence set: found by name, and written down with its run."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from jobs import evaluate as module
from jobs.cli import app
from model.text_tokenizer import TinyBpe
from schemas.catalog import Lake
from schemas.document import TextDocument, write_document
from schemas.runs import RUNS
from tests.jobs.small_models import VOCABULARY, make_lake
from train.batches import SequenceData, write_sequence_file


def test_figures_are_those_of_the_command_and_of_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_lake(tmp_path)
    text = TinyBpe.train([], 256)
    document = write_document(TextDocument("a red circle"), VOCABULARY, text).astype(np.uint32)
    segments = [[{"kind": "text", "item_id": "one", "offset": 0, "length": len(document)}]]
    write_sequence_file(tmp_path / "rows.arrow", [document], segments)
    data = SequenceData(tmp_path / "rows.arrow", "kept", "x", VOCABULARY, text, 64)
    monkeypatch.setattr(module, "sequence_data", lambda lake, name: {"mine": data}[name])
    where = ["--lake", str(tmp_path / "lake")]
    done = CliRunner().invoke(app, ["evaluate", "mine", "--checkpoint", "talk", "--json", *where])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert (said["checkpoint_id"], said["data_id"]) == ("talker", "kept")
    assert said["figures"]["loss"] == said["figures"]["text"] > 0
    (run,) = (run for run in Lake.open(tmp_path / "lake").read(RUNS).to_pylist() if run["status"] == "done")
    assert json.loads(run["outcome"])["text"] == said["figures"]["text"]
