"""The tables that a set is made from: the rows of one producer each, with the hash of their content.

Raises everywhere: ConfigError if a table is empty, or holds several producers and the recipe names none of them. Of the
scorers that compared clips with each other the one that compared most of them is taken; of equals the one that wrote last.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.families import is_own
from pipeline.keep_best import groups
from pipeline.rules import SPLIT, CurateRecipe, Mask, Rule, asked, float32, is_one_of, split_of
from schemas.captions import CAPTION_SCORES
from schemas.catalog import Lake
from schemas.clips import CLIPS
from schemas.columns import WRITTEN_AT
from schemas.errors import ConfigError
from schemas.scores import AESTHETIC, COMPARING, CONTINUITY, DUPLICATE, OWN_COMMON, SEMANTIC
from schemas.table import Table, update_sha256

RANKS = ["rank", "rank_of_better"]


@dataclass(frozen=True)
class _Ids:
    """Clip ids as they were read; and to come, their places in order (None: they are in it) and the hash in that order."""

    found: pa.ChunkedArray
    ordered: "Future[tuple[pa.Array | None, hashlib._Hash]]"


@dataclass(frozen=True)
class Input:
    """One table a set is made from: the rows of one producer, their content by hash, and where that content stands."""

    table: Table
    pinned: tuple[str, str]
    ids: _Ids
    rows: pa.Table
    hashed: Future[str]
    uuid: str
    snapshot_id: int

    @property
    def sha256(self) -> str:
        """The hash of the rows in the order of their clips."""
        return self.hashed.result()

    @property
    def columns(self) -> list[str]:
        """The columns that the hash is over, in its order."""
        return ["clip_id", *self.rows.column_names]


@dataclass(frozen=True)
class Scored:
    """Clips with `kind`, the scores that rules read, null where there is none, and groups and ranks where rules keep one of a
    group; and by family who has no row at all.
    """

    inputs: tuple[Input, ...]
    clips: pa.Table
    absent: dict[str, Mask]


def empty_families(lake: Lake, rules: Sequence[Rule]) -> dict[str, Table]:
    """The families that rules ask about and that have no rows yet, by name."""
    families = {rule.family.name: rule.family for rule in asked(rules) if rule.name != SPLIT}
    return {name: table for name, table in families.items() if lake.snapshot_id(table) is None}


def read_scored(
    lake: Lake,
    recipe: CurateRecipe,
    rules: Sequence[Rule],
    unread: Collection[str] = (),
    at: Mapping[str, int] | None = None,
) -> Scored:
    """What the rules ask about. Families that are `unread` are absent for every clip. `at`: snapshots by table; left out,
    now.
    """
    reader = _Reader(lake, recipe, at or {})
    clips = reader.clips()
    joined = pa.table({"clip_id": clips.ids.found, "kind": clips.rows["kind"].combine_chunks()})
    if any(rule.name == SPLIT for rule in asked(rules)):
        joined = joined.append_column(SPLIT, split_of(joined["clip_id"]))
    inputs, absent = [clips], {}
    scores = [rule for rule in asked(rules) if rule.name != SPLIT]
    for table in {rule.family.name: rule.family for rule in scores}.values():
        wanted = sorted({rule.column for rule in scores if rule.family is table})
        if table.name in unread:
            columns = {column: pa.nulls(len(joined), pa.float32()) for column in wanted}
            columns |= _no_groups(rules, table, len(joined))
            absent[table.name] = np.ones(len(joined), np.bool_)
        else:
            item = reader.scores(table, wanted)
            inputs.append(item)
            columns = {column: item.rows[column] for column in wanted} | _groups(rules, item)
            if item.ids is not clips.ids:  # not every clip was scored, or in another order
                place = _places(clips.ids, item.ids)
                columns = {column: values.take(place) for column, values in columns.items()}
                absent[table.name] = pc.is_null(place).to_numpy()
        for column, values in columns.items():
            joined = joined.append_column(column, values)
    of_kind = is_one_of(recipe.kinds, joined["kind"])
    if not of_kind.all():
        joined = joined.filter(pa.array(of_kind))
        absent = {name: mask[of_kind] for name, mask in absent.items()}
    return Scored(tuple(inputs), joined, absent)


def _places(ids: _Ids, among: _Ids) -> pa.ChunkedArray:
    """Where each id stands among others, null where it does not. The same ids in another order are put beside each other by
    the orders that are known for the sake of hashes, in a fraction of the time that looking each up takes.
    """
    if len(ids.found) == len(among.found):
        (order, _), (other, _) = ids.ordered.result(), among.ordered.result()
        ascending = ids.found if order is None else ids.found.take(order)
        if ascending.equals(among.found if other is None else among.found.take(other)):
            in_order = np.arange(len(ids.found))
            place = np.empty(len(ids.found), np.int64)
            place[in_order if order is None else order] = in_order if other is None else other
            return pa.chunked_array([place])
    return pc.index_in(ids.found, value_set=among.found)


def _groups(rules: Sequence[Rule], item: Input) -> dict[str, pa.Array]:
    """Groups and ranks of the rows of a family, for each rule that keeps one of a group."""
    columns: dict[str, pa.Array] = {}
    for rule in rules:
        if rule.keeps_one and rule.family is item.table:
            assert rule.high is not None  # a Likeness has one
            rank, better = (pc.fill_null(item.rows[name].cast(pa.int64()), -1).to_numpy() for name in RANKS)
            likeness = pc.fill_null(item.rows[rule.column], -1.0).to_numpy()
            found = pa.array(groups(likeness, rank, better, float32(rule.high)))
            columns |= dict(zip(rule.group_columns, (found, pa.array(rank)), strict=True))
    return columns


def _no_groups(rules: Sequence[Rule], table: Table, count: int) -> dict[str, pa.Array]:
    mine = [rule for rule in rules if rule.keeps_one and rule.family is table]
    return {name: pa.nulls(count, pa.int64()) for rule in mine for name in rule.group_columns}


class _Reader:
    """Reads tables for a recipe, while threads beside it hash what was read.

    Tables that were written batch by batch alike hold the same ids in the same places: those are sorted and hashed once,
    as the first column of each.
    """

    def __init__(self, lake: Lake, recipe: CurateRecipe, at: Mapping[str, int]) -> None:
        self.lake = lake
        self.recipe = recipe
        self.at = at
        self.known: list[_Ids] = []
        self.decoded: dict[bytes, pa.ChunkedArray] = {}
        self.beside = ThreadPoolExecutor(2)

    def clips(self) -> Input:
        """The clips of the segmentation that the recipe names, or of the only one there is."""
        self.read = self._input(CLIPS, ["kind"], self.recipe.segmentation_id, "segmentation_id")
        return self.read

    def scores(self, table: Table, columns: list[str]) -> Input:
        """Columns of a family by the scorer that the recipe names, or by the one that is taken where it names none."""
        family = table.name.removeprefix("score_")
        check_columns(self.lake, table, columns)
        option = f"scorers.families.{family}" if is_own(table) else f"scorers.{family}"
        more = RANKS if table.name in COMPARING else []
        item = self._input(table, [*columns, *more], self.recipe.scorers.of(family), option)
        if more and item.rows[RANKS[0]].null_count:
            raise ConfigError(
                f"{table.name}: scorer {item.pinned[1]} is of an earlier version, which does not say which clip of a group "
                f"is the best. {how_to_fill(table)} again, and name no scorer with {option}"
            )
        return item

    def _input(self, table: Table, columns: list[str], wanted: str | None, option: str) -> Input:
        """The rows of one producer: the one the recipe names, or else the only one there is."""
        uuid, snapshot_id = self.lake.uuid(table), self.at.get(table.name, self.lake.snapshot_id(table))
        if uuid is None or snapshot_id is None:
            raise ConfigError(f"{table.name} is empty. {how_to_fill(table)} first")
        by = table.key[1]
        encoded = [by, "kind"] if table is CLIPS else [by]
        rows = self.lake.read(table, ["clip_id", by, *columns], at=snapshot_id, encoded=encoded, decoded=self.decoded)
        counts = {item["values"]: item["counts"] for item in pc.value_counts(rows[by]).to_pylist()}
        listed = ", ".join(f"{found} ({count} rows)" for found, count in sorted(counts.items()))
        if wanted is None:
            if table.name in COMPARING and counts:
                counts = self._widest(table, rows, snapshot_id)
                if not counts:
                    raise ConfigError(
                        f"no scorer of {table.name} compared these clips: {listed}. {how_to_fill(table)} again"
                    )
            if len(counts) != 1:
                raise ConfigError(f"{table.name} holds several: {listed}. Choose one with --set {option}=...")
            (wanted,) = counts
        elif wanted not in counts:
            raise ConfigError(f"{table.name} has no rows of {option}={wanted}; it holds: {listed}")
        mine = rows.filter(pc.equal(rows[by], wanted)) if len(counts) > 1 or counts[wanted] < len(rows) else rows
        ids, rest = self._ids(mine["clip_id"]), mine.drop_columns(["clip_id"])
        return Input(table, (option, wanted), ids, rest, self.beside.submit(_sha256, ids, rest), uuid, snapshot_id)

    def _widest(self, table: Table, rows: pa.Table, snapshot_id: int) -> dict[str, int]:
        """The scorer that compared most of the clips of the kinds asked for, none if none did; of equals the one whose last row
        is the newest.
        """
        by = table.key[1]
        if len(pc.unique(rows[by])) > 1:
            clips = self.read
            asked_for = clips.ids.found.filter(pa.array(is_one_of(self.recipe.kinds, clips.rows["kind"])))
            rows = rows.filter(pc.is_in(rows["clip_id"], value_set=asked_for.combine_chunks()))
        counts = {item["values"]: item["counts"] for item in pc.value_counts(rows[by]).to_pylist()}
        most = max(counts.values(), default=0)
        widest = [scorer for scorer, count in counts.items() if count == most]
        if len(widest) > 1:
            times = self.lake.read(table, [by, WRITTEN_AT.name], at=snapshot_id)
            times = times.filter(pc.is_in(times[by], value_set=pa.array(widest)))
            last = times.group_by(by).aggregate([(WRITTEN_AT.name, "max")]).to_pylist()
            widest = [max(last, key=lambda row: (row[f"{WRITTEN_AT.name}_max"], row[by]))[by]]
        return {scorer: most for scorer in widest}

    def _ids(self, found: pa.ChunkedArray) -> _Ids:
        for ids in self.known:
            if ids.found.equals(found):
                return ids
        whole = found.combine_chunks()
        if isinstance(whole, pa.Array):  # beyond 2 GiB chunks stay apart
            found = pa.chunked_array([whole])
        self.known.append(_Ids(found, self.beside.submit(_in_order, found)))
        return self.known[-1]


def _in_order(ids: pa.ChunkedArray) -> "tuple[pa.Array | None, hashlib._Hash]":
    ascending = pc.all(pc.less_equal(ids.slice(0, len(ids) - 1), ids.slice(1)), min_count=0).as_py()
    order = None if ascending else pc.sort_indices(ids)
    digest = hashlib.sha256()
    update_sha256(digest, pa.table({"clip_id": ids}), order)
    return order, digest


def _sha256(ids: _Ids, rest: pa.Table) -> str:
    order, of_ids = ids.ordered.result()
    digest = of_ids.copy()
    update_sha256(digest, rest, order)
    return digest.hexdigest()


def how_to_fill(table: Table) -> str:
    """What to do about a table that lacks rows, as the beginning of a sentence."""
    if table is CAPTION_SCORES:
        return "Run `outback score caption SET`"
    if table is DUPLICATE:
        return "Run `outback score duplicate`"
    if table in (SEMANTIC, CONTINUITY):
        family = table.name.removeprefix("score_")
        return f"Run `outback score {family}`, which needs the embeddings that `outback score aesthetic` keeps,"
    if table is AESTHETIC:
        return (
            "Run `outback score aesthetic`, which needs the weights of LAION's predictor and of open_clip's ViT-L/14,"
        )
    if is_own(table):
        return "Run `outback score MODULE:NAME` with the scorer that fills it"
    return "Run `outback scan`"


def check_columns(lake: Lake, table: Table, columns: Sequence[str]) -> None:
    """Raises: ConfigError if a family that users added is there and has no such columns."""
    if is_own(table) and lake.uuid(table) is not None:
        _, held = lake.stored_docs(table.name)
        if strange := sorted(set(columns) - set(held)):
            scores = ", ".join(name for name in held if name not in OWN_COMMON)
            raise ConfigError(f"{table.name} has no score {', '.join(strange)}; it has: {scores}")
