"""A decoder that does to its process what broken media do to real ones, by the name of the file."""

import ctypes
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.decode import Image, open_video


def decode(path: Path) -> Iterator[tuple[float, Image]]:
    """Frames by PyAV; files named crash*, hang*, raise* and hungry* do as they are called."""
    if path.name.startswith("crash"):
        ctypes.string_at(0)
    if path.name.startswith("hang"):
        time.sleep(3600)
    if path.name.startswith("raise"):
        raise ZeroDivisionError("a decoder bug")
    if path.name.startswith("killworker"):
        marker = path.with_suffix(".killed")
        if not marker.exists():
            marker.touch()
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(3600)
    with open_video(path, "pyav") as video:
        for frame in video:
            yield frame.seconds, frame.bgr()
