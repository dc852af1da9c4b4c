"""Rules: which clips a recipe keeps. Scores are measured once and stored; here, and only here, they become a choice.

A rule is a closed interval over one score. Its bounds are rounded to float32 first, the precision in which scores are
stored, so that a bound equal to a stored value includes it; a null passes no rule that applies to the clip's kind.
`split` is no score: it comes from a clip's id, and keeps some media apart from all others.
A rule may have a rescue: a clip outside its interval passes all the same if it is inside each of the rescue's.
A rule over likeness to other clips keeps one clip of each group, the best of those that all other rules keep; such rules
are asked last, but for `split`.
There is one evaluator, over columns, because engines disagree about exactly these cases.
"""

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Annotated, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, model_validator

from pipeline.keep_best import best_of
from schemas.captions import CAPTION_SCORES
from schemas.clips import CLIPS
from schemas.errors import ConfigError
from schemas.recipe import Config, later_option
from schemas.scores import (
    AESTHETIC,
    COMPARING,
    CONTINUITY,
    DUPLICATE,
    MOTION,
    PREFIX,
    RESOLUTION,
    SEMANTIC,
    TECHNICAL,
    TEXT,
    own_family,
)
from schemas.table import Table

Kind = Literal["image", "video"]
Mask = NDArray[np.bool_]
Places = NDArray[np.int16]
NUM_EXAMPLES = 5
KEPT = -1  # among indices of rules: no rule rejects the clip


def _each_once(kinds: tuple[Kind, ...]) -> tuple[Kind, ...]:
    """In one order, so that equal choices have equal ids."""
    if len(set(kinds)) != len(kinds):
        raise ValueError(f"kinds {list(kinds)} names one twice")
    return tuple(sorted(kinds))


Kinds = Annotated[tuple[Kind, ...], Field(min_length=1), AfterValidator(_each_once)]


class Interval(Config):
    """The closed interval a score must lie in."""

    low: float | None = None
    high: float | None = None

    @model_validator(mode="after")
    def _is_a_question(self) -> Self:
        if self.low is None and self.high is None:
            raise ValueError("a rule needs low, high or both")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}: nothing could pass")
        return self


def _names_scores(intervals: dict[str, Interval] | None) -> dict[str, Interval] | None:
    if intervals is not None:
        if not intervals:
            raise ValueError("a rescue needs an interval of at least one score")
        for name in intervals:
            if name not in SCORES:
                near = difflib.get_close_matches(name, SCORES, n=1, cutoff=0.4)
                raise ValueError(
                    f"no score {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(SCORES)}")
                )
            if name in KEEPS_ONE:
                raise ValueError(f"{name} keeps one clip of a group, which rescues nothing: name another score")
    return intervals


class Bounds(Interval):
    """A rule: the interval, the kinds of clip that are asked, and by what else a clip outside the interval may pass."""

    kinds: Kinds = ("image", "video")
    rescue: Annotated[dict[str, Interval] | None, AfterValidator(_names_scores)] = later_option(None)
    """Intervals by the name of a score, such as `text = { high = 0.1 }`: a clip inside all of them passes the rule."""


class Likeness(Config):
    """A rule that keeps one clip of a group: clips that are more alike than `high` are of one, and the best of those that
    all other rules keep stays.
    """

    high: float
    kinds: Kinds = ("image", "video")


class VideoBounds(Bounds):
    """Bounds of a score that images do not have."""

    kinds: Kinds = ("video",)


class ScorerPins(Config):
    """Which scorer's rows to read, per family, where a lake holds those of several. Unset: the only one there is; of those
    that compare clips with each other, the one that compared most.
    """

    resolution: str | None = None
    motion: str | None = None
    text: str | None = None
    technical: str | None = None
    aesthetic: str | None = later_option(None)
    duplicate: str | None = later_option(None)
    semantic: str | None = later_option(None)
    continuity: str | None = later_option(None)
    caption: str | None = later_option(None)
    families: dict[str, str] = later_option({})
    """The same for families that users added."""

    def of(self, family: str) -> str | None:
        """The scorer of a family."""
        pin: str | None = getattr(self, family) if family in _PINNED else self.families.get(family)
        return pin

    def pinned(self, pins: Mapping[str, str]) -> "ScorerPins":
        """These, with scorers by family in the place of what was said of them."""
        own = {family: pin for family, pin in pins.items() if family not in _PINNED}
        known = {family: pin for family, pin in pins.items() if family in _PINNED}
        return self.model_copy(update={**known, "families": {**self.families, **own}})


