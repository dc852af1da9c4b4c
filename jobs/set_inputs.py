"""The tables that a set is made from: the rows of one producer each, with the hash of their content.

Raises everywhere: ConfigError if a table is empty, or holds several producers and the recipe names none of them.
"""

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.rules import CurateRecipe
from schemas.captions import CAPTION_SCORES
from schemas.catalog import Lake
from schemas.clips import CLIPS
from schemas.errors import ConfigError
from schemas.scores import AESTHETIC, DUPLICATE
from schemas.table import Table, update_sha256


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


class ScoreReader:
    """Reads tables for a recipe, while a thread beside it hashes what was read.

    Tables that were written batch by batch alike hold the same ids in the same places: those are sorted and hashed once,
    as the first column of each.
    """

    def __init__(self, lake: Lake, recipe: CurateRecipe) -> None:
        self.lake = lake
        self.recipe = recipe
        self.known: list[_Ids] = []
        self.beside = ThreadPoolExecutor(1)

    def clips(self) -> Input:
        """The clips of the segmentation that the recipe names, or of the only one there is."""
        return self._input(CLIPS, ["kind"], self.recipe.segmentation_id, "segmentation_id")

    def scores(self, table: Table, columns: list[str]) -> Input:
        """Columns of a family by the scorer that the recipe names, or by the only one there is."""
        family = table.name.removeprefix("score_")
        return self._input(table, columns, getattr(self.recipe.scorers, family), f"scorers.{family}")

    def _input(self, table: Table, columns: list[str], wanted: str | None, option: str) -> Input:
        """The rows of one producer: the one the recipe names, or else the only one there is."""
        uuid, snapshot_id = self.lake.uuid(table), self.lake.snapshot_id(table)
        if uuid is None or snapshot_id is None:
            asking = "" if table is CLIPS else ", and the recipe has a rule that asks for it"
            raise ConfigError(f"{table.name} is empty{asking}. {how_to_fill(table)} first")
        by = table.key[1]
        encoded = [by, "kind"] if table is CLIPS else [by]
        rows = self.lake.read(table, ["clip_id", by, *columns], at=snapshot_id, encoded=encoded)
        counts = {item["values"]: item["counts"] for item in pc.value_counts(rows[by]).to_pylist()}
        listed = ", ".join(f"{found} ({count} rows)" for found, count in sorted(counts.items()))
        if wanted is None:
            if len(counts) != 1:
                raise ConfigError(f"{table.name} holds several: {listed}. Choose one with --set {option}=...")
            (wanted,) = counts
        elif wanted not in counts:
            raise ConfigError(f"{table.name} has no rows of {option}={wanted}; it holds: {listed}")
        mine = rows.filter(pc.equal(rows[by], wanted)) if len(counts) > 1 else rows
        ids, rest = self._ids(mine["clip_id"]), mine.drop_columns(["clip_id"])
        return Input(table, (option, wanted), ids, rest, self.beside.submit(_sha256, ids, rest), uuid, snapshot_id)

    def _ids(self, found: pa.ChunkedArray) -> _Ids:
        for ids in self.known:
            if ids.found.equals(found):
                return ids
        whole = found.combine_chunks()
        found = (
            whole if isinstance(whole, pa.ChunkedArray) else pa.chunked_array([whole])
        )  # beyond 2 GiB chunks stay apart
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
    if table is AESTHETIC:
        return (
            "Run `outback score aesthetic`, which needs the weights of LAION's predictor and of open_clip's ViT-L/14,"
        )
    return "Run `outback scan`"
