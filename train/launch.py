"""From the driver to the workers: start a training on Ray, follow it, and hand back what it left.

Ray Train starts the workers, restarts them when one dies, and forms the process group. State lives in the training's
own folder, so the same call after any accident, on this cluster or another, goes on from the newest checkpoint.
"""

import contextlib
import json
import logging
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from schemas.errors import ConfigError, OutbackError
from schemas.recipe import short_hash
from train.checkpoint import TrainingIdentity, latest
from train.loop import ExecutionConfig, Objective, TrainingConfig, TrainingFolder, run_loop, write_identity
from train.progress import OnProgress, TrainingResult, follow

# Most of what one `fit` costs is starting helper processes that each import Ray and torch. These turn off, or speed up,
# what a training of this kind has no use for: metrics for a dashboard, notice of cloud machines going away, and a
# two-second poll before the end of the workers is noticed.
RAY_TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
}
UNUSED_CALLBACKS = {
    "PlacementGroupCleanerCallback",  # asks the dashboard, each second, whether the driver lives
    "DatasetsCallback",  # serves Ray Data, which does not feed these trainings
}
RESIZE_INTERVAL_S = 60.0  # between two looks at whether the cluster has room for more workers
WORKER_ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # without it, deterministic matrix products raise on a GPU
}


def training_identity(
    objective_name: str, config: TrainingConfig, data_id: str, data_sha256: str, start_digest: str | None = None
) -> TrainingIdentity:
    """An objective's name, its options, its data and the weights that it begins with -> what decides the weights. How it
    is executed does not.
    """
    options = config.identity()
    if start_digest is not None:
        options["start"] = start_digest
    return TrainingIdentity(objective_name, short_hash({"objective": objective_name, **options}), data_id, data_sha256)


def run_training(
    objective: Objective, identity: TrainingIdentity, storage: Path, on_progress: OnProgress | None
) -> TrainingResult:
    """Train on Ray, or go on with what `storage` holds, or return at once if that is finished.

    Uses the Ray cluster that this process is connected to, or a local one for as long as it takes.

    Raises: ConfigError if the folder holds another training or the cluster is too small; the worker's own error if it
        keeps failing; OutbackError if the workers keep dying.
    """
    folder = TrainingFolder(storage.absolute())
    folder.path.mkdir(parents=True, exist_ok=True)
    write_identity(folder, identity)
    if folder.result.exists():
        return _result(folder, resumed_from_step=objective.config.steps)
    newest = latest(folder.checkpoints)
    with _environment(RAY_TRAIN_ENVIRONMENT), _ray(objective.config.execution), follow(folder.progress, on_progress):
        _fit(objective, identity, folder)
    return _result(folder, resumed_from_step=newest[0] if newest else 0)


def _result(folder: TrainingFolder, resumed_from_step: int) -> TrainingResult:
    values = json.loads(folder.result.read_text(encoding="utf-8"))
    return TrainingResult(folder=folder.weights, resumed_from_step=resumed_from_step, **values)


def _fit(objective: Objective, identity: TrainingIdentity, folder: TrainingFolder) -> None:
    import ray.train
    import ray.train.torch
    from ray import cloudpickle

    from train.elastic import FittingWorkers

    execution, fitting = objective.config.execution, objective.config.fitting_workers()
    is_elastic = execution.min_workers is not None

    class LeanTorchTrainer(ray.train.torch.TorchTrainer):
        """Without the helper actors that this training has no use for: seconds less for each start."""

        def _create_default_callbacks(self) -> list[Any]:
            made = super()._create_default_callbacks()  # type: ignore[misc]
            return [callback for callback in made if type(callback).__name__ not in UNUSED_CALLBACKS]

        def _initialize_and_run_controller(self, **options: Any) -> Any:
            if is_elastic:
                options["scaling_policy"] = FittingWorkers(self.scaling_config, fitting)
            return super()._initialize_and_run_controller(**options)  # type: ignore[misc]

    trainer = LeanTorchTrainer(
        _worker,
        # As bytes: Ray's controller looks at this dictionary, and would import all that it names just to pass it on.
        train_loop_config={"training": cloudpickle.dumps((objective, identity, folder.path))},
        torch_config=ray.train.torch.TorchConfig(backend="cpu:gloo,cuda:nccl" if execution.use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(fitting[0], fitting[-1]) if is_elastic else execution.num_workers,  # type: ignore[arg-type]
            elastic_resize_monitor_interval_s=RESIZE_INTERVAL_S,  # type: ignore[call-arg]
            use_gpu=execution.use_gpu,
            resources_per_worker={"CPU": execution.num_threads, **({"GPU": 1} if execution.use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=str(folder.path),
            failure_config=ray.train.FailureConfig(max_failures=execution.max_failures),
            worker_runtime_env={"env_vars": WORKER_ENVIRONMENT},  # type: ignore[call-arg]
        ),
    )
    try:
        with _signals_kept():
            trainer.fit()
    except ray.train.TrainingFailedError as error:
        for failure in getattr(error, "worker_failures", {}).values():
            if isinstance(failure, OutbackError):
                raise failure from error
        raise OutbackError(
            f"the workers of the training in {folder.path} failed {execution.max_failures + 1} times, the last time "
            f"with: {error}. Checkpoints are kept: the same command goes on from the newest"
        ) from error


def _worker(arguments: dict[str, bytes]) -> None:
    import ray.train
    from ray import cloudpickle

    objective, identity, storage = cloudpickle.loads(arguments["training"])
    # They may be fewer than were asked for, and each have more to do.
    config = objective.config.by_workers(ray.train.get_context().get_world_size())
    objective = replace(objective, config=config)
    run_loop(objective, identity, storage, lambda figures: ray.train.report(dict(figures)))


@contextlib.contextmanager
def _ray(execution: ExecutionConfig) -> Iterator[None]:
    import ray

    needed = execution.min_workers or execution.num_workers
    cpus = needed * execution.num_threads
    if ray.is_initialized():
        resources = ray.cluster_resources()
        if len(ray.nodes()) == 1 and resources.get("CPU", 0) < cpus:
            raise ConfigError(
                f"found {resources.get('CPU', 0):.0f} CPUs in the Ray cluster, expected at least {cpus} for "
                f"{needed} workers of {execution.num_threads} threads: lower one of the two"
            )
        _check_gpus(execution)
        yield
        return
    ray.init(
        address="local",
        num_cpus=max(cpus, os.cpu_count() or 1),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    try:
        _check_gpus(execution)
        yield
    finally:
        ray.shutdown()


def _check_gpus(execution: ExecutionConfig) -> None:
    """Raises: ConfigError if workers would wait for ever for a GPU that no node has."""
    import ray

    found, needed = ray.cluster_resources().get("GPU", 0), execution.min_workers or execution.num_workers
    if execution.use_gpu and len(ray.nodes()) == 1 and found < needed:
        raise ConfigError(
            f"found {found:.0f} GPUs in the Ray cluster, expected {needed}, one for each worker: "
            "lower num_workers, or set use_gpu to false"
        )


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for the block, where the user has not set them already."""
    added = [name for name in values if name not in os.environ]
    os.environ.update({name: values[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Put back the handler of Ctrl-C, which Ray Train replaces for good."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