_PINNED = frozenset(ScorerPins.model_fields) - {"families"}


class CurateRecipe(Config):
    """A curated set as data: which kinds, which scorers, and one optional section for each rule, in funnel order."""

    kinds: Kinds = ("image", "video")
    coverage: float = Field(default=1.0, ge=0.0, le=1.0)
    """Share of the clips that reach a rule, undecided by those before it, that must have a row in its family."""
    segmentation_id: str | None = None
    scorers: ScorerPins = ScorerPins()

    split: Bounds | None = later_option(None)
    """A place in [0, 1) that a medium has by its content, the same in every set and lake: `low = 0.02` to learn from, and
    `high = 0.02` to hold out a fiftieth. All clips of a medium stand on one side."""
    resolution: Bounds | None = None
    aspect: Bounds | None = None
    duration: VideoBounds | None = None
    motion: VideoBounds | None = None
    motion_max: VideoBounds | None = None
    text: Bounds | None = None
    text_mean: Bounds | None = None
    sharpness: Bounds | None = None
    exposure: Bounds | None = None
    contrast: Bounds | None = None
    clipping: Bounds | None = None
    colour: Bounds | None = None
    colourfulness: Bounds | None = None
    letterbox: Bounds | None = None
    continuity: VideoBounds | None = later_option(None)
    aesthetic: Bounds | None = later_option(None)
    caption_words: Bounds | None = later_option(None)
    caption_repetition: Bounds | None = later_option(None)
    caption_problems: Bounds | None = later_option(None)
    caption_similarity: Bounds | None = later_option(None)
    exact: Likeness | None = later_option(None)
    duplicate: Likeness | None = later_option(None)
    semantic: Likeness | None = later_option(None)

    families: dict[str, dict[str, Bounds]] = later_option({})
    """Bounds by family and column, as in `[families.blue.blue_ratio]`: of families that users added, or of columns that
    have no section of their own. Asked in order of their names, after the sections but for those that keep one of a group."""


SPLIT = "split"
SPLIT_DIGITS = 6  # hex digits of an id: as fine as a float32 below 1 can be

# The score each section asks about, cheap ones first: a dear scorer need not look at what these have rejected.
SCORES: Mapping[str, tuple[Table, str]] = {
    SPLIT: (CLIPS, SPLIT),
    "resolution": (RESOLUTION, "short_edge_px"),
    "aspect": (RESOLUTION, "aspect_ratio"),
    "duration": (RESOLUTION, "duration_s"),
    "motion": (MOTION, "motion"),
    "motion_max": (MOTION, "motion_max"),
    "text": (TEXT, "text_coverage_max"),
    "text_mean": (TEXT, "text_coverage_mean"),
    "sharpness": (TECHNICAL, "sharpness"),
    "exposure": (TECHNICAL, "luma_mean"),
    "contrast": (TECHNICAL, "luma_std"),
    "clipping": (TECHNICAL, "clipped_ratio"),
    "colour": (TECHNICAL, "monochrome_ratio"),
    "colourfulness": (TECHNICAL, "colourfulness"),
    "letterbox": (TECHNICAL, "letterbox_ratio"),
    "continuity": (CONTINUITY, "continuity"),
    "aesthetic": (AESTHETIC, "aesthetic"),
    "caption_words": (CAPTION_SCORES, "words"),
    "caption_repetition": (CAPTION_SCORES, "repetition"),
    "caption_problems": (CAPTION_SCORES, "problems"),
    "caption_similarity": (CAPTION_SCORES, "clip_similarity"),
    "exact": (DUPLICATE, "exact"),
    "duplicate": (DUPLICATE, "near"),
    "semantic": (SEMANTIC, "semantic"),
}
KEEPS_ONE = frozenset(name for name, (table, column) in SCORES.items() if column in COMPARING.get(table.name, ()))


