"""What a stage does with what its worker raises, and with GPUs."""

import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.stage import Stage, _StageActor
from schemas.captions import CAPTIONERS
from schemas.catalog import Lake
from schemas.runs import ATTEMPTS
from tests.conftest import CHECKOUT


class Worker:
    """Fails in a way that nobody has thought of, at one item."""

    def process(self, item: Mapping[str, Any]) -> dict[str, list[dict[str, object]]]:
        if item["name"] == "b":
            raise ZeroDivisionError("of \ud800")
        row = {"captioner_id": item["name"], "model": "", "model_digest": "", "prompt": "", "sampling": ""}
        return {CAPTIONERS.name: [{**row, "windowing": "", "checks": ""}]}


def stage(num_gpus: float = 0.0, concurrency: int = 1) -> Stage:
    return Stage("test", "id", "name", (CAPTIONERS,), Worker, num_gpus=num_gpus, concurrency=concurrency)


def items(names: str) -> pa.Table:
    return pa.table({"name": list(names), "attempt": pa.array([1] * len(names), pa.int32())})


def test_an_unexpected_error_costs_its_item_and_says_where(tmp_path: Path) -> None:
    lake = Lake(tmp_path / "lake")
    (row,) = _StageActor(lake, stage(), "run")(items("abc")).to_pylist()
    assert (row["num_done"], row["failed"], row["stop"]) == (2, ["ZeroDivisionError"], None)
    for table in (CAPTIONERS, ATTEMPTS):
        lake.commit_files(table, [w for w in pickle.loads(row["written"]) if w.table == table.name], "run")
    assert sorted(lake.read(CAPTIONERS)["captioner_id"].to_pylist()) == ["a", "c"]
    (failed,) = lake.read(ATTEMPTS).to_pylist()
    assert (failed["item_id"], failed["error_class"], failed["terminal"]) == ("b", "ZeroDivisionError", False)
    assert "test_stage.py" in failed["message"]


GPU_RUN = """
import sys
import ray
from pipeline.stage import run_stage
from schemas.catalog import Lake
from tests.pipeline.test_stage import items, stage
ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR", address="local")
outcome = run_stage(Lake(sys.argv[1]), stage(1.0, 2), items("abcdefghijklmnopqrstuvwxyz"), "run", 1, lambda *_: None)
print(outcome.num_done, outcome.num_failed)
"""


def test_a_stage_that_asks_for_a_gpu_gets_it(tmp_path: Path) -> None:
    """Ray only counts GPUs; none has to be there."""
    done = subprocess.run(
        [sys.executable, "-c", GPU_RUN, str(tmp_path / "lake")],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        cwd=CHECKOUT, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["25", "1"]
