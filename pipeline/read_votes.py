"""Votes on generations: a CSV, JSONL or Parquet file with a row for each opinion.

    generation_id,voter,score
    3f1c0a9be2d47756,ann,4
    3f1c0a9be2d47756,bob,5

`generation_id` is whole, `score` any finite number, higher is better. A column `criterion` is optional: a voter has one score
for each criterion (appeal, alignment), and all of them count alike. Other columns are left alone. A broken row is an item of
its own, not the end of them.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.read_rows import ROW_SUFFIXES, columns_of, read_rows
from schemas.errors import ConfigError, RowError

REQUIRED = ("generation_id", "voter", "score")
COLUMNS = (*REQUIRED, "criterion")


@dataclass(frozen=True, order=True)
class Vote:
    """What one voter thinks of one generation, by one criterion."""

    generation_id: str
    voter: str
    criterion: str
    score: float


@dataclass(frozen=True)
class VoteRow:
    """Row `index` of a file, from 0: a vote, or why it is none."""

    index: int
    vote: Vote | RowError


def read_votes(path: Path) -> Iterator[VoteRow]:
    """A .csv, .jsonl or .parquet file -> its votes in order.

    Raises: ConfigError if the file as a whole cannot be read, or has not the columns.
    """
    try:
        if path.suffix.lower() not in ROW_SUFFIXES:
            raise ValueError(f"found {path.suffix!r}, expected {', '.join(ROW_SUFFIXES)}")
        found = columns_of(path)
        if missing := [name for name in REQUIRED if name not in found]:
            raise ValueError(f"found the columns {', '.join(found)}, expected also {', '.join(missing)}")
        for row in read_rows(path, COLUMNS):
            try:
                yield VoteRow(row.index, row.error or _vote(row.values))
            except RowError as error:
                yield VoteRow(row.index, error)
    except (OSError, RowError, ValueError) as error:
        raise ConfigError(f"the votes {path} cannot be read: {error}") from error


def _vote(values: Mapping[str, Any]) -> Vote:
    if missing := [name for name in REQUIRED if str(values.get(name, "")).strip() == ""]:
        raise RowError(
            "BrokenVote", f"found no {', '.join(missing)}, expected a value for each of {', '.join(REQUIRED)}"
        )
    try:
        score = float(values["score"])
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise RowError("BrokenVote", f"found the score {values['score']!r}, expected a finite number")
    generation_id, voter, criterion = (
        str(values.get(name, "")).strip() for name in ("generation_id", "voter", "criterion")
    )
    return Vote(generation_id, voter, criterion, score)
