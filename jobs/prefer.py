"""Prefer: of the generations for one prompt, the one that voters or a scorer like best and the one that they like least.

Only drawings that differ in nothing but chance are compared: the same prompt, kind, grid, frame rate and given frames, codes
of the same vision tokenizer, text of the same text tokenizer. Their checkpoints may differ. The set of pairs that comes of it
gets a name, once.

Paper: Emu3 report, section 2.5.1: 8 to 10 drawings for each prompt, scored by three voters; the highest is chosen, the lowest
rejected.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from pydantic import Field

from jobs.checkpoints import LANGUAGE_OBJECTIVES, checkpoint_row, language_data
from jobs.curate import check_name
from jobs.judges import Judge, Refused, Row, by_scorer, by_votes, count_votes
from jobs.preference_sets import Pair, check_pair, generations_of, pairs_sha256
from jobs.progress import progress
from jobs.run import Run, recorded
from jobs.scorers import load_scorer
from pipeline.stage import attempt_row
from schemas.catalog import Lake
from schemas.checkpoints import CHECKPOINTS
from schemas.errors import ConfigError, RowError
from schemas.generations import GENERATIONS, PREFERENCE_PAIRS, PREFERENCE_SETS
from schemas.recipe import Config, later_option, short_hash
from schemas.runs import ATTEMPTS

ALIKE = ("prompt", "kind", "t", "h", "w", "fps", "continued_clip_id", "context_t")
LANGUAGE = ("tokenizer_id", "vocabulary", "text_tokenizer")  # what token ids mean


class PreferRecipe(Config):
    """Which judgements make a pair."""

    min_voters: int = Field(default=1, ge=1)
    """Voters that a generation needs; three in the paper. A scorer is asked once."""
    min_margin: float = Field(default=0.0, ge=0)
    """By more than this the better one's mean score is above the other's. 0: ties make no pair."""
    pairs_per_prompt: int = later_option(1, ge=1)
    """At most so many pairs of the drawings of one prompt: the best with the worst, the second best with the second worst, and
    so on while they differ enough. One in the paper."""
    context_len: int = Field(default=131_072, ge=16)
    """Longest document of a pair, in tokens; pairs are never cut."""


@dataclass(frozen=True)
class PreferReport:
    """A named set of pairs; what was judged for it; generations that are the only one of their kind, and what was refused,
    with its reason in `attempts`.
    """

    name: str
    pairset_id: str
    judge: str
    num_pairs: int
    num_generations: int
    num_alone: int
    num_refused: int
    already_there: bool


def prefer(
    lake: Lake,
    name: str,
    recipe: PreferRecipe,
    *,
    votes: Sequence[Path] = (),
    scorer: str | None = None,
    checkpoints: Sequence[str] = (),
    generations: Collection[str] = (),
) -> PreferReport:
    """Judge generations, by files of votes or by a scorer, and name the pairs; the same judgements and recipe do nothing.

    `checkpoints` are ids, or beginnings, of those whose generations are looked at; without any, all are. `generations` are
    the ids of those that are looked at, of these; without any, all are.

    Raises: ConfigError if the name is taken by other pairs, a file or a scorer cannot be read, or nothing makes a pair.
    """
    check_name("preference set", name)
    if bool(votes) == (scorer is not None):
        raise ConfigError("found votes and a scorer, or neither: give --votes or --scorer")
    made, refused = _generations(lake, checkpoints, generations)
    if scorer is None:
        counted, refused = count_votes(votes, {row["generation_id"] for row in made}, dict(refused))
        voted = {vote.generation_id for vote in counted}
        made = [row for row in made if row["generation_id"] in voted]
        who, judge = f"votes-{short_hash([astuple(vote) for vote in counted])}", by_votes(counted, recipe.min_voters)
    else:
        who, judge = scorer, by_scorer(lake, load_scorer(scorer))
    groups = _groups(made)
    judged = sorted(row["generation_id"] for group in groups for row in group)
    pairset_id = short_hash([who, recipe.canonical_json(), judged])
    row = _taken(lake, name, pairset_id)
    already_there = row is not None
    if row is None:
        places = [str(path.absolute()) for path in votes]
        inputs = {"name": name, "judge": who, "generations": len(judged), "votes": places}
        with recorded(lake, "prefer", recipe, inputs) as run:
            row = _make(
                lake, {"name": name, "pairset_id": pairset_id, "judge": who}, recipe, groups, judge, refused, run
            )
    counts = row["num_pairs"], len(judged), len(made) - len(judged), _num_refused(lake, pairset_id, refused)
    return PreferReport(name, pairset_id, who, *counts, already_there)


def _make(
    lake: Lake,
    names: Mapping[str, str],
    recipe: PreferRecipe,
    groups: Sequence[Sequence[Row]],
    judge: Judge,
    refused: Refused,
    run: Run,
) -> Row:
    """Judge, and write what was refused, the pairs and last the set's row, which is returned. `names` begin that row."""
    with progress("prefer") as advance:
        scores, unscored = judge([row for group in groups for row in group], advance)
    pairs, unpaired = _pairs(lake, groups, scores, recipe, names["judge"])
    _record(lake, names["pairset_id"], [*refused, *unscored, *unpaired], run.run_id)
    _check_pairs(pairs)
    row = {**names, "recipe": recipe.canonical_json(), **_set_facts(pairs)}
    lake.append(PREFERENCE_PAIRS, [_pair_row(pair, scores, names["judge"]) for pair in pairs], run.run_id)
    lake.append(PREFERENCE_SETS, [row], run.run_id)
    _taken(lake, names["name"], names["pairset_id"])  # by another run, meanwhile
    run.outcome |= {"pairset_id": names["pairset_id"], "pairs": len(pairs)}
    return row


