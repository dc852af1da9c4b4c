"""What a stage does with what its worker raises, and with GPUs."""

import os
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.stage import Stage, _StageActor, workers_that_fit
from schemas.captions import CAPTIONERS
from schemas.catalog import Lake
from schemas.errors import ConfigError
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


def node(cpus: float, gpus: float = 0.0, memory_mb: int = 8000, *, alive: bool = True) -> dict[str, Any]:
    resources = {"CPU": cpus, "GPU": gpus, "memory": float(memory_mb << 20), "node:here": 1.0}
    return {"Alive": alive, "Resources": {name: amount for name, amount in resources.items() if amount}}


def needing(cpus: float = 1.0, gpus: float = 0.0, memory_mb: int = 0) -> Stage:
    return replace(stage(), num_cpus=cpus, num_gpus=gpus, memory_mb=memory_mb)


@pytest.mark.parametrize(
    ("needs", "nodes", "fit"),
    [
        (needing(), [node(1)], 1),
        (needing(), [node(3), node(2), node(64, alive=False)], 5),
        (needing(2), [node(3), node(3)], 2),
        (needing(0.5), [node(2)], 4),
        (needing(1, 1), [node(8, 2), node(8)], 2),
        (needing(1, 0, 3000), [node(8, 0, 8000)], 2),
        (needing(0), [node(1), node(1)], 2),
    ],
)
def test_as_many_workers_as_nodes_hold(needs: Stage, nodes: list[dict[str, Any]], fit: int) -> None:
    assert workers_that_fit(needs, nodes) == fit


@pytest.mark.parametrize(
    ("needs", "nodes", "said"),
    [
        (needing(), [node(0)], "1 CPUs, and no node has more than 0 CPUs"),
        (needing(), [], "0 nodes are up"),
        (needing(4), [node(3), node(3)], "4 CPUs, and no node has more than 3 CPUs"),
        (needing(1, 2), [node(8, 1)], "2 GPUs, and no node has more than 1 GPUs"),
        (needing(1, 0, 9000), [node(8)], "9000 MB of memory, and no node has more than 8000 MB"),
        (needing(4, 1), [node(8), node(2, 1)], "4 CPUs, 1 GPUs on one node, and no node has all"),
    ],
)
def test_a_cluster_without_room_is_told_what_it_lacks(needs: Stage, nodes: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(ConfigError, match=f"a worker of test needs .*{said}"):
        workers_that_fit(needs, nodes)


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


@pytest.mark.slow
def test_a_stage_that_asks_for_a_gpu_gets_it(tmp_path: Path) -> None:
    """Ray only counts GPUs; none has to be there."""
    done = subprocess.run(
        [sys.executable, "-c", GPU_RUN, str(tmp_path / "lake")],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        cwd=CHECKOUT, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["25", "1"]


class Gated:
    """Waits at one item until somebody opens the gate."""

    def __init__(self, gate: Path) -> None:
        self.gate = gate

    def process(self, item: Mapping[str, Any]) -> dict[str, list[dict[str, object]]]:
        while item["name"] == "b" and not self.gate.exists():
            time.sleep(0.02)
        return Worker().process({"name": item["name"].upper()})


STALLED_RUN = """
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
import ray
from pipeline.stage import run_stage
from schemas.catalog import Lake
from tests.pipeline.test_stage import Gated, items, stage
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR", address="local")
gate = Path(sys.argv[2])
def tell(done, total, note):
    print(note, flush=True)
    if " holds b " in note:
        gate.touch()
gated = replace(stage(), make_worker=partial(Gated, gate))
print(run_stage(Lake(sys.argv[1]), gated, items("abc"), "run", 1, tell, stall_s=0.1).num_done)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stage_that_stands_still_says_who_holds_what(tmp_path: Path) -> None:
    """The gate opens when the item that waits at it is named: without a watchdog this would never end."""
    done = subprocess.run(
        [sys.executable, "-c", STALLED_RUN, str(tmp_path / "lake"), str(tmp_path / "gate")],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        cwd=CHECKOUT, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "3"
    told = next(line for line in done.stdout.splitlines() if " holds b " in line)
    assert re.fullmatch(r"no progress for \d+ s: worker \d+ on \S+ holds b since \d\d:\d\d:\d\d UTC", told)
