"""The loop every training runs: resume, step, log, checkpoint, export. It knows no objective and no cluster.

A step is a function of (weights, seed, step): rows, dropout and whatever else is random are drawn from the two numbers.
So a training that was killed and resumed ends with the very weights of one that was not, as long as its layout
(workers, threads, kind of machine) is the same; another layout changes rounding only.
"""

import ctypes
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from model.weights import digest
from schemas.errors import ConfigError, OutbackError
from schemas.recipe import Config, later_option
from train.batches import Rows, batch_indices, worker_share
from train.checkpoint import CheckpointWriter, TrainingIdentity, restore_latest
from train.files import write_text
from train.journal import Journal
from train.loggers import open_loggers
from train.losses import Term, sum_of
from train.mesh import LayoutConfig, Mesh, build_mesh
from train.meter import Meter, Work
from train.optim import NetworkUpdate, OptimConfig
from train.parallelize import barrier, num_workers, rank, reduce_figures, reduce_step, share_batch_norm
from train.progress import ProgressLog, read_losses
from train.samples import Sample
from train.sharding import gather_model

LOCK_WAIT_S = 60.0
SEED_LIMIT = 2**63
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


class ExecutionConfig(Config):
    """How a training runs, which leaves its result alone up to rounding: no part of its identity."""

    num_workers: int = Field(default=1, ge=1)
    min_workers: int | None = later_option(None, ge=1)
    """With how many workers it starts, or goes on, while the cluster has no room for `num_workers`; None: with no fewer."""
    num_threads: int = Field(default=2, ge=1)
    """CPU threads, and CPUs asked of Ray, for each worker. Another number rounds differently."""
    use_gpu: bool = False
    checkpoint_every: int = Field(default=100, ge=1)
    keep_last: int = Field(default=2, ge=1)
    keep_every: int | None = later_option(None, ge=1)
    """Checkpoints at multiples of this step are kept for good."""
    log_every: int = Field(default=10, ge=1)
    evaluate_every: int | None = later_option(None, ge=1)
    """Steps between evaluations on held-out data, if there is some; None: after the last step alone."""
    held_out_rows: int = later_option(64, ge=1)
    """Rows of the held-out data that an evaluation reads at most, the first ones."""
    loggers: tuple[str, ...] = later_option(("tensorboard",))
    """Where figures go besides the progress file: `tensorboard`, or `module:function` (train.loggers)."""
    peak_tflops: float | None = later_option(None, gt=0)
    """What a worker's GPU can do, for MFU: 989 for bfloat16 on an H100."""
    max_failures: int = Field(default=3, ge=0)
    """How often Ray restarts the workers before it gives up."""

    @property
    def spread(self) -> LayoutConfig:
        """How the network is spread over the workers: each holds all of it, unless it is a language model's."""
        return LayoutConfig()


class TrainingConfig(Config):
    """What all trainings share. A step reads `batch_size` rows over all workers."""

    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    seed: int = Field(default=0, ge=0)
    optim: OptimConfig = OptimConfig()
    execution: ExecutionConfig = ExecutionConfig()

    def identity(self) -> dict[str, Any]:
        """What the weights depend on: not how the training is executed."""
        return self.model_dump(mode="json", exclude={"execution"})

    def by_workers(self, num_workers: int) -> Self:
        """The same training, by so many workers."""
        return self.model_copy(update={"execution": self.execution.model_copy(update={"num_workers": num_workers})})

    def is_due(self, every: int | None, done: int) -> bool:
        """Whether something that happens so often, and at the end, happens after these many steps."""
        return done == self.steps or (every is not None and done % every == 0)

    def fitting_workers(self) -> tuple[int, ...]:
        """The numbers of workers that it may run with, rising: those that its layout and its batch can be shared among."""
        most, least = self.execution.num_workers, self.execution.min_workers
        return tuple(count for count in range(least or most, most + 1) if self._misfit(count) is None)

    def _misfit(self, workers: int) -> str | None:
        """Why so many workers cannot share layout and batch, None if they can."""
        spread = self.execution.spread
        if workers % spread.group:
            return f"{workers}, expected a multiple of shard x context x tensor = {spread.group}"
        readers = spread.readers(workers)
        if self.batch_size < readers or (not spread.is_whole and self.batch_size % readers):
            expected = "at least one row for each worker" if spread.is_whole else "as many rows for each worker"
            return f"{workers} and batch_size {self.batch_size}, expected {expected} that reads its own: {readers} do"
        return None

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        spread, most, least = self.execution.spread, self.execution.num_workers, self.execution.min_workers
        if least is not None and least > most:
            raise ValueError(f"found min_workers {least}, expected at most num_workers {most}")
        for name, workers in (("num_workers", most), ("min_workers", least or most)):
            if (misfit := self._misfit(workers)) is not None:
                raise ValueError(f"found {name} {misfit}")
        if self.optim.matrices == "muon" and not spread.is_whole:
            raise ValueError("found optim.matrices 'muon' and a layout, expected 'adamw': Muon needs whole matrices")
        return self