def _num_refused(lake: Lake, pairset_id: str, refused: Refused) -> int:
    """What was refused when the set was made, and what is now."""
    rows = lake.read_where(ATTEMPTS, "stage_id", [pairset_id], ["stage", "item_id"]).to_pylist()
    return len({row["item_id"] for row in rows if row["stage"] == "prefer"} | {item for item, _ in refused})


def _record(lake: Lake, pairset_id: str, refused: Refused, run_id: str) -> None:
    uris = {item: item if "#row=" in item else None for item, _ in refused}
    rows = [attempt_row("prefer", pairset_id, item, error, uri=uris[item]) for item, error in refused]
    lake.append(ATTEMPTS, rows, run_id)


def _check_pairs(pairs: Sequence[Pair]) -> None:
    """Raises: ConfigError if there are none, or no model can read all of them."""
    if not pairs:
        raise ConfigError(
            "no pair: two generations of one prompt and size are needed that are not judged alike; what was refused, and why, "
            "is in `outback show attempts`"
        )
    languages = {tuple(pair.chosen[name] for name in LANGUAGE) for pair in pairs}
    if len(languages) > 1:
        drawn_by = ", ".join(sorted({pair.chosen["checkpoint_id"] for pair in pairs}))
        raise ConfigError(
            f"found drawings in the ids of {len(languages)} tokenizers, expected one, as one model reads them all: name "
            f"checkpoints with --checkpoint; there are {drawn_by}"
        )


def _taken(lake: Lake, name: str, pairset_id: str) -> Row | None:
    """The set's row if it is there. Raises: ConfigError if the name is another set's."""
    rows = lake.read_where(PREFERENCE_SETS, "name", [name]).to_pylist()
    if rows and rows[0]["pairset_id"] != pairset_id:
        raise ConfigError(
            f"preference set {name!r} exists with other content ({rows[0]['pairset_id']}); choose another name"
        )
    return dict(rows[0]) if rows else None


# --- what is there ---


