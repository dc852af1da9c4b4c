"""What every test relies on: a shell that says nothing about lakes or clusters."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from schemas.catalog import Lake
from schemas.tables import TABLES

# A machine under load draws examples slowly: that is no fault of what is tested.
settings.register_profile("outback", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("outback")

CHECKOUT = Path(__file__).resolve().parent.parent
DEMO_SECONDS = 1800
SETTINGS = ("OUTBACK_LAKE", "OUTBACK_FILES", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")


@pytest.fixture(autouse=True)
def _same_priority() -> Iterator[None]:
    """Some encoders make the process a real-time one: every test after it would starve what it starts."""
    before = os.sched_getscheduler(0)
    yield
    assert os.sched_getscheduler(0) == before


@pytest.fixture(autouse=True)
def _no_settings_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def ray_apart() -> Iterator[None]:
    """For modules with clusters of their own: Ray holds one connection a process, and a cluster that ends cuts it off."""
    import ray

    ray.shutdown()
    yield
    ray.shutdown()


@dataclass(frozen=True)
class Demo:
    """A small demo that has ended, what it said, and what it held then."""

    folder: Path
    out: str
    contents: dict[str, tuple[int, str]]


def contents(folder: Path) -> dict[str, tuple[int, str]]:
    """A demo -> rows and content of every table."""
    lake = Lake.open(folder / "lake")
    return {t.name: (lake.facts(t).num_rows, lake.content_sha256(t)) for t in TABLES if not t.ledger}


@pytest.fixture(scope="session")
def smoke_demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """One for all who ask. Those who come later may find more in it, and put back what they take away."""
    folder = tmp_path_factory.mktemp("smoke") / "demo"
    command = [sys.executable, "-m", "jobs.cli", "demo", "--size", "smoke", "--folder", str(folder)]
    done = subprocess.run(
        command,
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=DEMO_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return Demo(folder, done.stdout, contents(folder))


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The root of the checkout."""
    return CHECKOUT
