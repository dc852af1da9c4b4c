"""What a training says of itself while it runs and when it is done.

The worker appends one JSON line per logged step to a file in the training's folder; the driver, which may sit on
another machine of a shared file system, reads it as it grows.
"""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.files import write_text

POLL_S = 0.25


@dataclass(frozen=True)
class Progress:
    """`step` of `steps` done, the loss of that step, seconds of stepping since this attempt began, and the latest speed."""

    step: int
    steps: int
    loss: float
    seconds: float
    speed: Mapping[str, float]


@dataclass(frozen=True)
class TrainingResult:
    """A finished training. `losses` holds what was logged, without times: equal trainings, equal lists.

    `resumed_from_step` is where this call took up the work: 0 from scratch, `step` if it had been finished before.
    """

    folder: Path
    checkpoint_digest: str
    step: int
    losses: list[dict[str, float]]
    resumed_from_step: int


OnProgress = Callable[[Progress], None]


class ProgressLog:
    """The file, as its one writer sees it. Lines beyond `resumed_from_step` belong to a lost attempt and go."""

    def __init__(self, path: Path, steps: int, resumed_from_step: int) -> None:
        kept = [line for line in _lines(path) if line["step"] <= resumed_from_step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.folder = path.parent
        self._path = path
        self._steps = steps

    def write(self, step: int, figures: Mapping[str, float], seconds: float, speed: Mapping[str, float]) -> None:
        """Append what is known after `step` steps; `speed` is what another run of the same training would not repeat."""
        line = {"step": step, **figures, "speed": dict(speed), "seconds": round(seconds, 3), "steps": self._steps}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_losses(path: Path) -> list[dict[str, float]]:
    """A progress file -> its lines without times, speeds and totals."""
    return [{name: line[name] for name in line if name not in ("speed", "seconds", "steps")} for line in _lines(path)]


@contextlib.contextmanager
def follow(path: Path, on_progress: OnProgress | None) -> Iterator[None]:
    """Call `on_progress`, from a thread, with every line that is added to the file while the block runs."""
    if on_progress is None:
        yield
        return
    ended = threading.Event()
    seen = [len(_lines(path))]

    def pass_on() -> None:
        lines = _lines(path)
        for line in lines[min(seen[0], len(lines)) :]:
            on_progress(Progress(int(line["step"]), int(line["steps"]), line["loss"], line["seconds"], line["speed"]))
        seen[0] = len(lines)

    def watch() -> None:
        while not ended.wait(POLL_S):
            pass_on()

    thread = threading.Thread(target=watch, name="training-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        pass_on()


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of the file: the writer may have been killed, or be busy, in the last one."""
    if not path.exists():
        return []
    *whole, _ = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in whole]
