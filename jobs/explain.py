"""Explain: one clip before the rules of a recipe, or of a set as it was made: value, bound and verdict of each, in order.

Reads the rows of that clip alone, unless a rule keeps one clip of a group: then all clips are judged, as curate does. Where
a rule has rejected the clip, those after it are still worked out: they say what another threshold would bring.
"""

import json as jsonlib
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.curate import set_recipe, set_row
from jobs.families import is_own
from jobs.set_inputs import Scored, check_columns, empty_families, how_to_fill, read_scored
from pipeline.rules import (
    KEPT,
    SPLIT,
    CurateRecipe,
    Mask,
    Rule,
    asked,
    first_rejections,
    float32,
    passes,
    rules_of,
    split_of,
    stays,
)
from schemas.catalog import Lake
from schemas.clips import CLIPS
from schemas.errors import ConfigError
from schemas.table import Table

MOST_NAMED = 5
WIDTH = 100  # of lines that no terminal shows


@dataclass(frozen=True)
class Answer:
    """One rule about one clip. `verdict`: passes, rejects, open (the score is not there yet), or not asked. `stays`: the clip
    of its group that the rule keeps in its place.
    """

    rule: str
    column: str
    value: float | None
    bound: str
    verdict: str
    rescue: tuple["Answer", ...] = ()
    stays: str | None = None


@dataclass(frozen=True)
class Explanation:
    """What rules say of a clip: kept, rejected by the first of them that rejects, open, or of a kind not asked for."""

    clip_id: str
    kind: str
    verdict: str
    rule: str | None
    answers: tuple[Answer, ...]
    remedies: tuple[str, ...]


def explain_clip(lake: Lake, recipe: CurateRecipe, clip: str, at: Mapping[str, int] | None = None) -> Explanation:
    """A recipe and a clip's id, or the beginning of one -> what each rule says. `at`: snapshots by table of what a set was made
    from, in which a clip without a row was rejected; left out, now.

    Raises: ConfigError if no clip or several begin so, or if the recipe does not say which of several scorers it means.
    """
    row = _find(lake, recipe, clip, at or {})
    rules = rules_of(recipe)
    unread = {rule.family.name for rule in asked(rules)} - set(at) if at else set(empty_families(lake, rules))
    group = None
    if any(rule.keeps_one for rule in rules):
        scored = read_scored(lake, recipe, rules, unread, at)
        pins = {item.table.name.removeprefix("score_"): item.pinned[1] for item in scored.inputs[1:]}
        recipe = recipe.model_copy(update={"scorers": recipe.scorers.pinned(pins)})
        group = _InGroups(rules, scored, row["clip_id"])
    columns: dict[str, pa.Array] = {"kind": pa.array([row["kind"]])}
    absent: dict[str, Mask] = {}
    remedies = []
    scores = asked(rules)
    for table in {rule.family.name: rule.family for rule in scores}.values():
        wanted = sorted({rule.column for rule in scores if rule.family is table})
        if table is CLIPS:
            columns[SPLIT] = split_of(pa.chunked_array([[row["clip_id"]]]))
            continue
        found = None if table.name in unread else _scores(lake, recipe, table, wanted, row["clip_id"], at or {})
        columns |= {name: pa.array([found[name] if found else None], pa.float32()) for name in wanted}
        if found is None and (at is None or table.name in unread):
            absent[table.name] = np.ones(1, np.bool_)
            remedies.append(f"{table.name} has no row for the clip. {how_to_fill(table)} to get one.")
    clips = pa.table(columns)
    answers = tuple(
        group.answer(index, _answer(rule, clips, absent)) if group and rule.keeps_one else _answer(rule, clips, absent)
        for index, rule in enumerate(rules)
    )
    verdict, by = "kept", None
    if row["kind"] not in recipe.kinds:
        verdict = f"not asked for: the recipe takes {' and '.join(recipe.kinds)}"
    else:
        by = next((answer for answer in answers if answer.verdict in ("rejects", "open")), None)
        verdict = {"rejects": "rejected", "open": "open"}[by.verdict] if by else "kept"
    return Explanation(row["clip_id"], row["kind"], verdict, by.rule if by else None, answers, tuple(remedies))


class _InGroups:
    """What rules that keep one clip of a group do with a clip, which depends on what all rules do with the others."""

    def __init__(self, rules: Sequence[Rule], scored: Scored, clip_id: str) -> None:
        self.rules, self.clips = rules, scored.clips
        self.absent = scored.absent
        self.first = first_rejections(rules, scored.clips, scored.absent)
        self.place = pc.index(scored.clips["clip_id"], clip_id).as_py()  # -1 for one of a kind that is not asked for

    def answer(self, index: int, alone: Answer) -> Answer:
        """A rule by its index, and what it says of the clip alone -> what it says of it among those left before it."""
        if self.place < 0 or alone.verdict not in ("passes", "rejects") or alone.value is None:
            return alone
        rule = self.rules[index]
        left = (self.first >= index) | (self.first == KEPT)
        left[self.place] = True  # also where another rule has rejected it
        through = stays(rule, self.clips, left, self.absent)
        if through[self.place]:
            return replace(alone, verdict="passes")
        group = self.clips[rule.group_columns[0]]
        if not group[self.place].is_valid:
            return alone
        same = pc.equal(group, group[self.place]).combine_chunks().fill_null(False).to_numpy(zero_copy_only=False)
        kept = int(np.flatnonzero(same & through)[0])
        return replace(alone, verdict="rejects", stays=self.clips["clip_id"][kept].as_py())


