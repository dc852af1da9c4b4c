"""Judges of generations: people's votes, or a scorer that is shown what was drawn. Each gives a number for every generation
that it can judge, higher is better, and a reason for every other one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.pack import text_tokenizer_from_json
from jobs.preference_sets import generations_of, tokens_of
from jobs.progress import Advance
from jobs.scorers import Scorer
from model.pictures import decode_codes
from model.vision_tokenizer.tokenizer import VisionTokenizer
from model.weights import load_vision_tokenizer
from pipeline.read_votes import Vote, read_votes
from schemas.catalog import Lake
from schemas.document import VisionDocument, parse_document
from schemas.errors import RowError
from schemas.vision_tokens import TOKENIZERS
from schemas.vocabulary import Vocabulary

Row = dict[str, Any]
Refused = list[tuple[str, RowError]]
"""What could not be judged, by generation_id or place in a file, and why."""

Judge = Callable[[Sequence[Row], Advance], tuple[dict[str, float], Refused]]
"""Rows of generations, with what their ids mean -> a score for each that has one, and the others."""


def count_votes(paths: Sequence[Path], known: set[str], reasons: Mapping[str, RowError]) -> tuple[list[Vote], Refused]:
    """Files -> votes on known generations, in order, one of each voter for each generation and criterion; and the others.
    `reasons` say why a generation that is there cannot be judged.
    """
    found: dict[tuple[str, str, str], Vote] = {}
    refused: Refused = []
    for path in paths:
        for row in read_votes(path):
            try:
                if isinstance(vote := row.vote, RowError):
                    raise vote
                if vote.generation_id not in known:
                    said = f"there is no generation {vote.generation_id!r}, or not by the checkpoints asked for"
                    raise reasons.get(vote.generation_id) or RowError("UnknownGeneration", said, terminal=False)
                key = (vote.generation_id, vote.voter, vote.criterion)
                if found.setdefault(key, vote) != vote:
                    said = f"{vote.voter!r} gave {found[key].score:g} before, and now {vote.score:g}"
                    raise RowError("SecondVote", said)
            except RowError as error:
                refused.append((f"{path.absolute()}#row={row.index}", error))
    return sorted(found.values()), refused


def by_votes(votes: Sequence[Vote], min_voters: int) -> Judge:
    """Mean scores of those generations that enough voters have seen."""
    cast: dict[str, list[Vote]] = {}
    for vote in votes:
        cast.setdefault(vote.generation_id, []).append(vote)

    def judge(rows: Sequence[Row], advance: Advance) -> tuple[dict[str, float], Refused]:
        scores: dict[str, float] = {}
        refused: Refused = []
        for generation_id in (row["generation_id"] for row in rows):
            mine = cast[generation_id]
            voters = {vote.voter for vote in mine}
            if len(voters) < min_voters:
                said = f"found {len(voters)} voters, expected {min_voters} at least (min_voters)"
                refused.append((generation_id, RowError("TooFewVoters", said, terminal=False)))
            else:
                scores[generation_id] = math.fsum(vote.score for vote in mine) / len(mine)
        return scores, refused

    return judge


def by_scorer(lake: Lake, scorer: Scorer) -> Judge:
    """What the scorer says of each drawing, decoded from its tokens."""

    def judge(rows: Sequence[Row], advance: Advance) -> tuple[dict[str, float], Refused]:
        scores: dict[str, float] = {}
        refused: Refused = []
        drawings = _Drawings(lake)
        languages = {row["generation_id"]: row for row in rows}
        for done, made in enumerate(generations_of(lake, languages.keys()), 1):
            generation_id = made["generation_id"]
            try:
                scores[generation_id] = _score(scorer, made, drawings.frames({**languages[generation_id], **made}))
            except RowError as error:
                refused.append((generation_id, error))
            advance(done, len(rows), "drawings scored")
        return scores, sorted(refused, key=lambda one: one[0])

    return judge


def _score(scorer: Scorer, made: Row, frames: Any) -> float:
    try:
        score = float(scorer(made["prompt"], frames))
    except RowError:
        raise
    except Exception as error:  # of one drawing, whatever it is, and no reason to lose the others
        raise RowError("NoScore", f"{type(error).__name__}: {error}") from error
    if not math.isfinite(score):
        raise RowError("NoScore", f"found the score {score}, expected a finite number")
    return score


class _Drawings:
    """Decodes generations; a tokenizer is loaded when the first drawing needs it."""

    def __init__(self, lake: Lake) -> None:
        self._vision = lru_cache(maxsize=1)(lambda tokenizer_id: _load(lake, tokenizer_id))
        self._text = lru_cache(maxsize=1)(text_tokenizer_from_json)

    def frames(self, made: dict[str, Any]) -> npt.NDArray[np.uint8]:
        """A row of `generations` with the `vocabulary` and `text_tokenizer` of its ids -> frames (T, H, W, 3) uint8 RGB.

        Raises: RowError if its tokens are no drawing.
        """
        vocabulary = Vocabulary.from_json(made["vocabulary"])
        document = parse_document(tokens_of(made), vocabulary, self._text(made["text_tokenizer"]))
        if not isinstance(document, VisionDocument):
            raise RowError("NoDrawing", f"generation {made['generation_id']} is no image and no clip")
        return decode_codes(self._vision(made["tokenizer_id"]), document.block.codes, made["kind"])


def _load(lake: Lake, tokenizer_id: str) -> VisionTokenizer:
    rows = lake.read_where(TOKENIZERS, "tokenizer_id", [tokenizer_id], ["uri"]).to_pylist()
    if not rows:
        raise RowError("UnknownTokenizer", f"there is no vision tokenizer {tokenizer_id}", terminal=False)
    return load_vision_tokenizer(Path(rows[0]["uri"]))