class Objective(Protocol):
    """What is trained, on what. It is sent to the workers, so it holds options and paths, never networks."""

    @property
    def config(self) -> TrainingConfig:
        """The options."""
        ...

    def num_rows(self) -> int:
        """Rows of the data."""
        ...

    def build_model(self, mesh: Mesh) -> nn.Module:
        """A network with fresh weights, drawn from torch's generator, or this worker's part of it, on its device."""
        ...

    def networks(self, model: nn.Module) -> Sequence[tuple[nn.Module, OptimConfig]]:
        """The networks in the model that are updated each on its own, with their options; most often the model is one."""
        ...

    def initial_state(self, model: nn.Module) -> dict[str, Tensor]:
        """Tensors beyond weights that later steps depend on; they are kept in checkpoints and changed in place."""
        ...

    def start(self, model: nn.Module, mesh: Mesh) -> None:
        """Called once, before step 0, on all workers alike."""
        ...

    def parts(self, rows: Rows) -> Sequence[Rows]:
        """A worker's rows of a step -> those that go through the network together; gradients of all parts are added."""
        ...

    def loss(self, model: nn.Module, rows: Rows, step: int, mesh: Mesh, state: dict[str, Tensor]) -> dict[str, Term]:
        """The terms of these rows at this step. The one named `loss` is trained on."""
        ...

    def finish_step(self, model: nn.Module, step: int, device: torch.device, state: dict[str, Tensor]) -> None:
        """Called after the update of step `step`, on all workers alike."""
        ...

    def evaluate(self, model: nn.Module, mesh: Mesh) -> dict[str, Term]:
        """The terms of held-out data, of which each worker works out a share; none without such data."""
        ...

    def samples(self, model: nn.Module, done: int, mesh: Mesh) -> list[Sample]:
        """What the first worker draws after these many steps, if it is time for it; nothing on the others."""
        ...

    def work(self, rows: Rows) -> Work:
        """What rows of a batch are to compute. Asked of the first worker."""
        ...

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write the trained weights, at once."""
        ...


class WeightsOnly:
    """What most objectives have in common: the model is one network, rows go through it together, nothing but weights is kept,
    and nothing is done around the steps.
    """

    config: TrainingConfig

    def networks(self, model: nn.Module) -> Sequence[tuple[nn.Module, OptimConfig]]:
        """The model."""
        return [(model, self.config.optim)]

    def parts(self, rows: Rows) -> Sequence[Rows]:
        """All rows together."""
        return [rows]

    def initial_state(self, model: nn.Module) -> dict[str, Tensor]:
        """Nothing but weights."""
        return {}

    def start(self, model: nn.Module, mesh: Mesh) -> None:
        """Nothing to prepare."""

    def finish_step(self, model: nn.Module, step: int, device: torch.device, state: dict[str, Tensor]) -> None:
        """Nothing to do."""

    def evaluate(self, model: nn.Module, mesh: Mesh) -> dict[str, Term]:
        """Nothing is held out."""
        return {}

    def samples(self, model: nn.Module, done: int, mesh: Mesh) -> list[Sample]:
        """Nothing is drawn."""
        return []

    def work(self, rows: Rows) -> Work:
        """Rows, whatever they cost."""
        return Work(len(rows), "rows")


@dataclass(frozen=True)
class TrainingFolder:
    """Where a training keeps what. Nothing else writes here."""

    path: Path

    @property
    def identity(self) -> Path:
        """Whose folder this is."""
        return self.path / "training.json"

    @property
    def lock(self) -> Path:
        """Held by the one process that writes."""
        return self.path / "lock"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints of the training in progress."""
        return self.path / "checkpoints"

    @property
    def progress(self) -> Path:
        """Logged steps."""
        return self.path / "progress.jsonl"

    @property
    def weights(self) -> Path:
        """The exported network."""
        return self.path / "weights"

    @property
    def result(self) -> Path:
        """Written last: the training is finished."""
        return self.path / "result.json"


