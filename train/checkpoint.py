"""Checkpoints of a training in progress: weights, optimizer, step, and the data and options that they belong to.

No random state is stored: whatever is random in a step is drawn from (seed, step). A folder `step_<number>` appears by
a rename after everything in it is on disk, so what has that name is whole.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from schemas.errors import ConfigError
from train.files import sync, write_text
from train.parallelize import barrier, broadcast_int, rank

MANIFEST = "checkpoint.json"


@dataclass(frozen=True)
class TrainingIdentity:
    """What decides the weights: the hash of the options, and the data by name and content."""

    objective: str
    config_hash: str
    data_id: str
    data_sha256: str

    def check(self, found: Mapping[str, object], where: Path) -> None:
        """Compare with what a folder recorded.

        Raises: ConfigError naming what differs.
        """
        wanted = asdict(self)
        differing = [name for name, value in wanted.items() if found.get(name) != value]
        if differing:
            shown = ", ".join(f"{name} {found.get(name)!r}, expected {wanted[name]!r}" for name in differing)
            raise ConfigError(
                f"{where} holds another training: found {shown}. Give this training a folder of its own, "
                "or the data and options that the folder was started with"
            )


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    extra: Mapping[str, Tensor],
    identity: TrainingIdentity,
    *,
    keep_last: int,
) -> Path:
    """State after `step` steps -> `folder/step_<step>`, called by all workers; older ones beyond `keep_last` go."""
    target = folder / f"step_{step:08d}"
    draft = folder / f".{target.name}.draft"
    if rank() == 0:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    barrier()
    writer = FileSystemWriter(draft, single_file_per_rank=True, sync_files=True)
    save(_state(model, optimizers, extra), storage_writer=writer, no_dist=not dist.is_initialized())
    if rank() == 0:
        write_text(draft / MANIFEST, json.dumps({"step": step, **asdict(identity)}, sort_keys=True) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        draft.rename(target)
        sync(folder)
        for _, old in _finished(folder)[:-keep_last]:
            shutil.rmtree(old)
    barrier()
    return target


def latest(folder: Path) -> tuple[int, Path] | None:
    """A checkpoints folder -> step and folder of the newest finished checkpoint, None if there is none."""
    finished = _finished(folder)
    return finished[-1] if finished else None


def restore_latest(
    folder: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    extra: Mapping[str, Tensor],
    identity: TrainingIdentity,
) -> int:
    """Load the newest finished checkpoint into model, optimizers and the tensors of `extra`; its step, 0 without one.

    Called by all workers; rank 0 says which checkpoint. The number of workers may have changed since.

    Raises: ConfigError if the checkpoint belongs to other data or options.
    """
    newest = latest(folder)
    step = broadcast_int(newest[0] if newest else 0)
    if step == 0:
        return 0
    source = folder / f"step_{step:08d}"
    identity.check(json.loads((source / MANIFEST).read_text(encoding="utf-8")), source)
    state = _state(model, optimizers, extra)
    load(state, storage_reader=FileSystemReader(source), no_dist=not dist.is_initialized())
    set_state_dict(
        model, list(optimizers), model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )  # `extra` was loaded in place
    return step


def _state(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], extra: Mapping[str, Tensor]
) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, list(optimizers))
    return {"model": model_state, "optimizer": optimizer_state, "extra": dict(extra)}


def _finished(folder: Path) -> list[tuple[int, Path]]:
    found = [path for path in folder.glob("step_*") if (path / MANIFEST).exists()]
    return sorted((int(path.name.removeprefix("step_")), path) for path in found)
