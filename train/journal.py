"""What the first worker writes down while it trains: progress, curves, speed."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence

from train.loggers import Logger
from train.meter import Meter
from train.progress import ProgressLog


class Journal:
    """The progress file and the loggers, and the meter between two entries."""

    def __init__(self, log: ProgressLog, loggers: Sequence[Logger], meter: Meter) -> None:
        self._log, self._loggers = log, loggers
        self._began = time.monotonic()
        self.meter = meter

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures after `step` steps, with the speed since the last entry."""
        speed = self.meter.read()
        if "loss" in figures:
            self._log.write(step, figures, time.monotonic() - self._began, speed)
        for logger in self._loggers:
            logger.write(step, {**figures, **speed})
        self.meter.reset()

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Close the loggers when the block ends, however it does."""
        try:
            yield
        finally:
            for logger in self._loggers:
                logger.close()
