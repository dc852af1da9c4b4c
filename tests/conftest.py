"""What every test relies on: a shell that says nothing about lakes or clusters."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A machine under load draws examples slowly: that is no fault of what is tested.
settings.register_profile("outback", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("outback")

CHECKOUT = Path(__file__).resolve().parent.parent
SETTINGS = ("OUTBACK_LAKE", "OUTBACK_FILES", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")


@pytest.fixture(autouse=True)
def _no_settings_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The root of the checkout."""
    return CHECKOUT
