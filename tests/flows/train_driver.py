"""A training in a process of its own, on two workers that share the weights, slow enough to be killed at a chosen step.

python -m tests.flows.train_driver FOLDER
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tests.train.small_data import pretrain_config, sequence_data
from train.launch import run_training, training_identity
from train.pretrain import PretrainObjective

STEPS = 240


@dataclass(frozen=True)
class SlowObjective(PretrainObjective):
    """Ten steps a second."""

    def finish_step(self, model: nn.Module, step: int, device: torch.device, state: dict[str, Tensor]) -> None:
        time.sleep(0.1)


def make(folder: Path, kind: type[PretrainObjective] = SlowObjective) -> PretrainObjective:
    """The training of a folder."""
    config = pretrain_config(
        steps=STEPS,
        batch_size=4,
        model={"dropout": 0.2},
        execution={
            "num_workers": 2,
            "layout": {"shard": 2},
            "log_every": 1,
            "checkpoint_every": 7,
            "max_failures": 20,
            "evaluate_every": 20,
        },
    )
    held_out = sequence_data(folder, seed=1, items="held ")
    return kind(config, sequence_data(folder), held_out=held_out)


def main() -> None:
    """Train, or be killed trying."""
    folder = Path(sys.argv[1])
    objective = make(folder)
    run_training(objective, training_identity("pretrain", objective.config, "data", "sha"), folder / "run", None)


if __name__ == "__main__":
    main()
