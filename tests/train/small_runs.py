"""Trainings run to their end: in this process, or by the workers of a group on this machine."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from train.launch import training_identity
from train.loop import Objective, TrainingFolder, run_loop
from train.pretrain import PretrainObjective

JOIN_S = 300


@dataclass(frozen=True, kw_only=True)
class Killed(PretrainObjective):
    """Kills its own process after some steps, once."""

    after: int
    mark: Path

    def finish_step(self, model: nn.Module, step: int, device: torch.device, state: dict[str, Tensor]) -> None:
        if step + 1 == self.after and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def run(objective: Objective, storage: Path) -> dict[str, Tensor]:
    """Train, from the newest checkpoint in `storage` on if there is one; the exported weights."""
    run_loop(objective, training_identity("test", objective.config, "data", "sha"), storage)
    return load_file(TrainingFolder(storage).weights / "model.safetensors")


@contextmanager
def process_group(rank: int, num_workers: int, folder: Path) -> Iterator[None]:
    """This process is one of a group that meets in `folder`, whose name is short: gloo takes no long ones."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=num_workers)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def workers(num_workers: int, folder: Path, body: Callable[..., None], *arguments: object) -> Iterator[None]:
    """Processes of one group run `body(rank, folder, *arguments)` beside the block; all of them have to end well."""
    context = multiprocessing.get_context("spawn")
    children = [
        context.Process(target=_work, args=(rank, num_workers, folder, body, arguments)) for rank in range(num_workers)
    ]
    for child in children:
        child.start()
    try:
        yield
        for child in children:
            child.join(JOIN_S)
        assert [child.exitcode for child in children] == [0] * num_workers
    finally:
        for child in children:
            child.kill()


def run_workers(num_workers: int, folder: Path, body: Callable[..., None], *arguments: object) -> None:
    """`workers`, and nothing beside them."""
    with workers(num_workers, folder, body, *arguments):
        pass


def _work(rank: int, num_workers: int, folder: Path, body: Callable[..., None], arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    with process_group(rank, num_workers, folder):
        body(rank, folder, *arguments)
