"""Where Ray work runs: the cluster named by RAY_ADDRESS, or one of our own on this machine for as long as it is needed."""

import atexit
import logging
import os
import socket
import sys
import tempfile
from pathlib import Path

from schemas.errors import ConfigError

SESSION_PREFIX = "outback-ray-"
KNOCK_TIMEOUT_S = 2.0
OWN_CLUSTER = {  # which lives for one job: what it does without is for clusters that are shared and looked at
    "RAY_prestart_worker_first_driver": "0",  # a process for each CPU, beside those that the stage asks for
    "RAY_enable_metrics_collection": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def ensure_ray() -> None:
    """Connect to Ray once per process. A local cluster is never shared with, or joined from, other programs' clusters.

    Raises: ConfigError within seconds if nothing answers at RAY_ADDRESS.
    """
    address = os.environ.get("RAY_ADDRESS")
    if address and "ray" not in sys.modules:
        _knock(address)  # Ray takes seconds to import, and a minute to find that nobody is there
    import ray

    if ray.is_initialized():
        return
    # Ray's own notices are about its insides; what goes wrong with the work is raised, or is a row in `attempts`.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    if address:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            raise _no_cluster(address, error) from error
        return
    for name, value in OWN_CLUSTER.items():
        os.environ.setdefault(name, value)
    # Unix socket paths are limited to 107 bytes, so the session lives under a short folder of its own.
    _sweep_dead()
    folder = Path(tempfile.mkdtemp(prefix=f"{SESSION_PREFIX}{os.getpid()}-"))
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=str(folder),
    )
    atexit.register(_stop_local, folder)


def _knock(address: str) -> None:
    """Raises: ConfigError if `host:port` or `ray://host:port` does not answer. Other addresses are Ray's to find."""
    host, separator, port = address.rpartition("://")[2].rpartition(":")
    if not separator or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), KNOCK_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"no Ray cluster answers at RAY_ADDRESS={address!r} ({error}): start one, correct the address, or unset it to "
        "work on this machine alone"
    )


def _sweep_dead() -> None:
    """Remove the folders of drivers that were killed."""
    import shutil

    import psutil

    for folder in Path(tempfile.gettempdir()).glob(f"{SESSION_PREFIX}*-*"):
        owner = folder.name.removeprefix(SESSION_PREFIX).partition("-")[0]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)


def _stop_local(folder: Path) -> None:
    import shutil

    import ray

    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def num_cpus() -> int:
    """CPUs of the connected cluster, at least 1."""
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))
