"""Scorers of one clip at a time, run over clips that are there already: the contract, and the worker that keeps it.

A scorer is a class: the table it fills, the options it has, among them the samples it wants, and a function from the
samples of one clip to the columns of its row. It reads its frames by seeking in the original file, so it can be added
when everything was scanned long ago.
"""

import ast
import importlib
import importlib.util
import math
import numbers
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from pydantic import Field

from pipeline.failures import FailureBound
from pipeline.read_frames import moments, read_frames
from pipeline.samples import Sample, SampleSpec, shrunk_size
from pipeline.sandbox import Sandbox
from pipeline.stage import Rows
from schemas.errors import ConfigError, RowError
from schemas.recipe import Config, short_hash
from schemas.scores import OWN_COMMON, PREFIX, SECONDS
from schemas.table import Table

Item = Mapping[str, Any]
Columns = Mapping[str, float | None]
FLOAT32_MAX = float(np.finfo(np.float32).max)


class FrameCount(Config):
    """So many frames of a clip, from its first to its last; one alone lies in the middle. An image has its one."""

    num_frames: int = Field(ge=1)
    short_edge_px: int | None = Field(default=256, ge=8)
    """None: as large as they are."""


class ScoreExecution(Config):
    """How scoring runs. Nothing here changes a score."""

    timeout_s: float = Field(default=120.0, gt=0)  # of one clip
    memory_mb: int = Field(default=4096, gt=0)
    max_pixels: int = Field(default=120_000_000, gt=0)
    num_cpus: int = Field(default=1, ge=1)  # of one worker
    num_gpus: int = Field(default=0, ge=0)


class ScorerConfig(Config):
    """Options of a scorer, each with a default. A scorer with options of its own derives from it."""

    samples: SampleSpec | FrameCount = SampleSpec()
    execution: ScoreExecution = ScoreExecution()
    failures: FailureBound = FailureBound()

    def identity(self) -> dict[str, Any]:
        """What a score depends on. Files count by their content, so a config that names some says it here.

        Raises: ConfigError if such a file is not there.
        """
        return self.model_dump(mode="json", exclude={"execution", "failures"})


C = TypeVar("C", bound=ScorerConfig)


class ClipScorer(ABC, Generic[C]):
    """One family. Made once for many clips, from its options alone."""

    table: ClassVar[Table]
    """Where its rows go; `schemas.scores.own_family` makes one."""
    config_type: ClassVar[type[ScorerConfig]]
    version: ClassVar[int] = 1
    """Raised when the same options give other scores."""
    in_worker: ClassVar[bool] = False
    """For a scorer that holds a model, which a hostile file must not take along: frames are still read in a child process,
    but scored outside of it, where no limits hold."""
    keeps: ClassVar[tuple[Table, ...]] = ()
    """Tables that it fills besides, from `score_and_keep`."""

    def __init__(self, config: C) -> None:
        self.config = config

    @abstractmethod
    def score(self, samples: Sequence[Sample]) -> Columns:
        """The samples of one clip, at least one, in order -> a finite number or None for every score of the table."""
        ...

    def score_and_keep(self, clip_id: str, samples: Sequence[Sample]) -> tuple[Columns, Rows]:
        """As `score`, with the rows of `keeps`."""
        return self.score(samples), {}


