"""Trainings on as many workers as a cluster has room for, while nodes go and come."""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from ray.train import ScalingConfig
from torch import Tensor, nn

from tests.train.small_data import pretrain_config, sequence_data
from tests.train.small_runs import run
from train import launch
from train.checkpoint import latest
from train.elastic import FittingWorkers
from train.launch import run_training, training_identity
from train.loop import TrainingFolder
from train.parallelize import num_workers, rank
from train.pretrain import PretrainConfig, PretrainObjective
from train.progress import read_losses

WAIT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Watched(PretrainObjective):
    """Writes down with how many workers each step was taken, and takes its time until it was enough."""

    seen: Path
    enough: Path

    def finish_step(self, model: nn.Module, step: int, device: torch.device, state: dict[str, Tensor]) -> None:
        if rank() == 0:
            with self.seen.open("a") as file:
                file.write(json.dumps([step, num_workers(), self.config.execution.num_workers]) + "\n")
        time.sleep(0.0 if self.enough.exists() or step < 3 else 0.3)


def read(seen: Path) -> list[list[int]]:
    return [json.loads(line) for line in seen.read_text().splitlines()] if seen.exists() else []


@contextmanager
def cluster(num_cpus: int) -> Iterator[Any]:
    """A node with the driver, and more if they are added."""
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": num_cpus, "include_dashboard": False})
    try:
        ray.init(address=made.address, log_to_driver=False)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def elastic(steps: int, **execution: Any) -> PretrainConfig:
    spread = {"num_workers": 2, "min_workers": 1, "checkpoint_every": 5, "log_every": 1, **execution}
    # Gradients that are only rounding stay small.
    optim = {"learning_rate": 0.003, "warmup_steps": 2, "eps": 1e-5}
    return pretrain_config(steps=steps, optim=optim, execution=spread)


def wait_until(condition: Callable[[], Any], training: Future[Any]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert not training.done(), training.result()
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.1)


@pytest.mark.slow
def test_a_training_takes_what_room_a_cluster_has_while_nodes_come_and_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "RESIZE_INTERVAL_S", 3.0)
    config, data, seen, storage = elastic(100), sequence_data(tmp_path), tmp_path / "seen", tmp_path / "parts"
    run(PretrainObjective(config, data), tmp_path / "whole")
    objective = Watched(config, data, seen=seen, enough=tmp_path / "enough")
    checkpoints = TrainingFolder(storage).checkpoints
    with cluster(1) as made, ThreadPoolExecutor() as pool:
        identity = training_identity("test", config, "data", "sha")
        training = pool.submit(run_training, objective, identity, storage, None)
        try:
            wait_until(lambda: latest(checkpoints) and read(seen)[-1][1] == 1, training)
            node = made.add_node(num_cpus=1)
            wait_until(lambda: read(seen)[-1][1] == 2, training)
            newest = latest(checkpoints)
            wait_until(lambda: latest(checkpoints) != newest, training)
            made.remove_node(node)
            wait_until(lambda: read(seen)[-1][1] == 1, training)
        finally:
            objective.enough.touch()
        result = training.result()
    sizes = [size for _, size, _ in read(seen)]
    changes = [after for before, after in pairwise([0, *sizes]) if after != before]
    assert changes == [1, 2, 1]
    assert all(size == told for _, size, told in read(seen))
    expected = read_losses(tmp_path / "whole" / "progress.jsonl")
    assert [line["step"] for line in result.losses] == list(range(1, config.steps + 1))
    for right, line in zip(expected, result.losses, strict=True):
        assert line["loss"] == pytest.approx(right["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("layout", "most", "least", "batch_size", "fitting"),
    [
        ({}, 4, 1, 4, (1, 2, 3, 4)),
        ({}, 4, None, 4, (4,)),
        ({"shard": 2}, 8, 2, 8, (2, 4, 8)),  # 6 of them cannot share 8 rows
        ({"context": 2}, 6, 2, 6, (2, 4, 6)),
    ],
)
def test_only_numbers_that_layout_and_batch_can_be_shared_among_are_taken(
    layout: dict[str, Any], most: int, least: int | None, batch_size: int, fitting: tuple[int, ...]
) -> None:
    execution = {"num_workers": most, "min_workers": least, "layout": layout}
    config = pretrain_config(batch_size=batch_size, execution=execution)
    assert config.fitting_workers() == fitting
    scaling = ScalingConfig(num_workers=(fitting[0], fitting[-1]), resources_per_worker={"CPU": 2})  # type: ignore[arg-type]
    policy = FittingWorkers(scaling, fitting)
    for room in range(most + 3):
        # Two nodes, on one of which a CPU is left over.
        found = policy._count_possible_workers({"a": {"CPU": 3.0}, "b": {"CPU": 2.0 * room}})
        assert found == max((count for count in fitting if count <= room + 1), default=0)


@pytest.mark.parametrize(
    ("execution", "said"),
    [
        ({"num_workers": 2, "min_workers": 4}, "found min_workers 4, expected at most num_workers 2"),
        ({"num_workers": 4, "min_workers": 3, "layout": {"shard": 2}}, "found min_workers 3, expected a multiple of"),
        (
            {"num_workers": 8, "min_workers": 6, "layout": {"shard": 2}},
            "found min_workers 6 and batch_size 8, expected as",
        ),
    ],
)
def test_fewest_workers_that_cannot_be_are_refused(execution: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        pretrain_config(batch_size=8, execution=execution)


def test_the_fewest_workers_are_no_part_of_what_a_training_is() -> None:
    assert elastic(8).identity() == elastic(8, min_workers=None, num_workers=1).identity()
    assert "min_workers" not in pretrain_config().canonical_json()
