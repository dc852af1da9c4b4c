"""Calls that never come back, each after it has left a mark. Nothing is imported that takes long to import, so that a time-out
of seconds finds them hanging and not on their way, also on a machine under load.
"""

import ctypes
import time
from pathlib import Path

FOREVER_S = 3600


def come_back(mark: str) -> None:
    """Leaves its mark and does come back."""
    Path(mark).touch()


def hang(mark: str) -> None:
    """Sleeps as Python does."""
    Path(mark).touch()
    time.sleep(FOREVER_S)


def hang_in_native_code(mark: str) -> None:
    """Sleeps with the interpreter's lock: no signal handler runs."""
    Path(mark).touch()
    ctypes.PyDLL(None).sleep(FOREVER_S)