def explain_in_set(lake: Lake, name: str, clip: str) -> Explanation:
    """The name of a set and a clip -> what the set's rules said when it was made."""
    pins: dict[str, dict[str, Any]] = jsonlib.loads(set_row(lake, name)["pins"])
    snapshots = {table: int(pin["snapshot_id"]) for table, pin in pins.items()}
    return explain_clip(lake, set_recipe(lake, name), clip, snapshots)


def print_explanation(told: Explanation, json: bool) -> None:
    """A line for each rule, as wide as the terminal."""
    if json:
        print(jsonlib.dumps(asdict(told)))
        return
    width = shutil.get_terminal_size((WIDTH, 24)).columns
    lines = [line for answer in told.answers for line in _lines(answer)]
    sizes = [max(len(line[place]) for line in lines) for place in range(3)] if lines else []
    for line in lines:
        text = "  ".join(part.ljust(size) for part, size in zip(line[:3], sizes, strict=True)) + "  " + line[3]
        print("\n".join(textwrap.wrap(text, width, subsequent_indent="    ", drop_whitespace=False)))
    by = f" by {told.rule}" if told.verdict == "rejected" else f" at {told.rule}" if told.verdict == "open" else ""
    for sentence in (f"{told.clip_id}, {told.kind}: {told.verdict}{by}", *told.remedies):
        print("\n".join(textwrap.wrap(sentence, width, break_on_hyphens=False)))


def _lines(answer: Answer, indent: str = "") -> list[tuple[str, str, str, str]]:
    value = "null" if answer.value is None else f"{answer.value:.6g}"
    instead = f"; {answer.stays} stays" if answer.stays else ""
    lines = [(indent + answer.rule, value, answer.bound, answer.verdict + instead)]
    for rescue in answer.rescue:
        lines += _lines(rescue, "   or " if rescue is answer.rescue[0] else "  and ")
    return lines


def _find(lake: Lake, recipe: CurateRecipe, clip: str, at: Mapping[str, int]) -> dict[str, Any]:
    columns = ["clip_id", "segmentation_id", "kind"]
    found = lake.read_beginning(CLIPS, "clip_id", clip, columns, at.get(CLIPS.name))
    rows = {
        row["clip_id"]: row
        for row in found.sort_by("clip_id").to_pylist()
        if recipe.segmentation_id is None or row["segmentation_id"] == recipe.segmentation_id
    }
    if clip in rows:
        rows = {clip: rows[clip]}
    if not rows:
        raise ConfigError(f"no clip begins with {clip!r}; `outback sql 'select clip_id from clips'` lists them")
    if len(rows) > 1:
        few = ", ".join(list(rows)[:MOST_NAMED])
        more = f" and {len(rows) - MOST_NAMED} more" if len(rows) > MOST_NAMED else ""
        raise ConfigError(f"{len(rows)} clips begin with {clip!r}: {few}{more}. Give more of the id")
    (row,) = rows.values()
    return dict(row)


def _scores(
    lake: Lake, recipe: CurateRecipe, table: Table, columns: list[str], clip_id: str, at: Mapping[str, int]
) -> dict[str, Any] | None:
    family = table.name.removeprefix("score_")
    pinned = recipe.scorers.of(family)
    check_columns(lake, table, columns)
    found = lake.read_where(table, "clip_id", [clip_id], ["scorer_id", *columns], at.get(table.name))
    rows = found.to_pylist()
    mine = [row for row in rows if pinned in (None, row["scorer_id"])]
    if len(mine) > 1:
        listed = ", ".join(sorted(row["scorer_id"] for row in mine))
        option = f"scorers.families.{family}" if is_own(table) else f"scorers.{family}"
        raise ConfigError(f"{table.name} holds several: {listed}. Choose one with --set {option}=...")
    return dict(mine[0]) if mine else None


def _answer(rule: Rule, clips: pa.Table, absent: Mapping[str, Mask]) -> Answer:
    kind = clips["kind"][0].as_py()
    if kind not in rule.kinds:
        verdict = f"not asked of {kind}s"
    elif passes(rule, clips)[0]:
        verdict = "passes"
    else:
        verdict = "open" if passes(rule, clips, absent)[0] else "rejects"
    return Answer(
        rule=rule.name,
        column=f"{rule.family.name}.{rule.column}",
        value=clips[rule.column][0].as_py(),
        bound=_interval(rule),
        verdict=verdict,
        rescue=tuple(_answer(one, clips, absent) for one in rule.rescue),
    )


def _interval(rule: Rule) -> str:
    low = "" if rule.low is None else f"{float32(rule.low):.6g} <= "
    high = "" if rule.high is None else f" <= {float32(rule.high):.6g}"
    return f"{low}x{high}"