Report = Callable[[Mapping[str, float]], None]


def run_loop(objective: Objective, identity: TrainingIdentity, storage: Path, report: Report | None = None) -> None:
    """Train to the end, from the newest checkpoint in `storage` if there is one. Called by every worker.

    Rank 0 leaves the exported weights and `result.json`. `report` is called by all workers after each checkpoint.

    Raises: ConfigError if the folder holds another training, another process trains in it, or the loss is not finite.
    """
    config, folder = objective.config, TrainingFolder(storage)
    use_exact_arithmetic(config.execution.num_threads)
    return_freed_memory()
    mesh = build_mesh(config.execution.spread, _device(config.execution))
    with _only_writer(folder.lock):
        torch.manual_seed(_mixed(config.seed, 0))
        model = objective.build_model(mesh).train()
        share_batch_norm(model)
        updates = [NetworkUpdate(network, optim) for network, optim in objective.networks(model)]
        optimizers = [optimizer for update in updates for optimizer in update.optimizers]
        state = objective.initial_state(model)
        first = restore_latest(folder.checkpoints, model, optimizers, state, identity)
        if first == 0:
            objective.start(model, mesh)
        with _writer(folder, identity, config.execution) as writer, _journal(folder, config, mesh, first) as journal:
            for step in range(first, config.steps):
                rows = batch_indices(config.seed, step, config.batch_size, objective.num_rows())
                figures = _train_step(objective, model, updates, step, rows, mesh, state)
                done = step + 1
                writer.publish()
                if rank() == 0:
                    journal.meter.add(objective.work(rows))
                is_evaluated = config.is_due(config.execution.evaluate_every, done)
                with journal.meter.paused():
                    if is_evaluated:
                        figures |= _evaluate(objective, model, mesh)
                if is_evaluated or config.is_due(config.execution.log_every, done):
                    journal.write(done, figures)
                with journal.meter.paused():
                    if samples := objective.samples(model, done, mesh):
                        journal.write_samples(done, samples)
                if done % config.execution.checkpoint_every == 0 and done < config.steps:
                    with journal.meter.waiting("checkpoint"):
                        writer.save(done, model, optimizers, state)
                        if report is not None:
                            report({"step": done, **figures})
        whole = gather_model(model, mesh)
        if rank() == 0:
            _finish(objective, whole, folder, config.steps)
        barrier()


def _journal(folder: TrainingFolder, config: TrainingConfig, mesh: Mesh, first: int) -> Journal:
    meter = Meter(num_workers(), mesh.device, config.execution.peak_tflops)
    if rank() != 0:
        return Journal(None, [], meter)
    loggers = open_loggers(config.execution.loggers, folder.path, first)
    return Journal(ProgressLog(folder.progress, config.steps, first), loggers, meter)


def _evaluate(objective: Objective, model: nn.Module, mesh: Mesh) -> dict[str, float]:
    """The figures of held-out data, by names of their own."""
    model.eval()
    with torch.no_grad():
        terms = objective.evaluate(model, mesh)
    model.train()
    figures = reduce_figures(terms, mesh.layout) if terms else {}
    return {f"held_out_{name}": value for name, value in figures.items()}


def _writer(folder: TrainingFolder, identity: TrainingIdentity, execution: ExecutionConfig) -> CheckpointWriter:
    return CheckpointWriter(folder.checkpoints, identity, execution.keep_last, execution.keep_every)