@dataclass(frozen=True)
class Rule:
    """One question to a clip: is its score inside the bounds?"""

    name: str
    family: Table
    column: str
    low: float | None
    high: float | None
    kinds: tuple[Kind, ...]
    rescue: tuple["Rule", ...] = ()

    @property
    def keeps_one(self) -> bool:
        """Whether it keeps one clip of each group."""
        return self.column in COMPARING.get(self.family.name, ())

    @property
    def group_columns(self) -> tuple[str, str]:
        """Columns of clips with their groups at its bound, and with their places by quality; null without a score."""
        return f"{self.name}.group", f"{self.name}.rank"

    @property
    def families(self) -> set[str]:
        """Names of the families it reads."""
        return {one.family.name for one in (self, *self.rescue)}

    def bound(self, value: float | None) -> str:
        """A rejected value -> the bound it broke, as people write it."""
        if value is None:
            return "has no value"
        below = self.low is not None and value < float32(self.low)
        return f"< low {self.low:g}" if below else f"> high {self.high:g}"


@dataclass(frozen=True)
class Example:
    """A clip that a rule rejected, with the value it was rejected for."""

    clip_id: str
    value: float | None
    bound: str


@dataclass(frozen=True)
class FunnelStep:
    """What one rule did to the clips that the rules before it had left. `num_rescued` are among `num_left`."""

    rule: str
    column: str
    low: float | None
    high: float | None
    kinds: tuple[str, ...]
    num_in: int
    num_rejected: int
    num_left: int
    examples: tuple[Example, ...]
    num_rescued: int = 0


def rules_of(recipe: CurateRecipe) -> list[Rule]:
    """A recipe -> its rules in funnel order."""
    rules, last = [], []
    for name, (family, column) in SCORES.items():
        bounds: Bounds | Likeness | None = getattr(recipe, name)
        if isinstance(bounds, Likeness):
            last.append(Rule(name, family, column, None, bounds.high, bounds.kinds))
        elif bounds is not None:
            rescue = tuple(
                Rule(other, *SCORES[other], interval.low, interval.high, bounds.kinds)
                for other, interval in sorted((bounds.rescue or {}).items())
            )
            rules.append(Rule(name, family, column, bounds.low, bounds.high, bounds.kinds, rescue))
    for name, columns in sorted(recipe.families.items()):
        family = _family(name, columns)
        for column, bounds in sorted(columns.items()):
            if bounds.rescue:
                raise ConfigError(f"families.{name}.{column}: a rule of this form has no rescue")
            if family.name in COMPARING:
                sections = [section for section in SCORES if SCORES[section][0] is family]
                raise ConfigError(f"families.{name}: expected the sections {', '.join(sections)}, which say it shorter")
            rules.append(Rule(f"{name}.{column}", family, column, bounds.low, bounds.high, bounds.kinds))
    if last:  # a copy of what is held out is not learnt from: the best of a group takes all of it to its side
        last += [rule for rule in rules if rule.name == SPLIT]
        rules = [rule for rule in rules if rule.name != SPLIT]
    return rules + last


def _family(name: str, columns: Collection[str]) -> Table:
    """A family by name, with the columns asked for: what a user added is known to the lake alone, which is asked later.

    Raises: ConfigError if a family that is known has no such score.
    """
    known = {table.name: table for table, _ in SCORES.values() if table is not CLIPS}.get(PREFIX + name)
    if known is None:
        return own_family(name, "what a user added", dict.fromkeys(columns, "a score"))
    scores = [column.name for column in known.columns if column.type == pa.float32()]
    if strange := sorted(set(columns) - set(scores)):
        raise ConfigError(f"families.{name}: there is no score {', '.join(strange)}; there are: {', '.join(scores)}")
    return known


def asked(rules: Sequence[Rule]) -> list[Rule]:
    """Rules and their rescues, flat: every score that is asked about."""
    return [one for rule in rules for one in (rule, *rule.rescue)]


