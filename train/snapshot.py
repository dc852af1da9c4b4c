"""The weights of a training in progress, read by a process that is none of its workers and leaves it alone.

Nothing but weights is read, whatever layout wrote them. The training goes on meanwhile and removes older checkpoints.
"""

import warnings
from collections.abc import Callable
from pathlib import Path

from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load

from schemas.errors import ConfigError
from train.checkpoint import finished


def read_weights(
    folder: Path, model: nn.Module, step: int | None, on_pruned: Callable[[int], None] = lambda step: None
) -> int:
    """Fill a whole network with the weights after `step` steps, or the newest there are, from a checkpoints folder; the step.

    `on_pruned` hears of a checkpoint that was removed while it was read, before the next newest is.

    Raises: ConfigError if there is no such checkpoint, or it cannot be read.
    """
    tried: set[int] = set()
    while True:
        found, source = _choose(folder, step)
        try:
            _fill(model, source)
        except (OSError, CheckpointException) as error:
            is_newest = (found, source) in finished(folder)[-1:]
            if step is not None or is_newest or found in tried:
                raise _unreadable(folder, source, error) from error
            tried.add(found)
            on_pruned(found)
        else:
            return found


def _fill(model: nn.Module, source: Path) -> None:
    """Each tensor is read into its place: there is one copy of the weights, and one tensor more."""
    weights = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load({"model": weights}, storage_reader=FileSystemReader(source), no_dist=True)


def _choose(folder: Path, step: int | None) -> tuple[int, Path]:
    found = finished(folder)
    for known, source in reversed(found):
        if step in (None, known):
            return known, source
    if not found:
        raise ConfigError(f"found no checkpoint in {folder}: the first comes after execution.checkpoint_every steps")
    raise ConfigError(f"found no checkpoint of step {step} in {folder}; there are {_steps(folder)}")


def _unreadable(folder: Path, source: Path, error: BaseException) -> ConfigError:
    if source not in [path for _, path in finished(folder)]:
        return ConfigError(
            f"the checkpoint {source} was removed while it was read; there are {_steps(folder)}. Take one of them, or keep "
            "more with execution.keep_last and keep_every"
        )
    return ConfigError(f"the checkpoint {source} cannot be read: {error}")


def _steps(folder: Path) -> str:
    return f"steps {', '.join(str(step) for step, _ in finished(folder))}"