def use_exact_arithmetic(num_threads: int) -> None:
    """Make this process compute the same bits each time: fixed threads, deterministic kernels.

    Raises: OutbackError if the number of threads cannot be set: with another one some sums have other last bits.
    """
    torch.set_num_threads(num_threads)
    if torch.get_num_threads() != num_threads:
        raise OutbackError(
            f"found {torch.get_num_threads()} threads in this process after setting {num_threads}: something has taken "
            "torch.set_num_threads over, as vLLM does on CPU; train in a process of its own"
        )
    torch.use_deterministic_algorithms(True)
    # Filling fresh memory with NaN finds bugs in kernels, at the price of writing everything twice.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def return_freed_memory() -> None:
    """Have glibc give blocks of 8 MiB and more back to the system when they are freed.

    It raises the size from which it does so up to 32 MiB as it meets blocks of it. Activations are then cut from heaps, which
    shrink no more once something small lies at their end: a step of 5,120 tokens takes half as much again. Smaller blocks
    stay where they are, 128 MiB of them at most at an end, since each page that comes back costs time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # only glibc has it
        mallopt(M_MMAP_THRESHOLD, 8 << 20)
        mallopt(M_TRIM_THRESHOLD, 128 << 20)


def _train_step(
    objective: Objective,
    model: nn.Module,
    updates: Sequence[NetworkUpdate],
    step: int,
    batch: Rows,
    mesh: Mesh,
    state: dict[str, Tensor],
) -> dict[str, float]:
    config = objective.config
    torch.manual_seed(_mixed(config.seed, step + 1, rank()))  # dropout
    rows = worker_share(batch, mesh.data_rank, mesh.data_size)
    model.zero_grad(set_to_none=True)
    found = []
    for part in objective.parts(rows):
        terms = objective.loss(model, part, step, mesh, state)
        terms["loss"].total.backward()
        found.append({name: Term(term.total.detach(), term.weight) for name, term in terms.items()})
    figures = reduce_step(model, {name: sum_of([terms[name] for terms in found]) for name in found[0]}, mesh.layout)
    if "loss" not in figures:
        return figures  # its rows hold nothing that weighs: all weights stay as they are
    norms = [update.clip() for update in updates]
    if not all(norm < float("inf") for norm in norms):
        shown = " and ".join(str(norm) for norm in norms)
        raise ConfigError(
            f"step {step}: found the loss {figures['loss']} and the gradient norm {shown}, expected finite numbers; "
            f"lower optim.learning_rate (now {config.optim.learning_rate}) or raise optim.warmup_steps"
        )
    rates = [update.step(step, config.steps) for update in updates]
    objective.finish_step(model, step, mesh.device, state)
    return {**figures, "grad_norm": norms[0], "learning_rate": rates[0]}


def _finish(objective: Objective, model: nn.Module, folder: TrainingFolder, steps: int) -> None:
    objective.export(model.eval(), folder.weights)
    result = {"step": steps, "checkpoint_digest": digest(folder.weights), "losses": read_losses(folder.progress)}
    write_text(folder.result, json.dumps(result, sort_keys=True) + "\n")


def write_identity(folder: TrainingFolder, identity: TrainingIdentity) -> None:
    """Make the folder this training's own, or see that it is.

    Raises: ConfigError if it is another's.
    """
    if folder.identity.exists():
        identity.check(json.loads(folder.identity.read_text(encoding="utf-8")), folder.path)
    else:
        write_text(folder.identity, json.dumps(asdict(identity), sort_keys=True) + "\n")


def _device(execution: ExecutionConfig) -> torch.device:
    if not execution.use_gpu:
        return torch.device("cpu")
    import ray.train.torch

    device: torch.device = ray.train.torch.get_device()
    return device


@contextmanager
def _only_writer(lock: Path) -> Iterator[None]:
    """Hold the folder while the block runs. A killed process lets go of it at once, a dying one within moments.

    Raises: ConfigError if another process keeps it.
    """
    if rank() != 0:
        yield
        return
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a+") as file:
        _acquire(file, lock)
        yield


def _acquire(file: Any, lock: Path) -> None:
    waited_until = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > waited_until:
                raise ConfigError(
                    f"another process trains in {lock.parent}: it has held {lock.name} for {LOCK_WAIT_S:.0f} s. "
                    "Wait for it, or stop it"
                ) from None
            time.sleep(0.2)
        else:
            file.truncate(0)
            file.write(f"{os.uname().nodename} {os.getpid()}\n")
            file.flush()
            return


def _mixed(*numbers: int) -> int:
    """Numbers -> one seed, unlike that of their neighbours."""
    import numpy as np

    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] % SEED_LIMIT)