def load_scorer(name: str) -> type[ClipScorer[Any]]:
    """`module:name` -> the scorer. Raises: ConfigError if there is none, with what its import raised."""
    module, separator, attribute = name.partition(":")
    if not separator or not module or not attribute:
        raise ConfigError(f"scorer {name!r} is not of the form module:name, such as blue_filter:BlueScorer")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ConfigError as error:
        raise ConfigError(f"scorer {name}: {error}") from error
    except Exception as error:  # whatever a user's file raises
        raise ConfigError(f"scorer {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not isinstance(found, type) or not issubclass(found, ClipScorer):
        raise ConfigError(f"{name} is {found!r}, expected a class that derives from pipeline.clip_scorer.ClipScorer")
    missing = [part for part in ("table", "config_type") if not hasattr(found, part)]
    if missing or getattr(found, "__abstractmethods__", None):
        raise ConfigError(f"scorer {name} lacks {', '.join([*missing, *found.__abstractmethods__])}")
    return found


def scorer_id(scorer: type[ClipScorer[Any]], config: ScorerConfig, *, by_code: bool) -> str:
    """Hash of family, version and options. `by_code`: also of the scorer's own file, comments and layout left out, so that
    a user who changes it need not think of its version. What that file imports is not seen.
    """
    says: dict[str, Any] = {"family": scorer.table.name.removeprefix(PREFIX), "version": scorer.version}
    if by_code:
        spec = importlib.util.find_spec(scorer.__module__)
        if spec is not None and spec.origin is not None and Path(spec.origin).suffix == ".py":
            says["code"] = short_hash(ast.dump(ast.parse(Path(spec.origin).read_bytes())))
    return short_hash({**says, **config.identity()})


class ScoreWorker:
    """Scores clips by a scorer that it knows by name, so that the file it stands in can be looked for in `folder` too."""

    def __init__(self, name: str, config: str, scorer_id: str, folder: str) -> None:
        add_to_path(folder)
        self.name, self.config_json, self.scorer_id = name, config, scorer_id
        scorer = load_scorer(name)
        self.config = scorer.config_type.model_validate_json(config)
        self.table = scorer.table
        self.scorer = scorer(self.config) if scorer.in_worker else None
        self.sandbox = Sandbox(self.config.execution.timeout_s, self.config.execution.memory_mb)

    def process(self, item: Item) -> Rows:
        """One clip (clip_id, uri, kind, start_ms, end_ms) -> its row, and those of the tables that the scorer keeps."""
        started = time.perf_counter()
        if self.scorer is None:
            columns, num_samples, kept = self.sandbox.run(_score, self.name, self.config_json, item)
        else:
            samples = self.sandbox.run(clip_samples, item, self.config)
            found, kept = self.scorer.score_and_keep(item["clip_id"], samples)
            columns, num_samples = checked_columns(self.table, found), len(samples)
        row = {"clip_id": item["clip_id"], "scorer_id": self.scorer_id, **columns, "num_samples": num_samples}
        if SECONDS.name in self.table.names:
            row[SECONDS.name] = time.perf_counter() - started
        return {**kept, self.table.name: [row]}


def add_to_path(folder: str) -> None:
    """Makes modules in a folder importable, after those that are installed."""
    if folder not in sys.path:
        sys.path.append(folder)


def clip_samples(item: Item, config: ScorerConfig) -> list[Sample]:
    """A clip (uri, kind, start_ms, end_ms) -> the samples that a scorer wants of it.

    Raises: RowError as the decoders say.
    """
    wanted = config.samples
    fps, num_frames = (wanted.fps, None) if isinstance(wanted, SampleSpec) else (None, wanted.num_frames)
    short_edge_px = wanted.short_edge_px

    def size(height_px: int, width_px: int) -> tuple[int, int]:
        if short_edge_px is None:
            return height_px, width_px
        width, height = shrunk_size(width_px, height_px, short_edge_px)
        return height, width

    frames = read_frames(
        Path(item["uri"]),
        item["start_ms"],
        item["end_ms"],
        fps=fps,
        num_frames=num_frames,
        size=size,
        max_pixels=config.execution.max_pixels,
    )
    seconds = [0.0]
    if item["kind"] != "image":
        seconds = moments(item["start_ms"] / 1000, item["end_ms"] / 1000, fps, num_frames)
    pairs = zip(frames, seconds, strict=False)  # at the end of a damaged file there may be fewer frames
    return [Sample(np.ascontiguousarray(frame[..., ::-1]), moment) for frame, moment in pairs]


def checked_columns(table: Table, columns: object) -> dict[str, float | None]:
    """What a scorer gave -> the same as plain numbers. Raises: RowError WrongScores if it is not what its table holds."""
    expected = [name for name in table.names if name not in OWN_COMMON]
    if not isinstance(columns, Mapping) or sorted(map(str, columns)) != sorted(expected):
        found = list(columns) if isinstance(columns, Mapping) else columns
        raise RowError("WrongScores", f"{table.name}: found {str(found)[:200]}, expected the columns {expected}")
    plain: dict[str, float | None] = {}
    for name, value in columns.items():
        if value is not None:
            if not isinstance(value, numbers.Real | np.bool_):
                kind = type(value).__name__
                raise RowError("WrongScores", f"{table.name}.{name} is of type {kind}, expected a number or None")
            value = float(value)
            if not math.isfinite(value) or abs(value) > FLOAT32_MAX:
                raise RowError("WrongScores", f"{table.name}.{name} is {value}, expected a finite float32 or None")
        plain[name] = value
    return plain


@lru_cache(maxsize=1)
def _loaded(name: str, config: str) -> ClipScorer[Any]:
    scorer = load_scorer(name)
    return scorer(scorer.config_type.model_validate_json(config))


def _score(name: str, config: str, item: Item) -> tuple[dict[str, float | None], int, Rows]:
    """In the child process: reads and scores one clip."""
    scorer = _loaded(name, config)
    samples = clip_samples(item, scorer.config)
    columns, kept = scorer.score_and_keep(item["clip_id"], samples)
    return checked_columns(scorer.table, columns), len(samples), kept