def split_of(clip_ids: pa.ChunkedArray) -> pa.ChunkedArray:
    """Ids of clips, which begin with the digest of their medium -> the media's places in [0, 1), float32."""
    digits = pc.utf8_slice_codeunits(clip_ids, 0, SPLIT_DIGITS)
    places = pc.cast(pc.binary_join_element_wise("0x", digits, ""), pa.int32())
    return pc.divide(pc.cast(places, pa.float32()), pa.scalar(16.0**SPLIT_DIGITS, pa.float32()))


def float32(value: float) -> float:
    """A number -> the nearest one that a score column can hold."""
    return float(pa.scalar(value, pa.float32()).as_py())


def is_one_of(kinds: Sequence[Kind], kind: pa.ChunkedArray) -> Mask:
    """Kinds of some clips, plain or dictionary-encoded -> which of them are asked for."""
    found = kind.combine_chunks()
    if not pa.types.is_dictionary(found.type):
        found = found.dictionary_encode()
    wanted = np.array([name in kinds for name in found.dictionary.to_pylist()] + [False])  # the last for nulls
    if wanted[:-1].all() and not found.null_count:
        return np.ones(len(found), np.bool_)
    mask: Mask = wanted[pc.fill_null(found.indices, len(found.dictionary)).to_numpy()]
    return mask


def passes(rule: Rule, clips: pa.Table, absent: Mapping[str, Mask] | None = None) -> Mask:
    """Clips with `kind` and a float32 column per score -> which of them the rule lets through.

    `absent`: by family, the clips that it has not scored yet. With it their scores count as inside, without it as outside;
    where the two answers differ the rule is undecided.
    """
    inside = _inside(rule, clips, absent)
    if rule.rescue:
        inside |= reduce(np.logical_and, [_inside(one, clips, absent) for one in rule.rescue])
    mask: Mask = inside | ~is_one_of(rule.kinds, clips["kind"])
    return mask


def first_rejections(rules: Sequence[Rule], clips: pa.Table, absent: Mapping[str, Mask] | None = None) -> Places:
    """Clips -> index of the first rule that does not let it through (see `passes`), or KEPT."""
    first = np.full(len(clips), KEPT, np.int16)
    for index, rule in enumerate(rules):
        left = first == KEPT
        through = stays(rule, clips, left, absent) if rule.keeps_one else passes(rule, clips, absent)
        np.putmask(first, left & ~through, index)
    return first


def stays(rule: Rule, clips: pa.Table, left: Mask, absent: Mapping[str, Mask] | None = None) -> Mask:
    """A rule that keeps one of a group, and the clips that are `left` by the rules before it -> which of them it lets
    through: the best of each group, and those it does not ask. `absent` as in `passes`.
    """
    mask = left & ~is_one_of(rule.kinds, clips["kind"])
    if absent is not None and rule.family.name in absent:
        mask |= left & absent[rule.family.name]
    group, rank = (_places(clips[name]) for name in rule.group_columns)
    return mask | best_of(group, rank, left & ~mask & (group >= 0))


def undecided(rules: Sequence[Rule], clips: pa.Table, absent: Mapping[str, Mask], family: str, first: Places) -> Mask:
    """Clips and the rules that reject them `first` -> those which come to a rule that can go either way, for want of a row
    in the family.
    """
    found = np.zeros(len(clips), np.bool_)
    for index, rule in enumerate(rules):
        if family in rule.families and family in absent:
            found |= absent[family] & _reaches(first, index) & passes(rule, clips, absent) & ~passes(rule, clips)
    return found


def reached(rules: Sequence[Rule], clips: pa.Table, first: Places, family: str) -> Mask:
    """Clips and their `first_rejections` -> those that come to a rule that reads the family, and are asked by it."""
    found = np.zeros(len(clips), np.bool_)
    for index, rule in enumerate(rules):
        if family in rule.families:
            found |= _reaches(first, index) & is_one_of(rule.kinds, clips["kind"])
    return found


