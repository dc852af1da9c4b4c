"""What workers write down while they train: progress, curves, speed. All count, the first one writes."""

import time
from collections.abc import Mapping, Sequence
from typing import Self

from train.loggers import Logger
from train.meter import Meter
from train.progress import ProgressLog
from train.samples import Sample, write_samples

SAMPLES_FOLDER = "samples"


class Journal:
    """The progress file and the loggers, which are closed when its block ends, and the meter between two entries. Without a
    file nothing is written.
    """

    def __init__(self, log: ProgressLog | None, loggers: Sequence[Logger], meter: Meter) -> None:
        self._log, self._loggers = log, loggers
        self._began = time.monotonic()
        self.meter = meter

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures after `step` steps, with the speed since the last entry."""
        speed = self.meter.read()
        if self._log is not None and "loss" in figures:
            self._log.write(step, figures, time.monotonic() - self._began, speed)
        for logger in self._loggers:
            logger.write(step, {**figures, **speed})
        self.meter.reset()

    def write_samples(self, step: int, samples: list[Sample]) -> None:
        """What was drawn after `step` steps, as files and for those loggers that want it."""
        if self._log is not None:
            write_samples(self._log.folder / SAMPLES_FOLDER, step, samples)
        for logger in self._loggers:
            if hasattr(logger, "write_samples"):
                logger.write_samples(step, samples)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        for logger in self._loggers:
            logger.close()
