"""Scorers: programs that say how good a drawing is for its prompt, by name.

A scorer is a function of the prompt and the frames, and nothing else; a higher number is better. One of the user's own is
named `module:function`. What it raises is the reason why a drawing has no score.
"""

import importlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from jobs.shapes import score_drawing
from schemas.errors import ConfigError

Scorer = Callable[[str, npt.NDArray[np.uint8]], float]
"""Prompt and frames (T, H, W, 3) uint8 RGB, one frame for an image -> a finite number, the higher the better."""

BUILT_IN: dict[str, Scorer] = {"shapes": score_drawing}


def load_scorer(name: str) -> Scorer:
    """A built-in scorer's name, or `module:function` -> the scorer. Raises: ConfigError if there is none."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    module, separator, function = name.partition(":")
    if not separator:
        raise ConfigError(f"there is no scorer {name!r}; there are {', '.join(BUILT_IN)}, and module:function")
    try:
        loaded: Scorer = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"scorer {name!r} cannot be imported: {error}") from error
    return loaded
