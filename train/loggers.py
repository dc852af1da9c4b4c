"""Where figures of a training go besides its own progress file: TensorBoard, or whatever a hook makes of them."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from schemas.errors import ConfigError
from train.samples import Sample

TENSORBOARD = "tensorboard"


class Logger(Protocol):
    """What a hook returns. Only the first worker has one. One with a method `write_samples(step, samples)` is also given what
    is drawn meanwhile (train.samples).
    """

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures after `step` steps."""
        ...

    def close(self) -> None:
        """Nothing more will come."""
        ...


class TensorBoardLogger:
    """Event files in the folder `tensorboard` of the training. Steps beyond the one resumed from are taken back."""

    def __init__(self, folder: Path, resumed_from_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / TENSORBOARD), purge_step=resumed_from_step + 1)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """One point of each curve."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """One picture of each prompt, or one for each frame of its clip."""
        for sample in samples:
            self._writer.add_images(f"samples/{sample.prompt}", sample.frames, step, dataformats="NHWC")

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


def open_loggers(names: Sequence[str], folder: Path, resumed_from_step: int) -> list[Logger]:
    """Names -> loggers: `tensorboard`, or `module:function`, called with the training's folder and the step resumed from.

    Raises: ConfigError if there is no such function.
    """
    return [_open(name, folder, resumed_from_step) for name in names]


def _open(name: str, folder: Path, resumed_from_step: int) -> Logger:
    if name == TENSORBOARD:
        return TensorBoardLogger(folder, resumed_from_step)
    module, separator, function = name.partition(":")
    try:
        if not separator:
            raise ImportError("it has no colon")
        made: Logger = getattr(importlib.import_module(module), function)(folder, resumed_from_step)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"found the logger {name!r}, expected 'tensorboard' or 'module:function' that can be imported: {error}"
        ) from error
    return made
