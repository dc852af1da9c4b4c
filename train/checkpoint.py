"""Checkpoints of a training in progress: weights that are trained, optimizer, step, and the data and options that they belong
to. Frozen weights are in none: they come from where the training began.

They are written while the training goes on, by all workers, each its part, and load into any other layout.

No random state is stored: whatever is random in a step is drawn from (seed, step). A folder `step_<number>` appears by
a rename after everything in it is on disk, so what has that name is whole.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from schemas.errors import ConfigError
from train.files import sync, write_text
from train.parallelize import barrier, broadcast_int, rank

MANIFEST = "checkpoint.json"
LAST_WAIT_S = 10.0


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


class CheckpointWriter:
    """Checkpoints of one training, written while it goes on. Every method is called by all workers.

    A save copies the state and returns; files are written by a thread, whose messages have a process group of their own.
    `publish`, called after every step, gives what is written its name.
    """

    def __init__(self, folder: Path, identity: TrainingIdentity, keep_last: int, keep_every: int | None = None) -> None:
        self._folder, self._identity = folder, identity
        self._keep_last, self._keep_every = keep_last, keep_every
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._step = 0
        self._writing: Future[Any] | None = None

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        extra: Mapping[str, Tensor],
    ) -> None:
        """Begin to write the state after `step` steps, once the one before is written."""
        self.wait()
        draft = self._draft(step)
        if rank() == 0:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
        barrier()
        writer = FileSystemWriter(draft, single_file_per_rank=True, sync_files=True)
        writing = async_save(
            _state(model, optimizers, extra),
            storage_writer=writer,
            process_group=self._group,
            no_dist=self._group is None,
        )
        assert isinstance(writing, Future)
        self._step, self._writing = step, writing

    def publish(self) -> None:
        """Give a checkpoint its name if all of it is written; older ones go.

        Raises: what stopped the thread, such as a full disk.
        """
        if self._writing is None or not self._writing.done():
            return
        self._writing.result()
        self._writing = None
        if rank() != 0:
            return  # the first worker's part is done when those of all are
        draft, target = self._draft(self._step), self._folder / f"step_{self._step:08d}"
        manifest = {"step": self._step, **asdict(self._identity)}
        write_text(draft / MANIFEST, json.dumps(manifest, sort_keys=True) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        draft.rename(target)
        sync(self._folder)
        for step, old in finished(self._folder)[: -self._keep_last]:
            if self._keep_every is None or step % self._keep_every:
                shutil.rmtree(old)

    def wait(self) -> None:
        """Wait until what was saved is written and has its name."""
        if self._writing is not None:
            wait([self._writing])
            self.publish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.wait()
        elif self._writing is not None:
            # What failed may have taken the other workers with it, so this is not for ever.
            wait([self._writing], timeout=LAST_WAIT_S)
            if self._writing.done() and self._writing.exception() is None:
                self.publish()

    def _draft(self, step: int) -> Path:
        return self._folder / f".step_{step:08d}.draft"


def latest(folder: Path) -> tuple[int, Path] | None:
    """A checkpoints folder -> step and folder of the newest finished checkpoint, None if there is none."""
    found = finished(folder)
    return found[-1] if found else None


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
    if rank() == 0:
        for draft in folder.glob(".step_*.draft"):  # what a kill left
            shutil.rmtree(draft)
    newest = latest(folder)
    step = broadcast_int(newest[0] if newest else 0)
    if step == 0:
        return 0
    source = folder / f"step_{step:08d}"
    identity.check(json.loads((source / MANIFEST).read_text(encoding="utf-8")), source)
    state = _state(model, optimizers, extra)
    load(state, storage_reader=FileSystemReader(source), no_dist=not dist.is_initialized())
    set_state_dict(
        model,
        list(optimizers),
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(ignore_frozen_params=True, strict=False),  # what is missing was an error before
    )  # `extra` was loaded in place
    return step


def _state(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], extra: Mapping[str, Tensor]
) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(
        model, list(optimizers), options=StateDictOptions(ignore_frozen_params=True)
    )
    return {"model": model_state, "optimizer": optimizer_state, "extra": dict(extra)}


def finished(folder: Path) -> list[tuple[int, Path]]:
    """A checkpoints folder -> steps and folders of its finished checkpoints, the oldest first."""
    found = [path for path in folder.glob("step_*") if (path / MANIFEST).exists()]
    return sorted((int(path.name.removeprefix("step_")), path) for path in found)