def _generations(lake: Lake, checkpoints: Sequence[str], wanted: Collection[str]) -> tuple[list[Row], Refused]:
    """Generations without their tokens, each with the ids it is written in (`vocabulary`, `text_tokenizer`), by id.

    Raises: ConfigError if a wanted one is not there.
    """
    columns = ["generation_id", "checkpoint_id", "tokenizer_id", *ALIKE]
    if checkpoints:
        ids = [str(checkpoint_row(lake, one, *LANGUAGE_OBJECTIVES)["checkpoint_id"]) for one in checkpoints]
        rows = lake.read_where(GENERATIONS, "checkpoint_id", ids, columns).to_pylist()
    else:
        rows = lake.read(GENERATIONS, columns).to_pylist()
    if wanted:
        rows = [row for row in rows if row["generation_id"] in wanted]
        if missing := set(wanted) - {row["generation_id"] for row in rows}:
            raise ConfigError(f"found no generation {min(missing)!r} of these checkpoints; {len(missing)} are missing")
    languages = _languages(lake, sorted({row["checkpoint_id"] for row in rows}))
    found, refused = [], []
    for row in sorted(rows, key=lambda row: str(row["generation_id"])):
        language = languages.get(row["checkpoint_id"])
        if language is None:
            said = f"checkpoint {row['checkpoint_id']}, or what it read, is not here: its token ids have no meaning"
            refused.append((row["generation_id"], RowError("UnknownCheckpoint", said, terminal=False)))
        else:
            found.append({**row, **{name: language[name] for name in ("vocabulary", "text_tokenizer")}})
    return found, refused


def _languages(lake: Lake, checkpoint_ids: Sequence[str]) -> dict[str, Row | None]:
    rows = lake.read_where(CHECKPOINTS, "checkpoint_id", checkpoint_ids, ["checkpoint_id", "data_id"]).to_pylist()
    return {row["checkpoint_id"]: language_data(lake, row["data_id"]) for row in rows}


def _groups(made: Sequence[Row]) -> list[list[Row]]:
    """Generations that may be compared with each other, two or more together."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in made:
        groups.setdefault(tuple(row[name] for name in (*ALIKE, *LANGUAGE)), []).append(row)
    return [group for group in groups.values() if len(group) > 1]


# --- pairs ---


def _pairs(
    lake: Lake, groups: Sequence[Sequence[Row]], scores: Mapping[str, float], recipe: PreferRecipe, who: str
) -> tuple[list[Pair], Refused]:
    """Pairs of the best and the worst of each group, by pair id; and groups that make none, by their first generation."""
    chosen, refused = [], []
    for group in groups:
        ids = sorted(row["generation_id"] for row in group if row["generation_id"] in scores)
        if len(ids) < 2:
            continue  # the others were refused, one by one
        from_best, from_worst = sorted(ids, key=lambda one: -scores[one]), sorted(ids, key=lambda one: scores[one])
        ranked = list(zip(from_best, from_worst, strict=True))[: recipe.pairs_per_prompt]
        apart = list(takewhile(lambda two: scores[two[0]] - scores[two[1]] > recipe.min_margin, ranked))
        chosen += [(group[0], best, worst) for best, worst in apart]
        if not apart:
            best, worst = ranked[0]
            said = (
                f"{len(ids)} drawings of {group[0]['prompt']!r} have scores from {scores[worst]:g} to {scores[best]:g}"
            )
            refused.append((ids[0], RowError("Tie", f"{said}, expected more than {recipe.min_margin:g} between them")))
    tokens = {row["generation_id"]: row for row in generations_of(lake, {one for _, *two in chosen for one in two})}
    found = []
    for facts, best, worst in chosen:
        pair = Pair(short_hash([best, worst, who]), *({**facts, **tokens[one]} for one in (best, worst)))
        try:
            check_pair(pair, recipe.context_len)
        except RowError as error:
            refused.append((best, error))
        else:
            found.append(pair)
    return sorted(found, key=lambda pair: pair.pair_id), refused


def _pair_row(pair: Pair, scores: Mapping[str, float], who: str) -> Row:
    chosen, rejected = pair.chosen["generation_id"], pair.rejected["generation_id"]
    row = {"pair_id": pair.pair_id, "chosen_id": chosen, "rejected_id": rejected, "judge": who}
    return {**row, "chosen_score": scores[chosen], "rejected_score": scores[rejected]}


def _set_facts(pairs: Sequence[Pair]) -> Row:
    """What a set's row says of its pairs."""
    return {
        **{column: pairs[0].chosen[column] for column in LANGUAGE},
        "pair_ids": [pair.pair_id for pair in pairs],
        "num_pairs": len(pairs),
        "num_tokens": sum(len(tokens) for pair in pairs for tokens in pair.documents),
        "content_sha256": pairs_sha256(pairs),
    }
