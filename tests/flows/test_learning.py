"""Every training of the published model on one set, at its smallest size: all of it, and found finished."""

import subprocess
import sys
from pathlib import Path

import pytest

from jobs.lineage import trace
from schemas.catalog import Lake
from schemas.checkpoints import CHECKPOINTS
from schemas.generations import GENERATIONS
from schemas.tables import TABLES
from tests.flows.test_scan_failures import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
TRAININGS = ("vision tokenizer", "stage 1", "stage 2", "quality tuning", "answers", "preferences")


def walk(folder: Path) -> str:
    command = [sys.executable, "-m", "jobs.cli", "demo", "--size", "smoke", "--full", "--folder", str(folder)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def test_every_training_runs_and_is_found_again(tmp_path: Path) -> None:
    said = walk(tmp_path)
    told = [line.split(": ")[0].removeprefix("ok").removeprefix("NOT").strip() for line in said.splitlines()]
    assert set(TRAININGS) <= set(told)
    page = (tmp_path / "learning.html").read_text()
    assert all(f"<b>{training}</b>" in page for training in TRAININGS)
    lake = Lake.open(tmp_path / "lake")
    first = {table.name: lake.facts(table).num_rows for table in TABLES if not table.ledger}
    preferring = lake.read_where(CHECKPOINTS, "objective", ["dpo"]).to_pylist()
    assert len(preferring) == 1
    drawn = lake.read_where(GENERATIONS, "checkpoint_id", [preferring[0]["checkpoint_id"]], ["generation_id"])
    training = trace(lake, drawn["generation_id"][0].as_py()).training
    chain = []
    while training is not None:
        chain.append(training.checkpoint["objective"])
        training = training.start
    assert chain == ["dpo", "pretrain", "pretrain", "pretrain"]  # preferences, quality tuning, stage 2, stage 1
    walk(tmp_path)
    assert {table.name: lake.facts(table).num_rows for table in TABLES if not table.ledger} == first
