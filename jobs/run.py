"""A run: one execution of one job, recorded when it starts and when it ends, whatever the end."""

import contextlib
import importlib.metadata
import json
import platform
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from schemas.catalog import Lake
from schemas.errors import FailureRateError
from schemas.recipe import Config, canonical_json
from schemas.runs import RUNS

REPORTED_PACKAGES = ("ray", "torch", "pyiceberg", "scenedetect", "av", "opencv-python-headless", "opencv-python")


@dataclass
class Run:
    """What a job knows of its own execution; `outcome` is filled by the job and stored when it ends."""

    run_id: str
    job: str
    recipe: str
    inputs: dict[str, Any]
    outcome: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def recorded(lake: Lake, job: str, recipe: Config | Mapping[str, Any], inputs: Mapping[str, Any]) -> Iterator[Run]:
    """Record a started row, then a done or failed one with counts and seconds. Errors pass through."""
    text = recipe.canonical_json() if isinstance(recipe, Config) else canonical_json(dict(recipe))
    run = Run(f"{job}-{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}", job, text, dict(inputs))
    _append(lake, run, "started")
    started = time.monotonic()
    try:
        yield run
    except BaseException as error:
        if isinstance(error, FailureRateError):
            run.outcome = {**error.counts, **run.outcome}
        run.outcome |= {"error": f"{type(error).__name__}: {error}"[:2000], "seconds": time.monotonic() - started}
        _append(lake, run, "failed")
        raise
    run.outcome["seconds"] = time.monotonic() - started
    _append(lake, run, "done")


def _append(lake: Lake, run: Run, status: str) -> None:
    row = {
        "run_id": run.run_id,
        "status": status,
        "job": run.job,
        "recipe": run.recipe,
        "inputs": json.dumps(run.inputs, sort_keys=True, default=str),
        "outcome": json.dumps(run.outcome, sort_keys=True, default=str),
        "code_version": code_version(),
        "environment": json.dumps(environment(), sort_keys=True),
        "written_at": datetime.now(UTC),
    }
    lake.append(RUNS, [row], run.run_id)


@cache
def code_version() -> str:
    """The distribution's version, with the commit when this is a git checkout."""
    version = importlib.metadata.version("outback")
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return version
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # git is not needed to run, only to say more
        return version
    return f"{version}+{commit}"


@cache
def environment() -> dict[str, str]:
    """Python, platform and the versions of what computes."""
    found = {"python": sys.version.split()[0], "platform": platform.platform(), "host": platform.node()}
    for name in REPORTED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