def funnel(rules: Sequence[Rule], clips: pa.Table, first: Places) -> Iterator[FunnelStep]:
    """Clips and what `first_rejections` said of them -> a step per rule, in order."""
    left = len(clips)
    for index, rule in enumerate(rules):
        rejected = np.flatnonzero(first == index)
        num_rescued = 0
        if rule.rescue:
            outside = _reaches(first, index) & ~passes(replace(rule, rescue=()), clips)
            num_rescued = int(outside.sum()) - len(rejected)
        yield FunnelStep(
            rule=rule.name,
            column=f"{rule.family.name}.{rule.column}",
            low=rule.low,
            high=rule.high,
            kinds=rule.kinds,
            num_in=left,
            num_rejected=len(rejected),
            num_left=left - len(rejected),
            examples=tuple(_examples(rule, clips, rejected)),
            num_rescued=num_rescued,
        )
        left -= len(rejected)


def explain(rules: Sequence[Rule], clips: pa.Table, first: Places) -> pa.Table:
    """Clips and their `first_rejections` -> clip_id, verdict (kept or rejected), rule and value, by clip_id."""
    names = pa.array([rule.name for rule in rules], pa.string())
    value = pa.chunked_array([pa.nulls(len(clips), pa.float32())])
    for index, rule in enumerate(rules):
        value = pc.if_else(pa.array(first == index), clips[rule.column], value)
    verdict = pc.if_else(pa.array(first == KEPT), "kept", "rejected")
    rejecting = pc.take(names, pa.array(first, mask=first == KEPT))
    said = {"clip_id": clips["clip_id"], "verdict": verdict, "rule": rejecting, "value": value}
    return pa.table(said).sort_by("clip_id")


def _reaches(first: Places, index: int) -> Mask:
    mask: Mask = (first >= index) | (first == KEPT)
    return mask


def _inside(rule: Rule, clips: pa.Table, absent: Mapping[str, Mask] | None) -> Mask:
    values = _numbers(clips[rule.column])
    inside: Mask = ~np.isnan(values)
    if rule.low is not None:
        inside &= values >= np.float32(float32(rule.low))
    if rule.high is not None:
        inside &= values <= np.float32(float32(rule.high))
    if absent is not None and rule.family.name in absent:
        inside |= absent[rule.family.name]
    return inside


def _numbers(scores: pa.ChunkedArray) -> NDArray[np.float32]:
    """Float32 scores, with NaN for null: it lies in no interval."""
    numbers: NDArray[np.float32] = pc.fill_null(scores.combine_chunks(), float("nan")).to_numpy()
    return numbers


def _places(values: pa.ChunkedArray) -> NDArray[np.int64]:
    """Whole numbers, with -1 for null."""
    found: NDArray[np.int64] = pc.fill_null(values.combine_chunks(), -1).to_numpy()
    return found.astype(np.int64, copy=False)


def _examples(rule: Rule, clips: pa.Table, rejected: NDArray[np.intp]) -> Iterator[Example]:
    """The rejected clips nearest to the bounds: those a person would argue about. Ties and nulls by clip id."""
    values = _numbers(clips[rule.column])[rejected]
    distance = np.full(len(values), -np.inf, np.float32)
    if rule.low is not None:
        distance = np.maximum(distance, np.float32(float32(rule.low)) - values)
    if rule.high is not None:
        distance = np.maximum(distance, values - np.float32(float32(rule.high)))
    distance = np.nan_to_num(distance, nan=np.inf)
    if len(distance) > NUM_EXAMPLES:  # only what may be among the nearest is sorted
        near = distance <= np.partition(distance, NUM_EXAMPLES)[NUM_EXAMPLES]
        rejected, distance = rejected[near], distance[near]
    found = clips.select(["clip_id", rule.column]).take(pa.array(rejected))
    found = found.append_column("distance", pa.array(distance))
    order = pc.select_k_unstable(found, NUM_EXAMPLES, [("distance", "ascending"), ("clip_id", "ascending")])
    nearest = found.take(order)
    for clip_id, value in zip(nearest["clip_id"].to_pylist(), nearest[rule.column].to_pylist(), strict=True):
        yield Example(clip_id, value, rule.bound(value))
