"""What every test relies on: a shell that says nothing about lakes or clusters."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A machine under load draws examples slowly: that is no fault of what is tested.
settings.register_profile("outback", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("outback")

CHECKOUT = Path(__file__).resolve().parent.parent
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


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The root of the checkout."""
    return CHECKOUT
