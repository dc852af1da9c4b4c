"""A stage on Ray Data: items in, rows of several tables out, committed while the stream runs.

What always holds: every item ends as rows or as one row in `attempts`; a rerun does only what is left; whatever dies
(worker, driver, node) costs the blocks it was working on and nothing else. Workers write Parquet files and return their
descriptors; the driver publishes them table by table, the table that marks an item as done last, so a kill in between is
repaired by the rerun, whose rows are matched by key.
"""

import logging
import platform
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.failures import FailureBound
from pipeline.list_sources import readable_text
from pipeline.watchdog import STALL_S, InHand, Watchdog
from schemas.catalog import Lake, WrittenFiles
from schemas.errors import ConfigError, OutbackError, RowError
from schemas.runs import ATTEMPTS
from schemas.table import Table

COMMIT_SECONDS = 10.0
COMMIT_FILES = 64
MAX_ATTEMPTS = 3
OVERLAPPING_BLOCKS = 8  # a block waits for its slowest item: so many may be slow at once before the others wait too

Rows = Mapping[str, Sequence[Mapping[str, object]]]
"""Rows by table name."""


class Worker(Protocol):
    """What one worker keeps for its life: models, child processes. Made once per worker by `Stage.make_worker`."""

    def process(self, item: Mapping[str, Any]) -> Rows:
        """One item -> its rows. Called from `Stage.concurrency` threads. Raises: RowError if it cannot be processed."""
        ...


@dataclass(frozen=True)
class Stage:
    """A declared stage. `tables` are committed in this order; the last one marks items as done.

    `concurrency` is how many items a worker has under way at once: more than one where it mostly waits for an engine
    that batches. Blocks then overlap, so that the engine does not run dry at the end of each. `num_cpus`, `num_gpus` and
    `memory_mb` are what one worker needs.
    """

    name: str
    stage_id: str
    item_key: str
    tables: tuple[Table, ...]
    make_worker: Callable[[], Worker]
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    memory_mb: int = 0
    concurrency: int = 1
    max_block_items: int = 128
    max_block_cost: int = 64 << 20
    failures: FailureBound = FailureBound()  # noqa: RUF009  # frozen


@dataclass(frozen=True)
class StageOutcome:
    """How a stage ended: items that gave rows, items that failed, those by reason, rows added per table."""

    num_done: int
    num_failed: int
    failed_by_reason: Mapping[str, int]
    rows_added: Mapping[str, int]
    seconds: float


@dataclass(frozen=True)
class ToDo:
    """Items to process, each with the number of its next attempt, by reason those left alone because they failed, and how
    many were done before.
    """

    items: pa.Table
    given_up: Mapping[str, int]
    num_before: int

    @property
    def num_given_up(self) -> int:
        """Items that are left alone."""
        return sum(self.given_up.values())

    def check(self, bound: FailureBound, what: str, outcome: StageOutcome | None = None) -> None:
        """Raises: FailureRateError if of all items, those done or given up before and those of `outcome`, too many failed."""
        failed, num_done = Counter(self.given_up), self.num_before
        if outcome is not None:
            failed.update(outcome.failed_by_reason)
            num_done += outcome.num_done
        bound.check(what, num_done, failed)


def left_to_do(lake: Lake, stage: Stage, items: pa.Table, done: pa.Table, *, retry_failed: bool = False) -> ToDo:
    """Items without a row in `done` and without a terminal failure.

    `done` holds at least the stage's `item_key`. An item that failed three times in ways that may pass is left alone too.
    """
    key = stage.item_key
    todo = items.filter(pc.invert(pc.is_in(items[key], done[key].combine_chunks())))
    failed = lake.read_where(
        ATTEMPTS, "stage", [stage.name], ["stage_id", "item_id", "attempt", "terminal", "error_class"]
    )
    failed = failed.filter(pc.equal(failed["stage_id"], stage.stage_id))
    last: dict[str, int] = {}
    given_up: dict[str, str] = {}
    for row in failed.to_pylist():
        last[row["item_id"]] = max(row["attempt"], last.get(row["item_id"], 0))
        if not retry_failed and (row["terminal"] or row["attempt"] >= MAX_ATTEMPTS):
            given_up[row["item_id"]] = row["error_class"]
    ids = todo[key].to_pylist()
    todo = todo.append_column("attempt", pa.array([last.get(item, 0) + 1 for item in ids], pa.int32()))
    left = todo.filter(pa.array([item not in given_up for item in ids], pa.bool_())).sort_by(key)
    return ToDo(left, Counter(given_up[item] for item in ids if item in given_up), len(items) - len(ids))


def run_stage(
    lake: Lake,
    stage: Stage,
    todo: pa.Table,
    run_id: str,
    num_workers: int,
    on_progress: Callable[[int, int, str], None],
    *,
    stall_s: float = STALL_S,
) -> StageOutcome:
    """Process `todo` (columns: the item key, `attempt`, optionally `uri` and `cost`, and what the worker reads).

    `num_workers` actors hold one worker each, or as many as the cluster has room for. When nothing was finished for
    `stall_s`, `on_progress` is told who holds what, from another thread.

    Raises: ConfigError before anything starts if it has room for none; FailureRateError at the end if more items failed
        than the stage allows; the OutbackError that is no RowError by which a worker said that no item can be processed.
    """
    import pickle

    import ray
    import ray.data

    started = time.monotonic()
    if not len(todo):
        return StageOutcome(0, 0, {}, {}, 0.0)
    num_workers = min(num_workers, workers_that_fit(stage, ray.nodes()))
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    blocks = list(_blocks(stage, todo, num_workers))
    # from_arrow would measure each block in a task, which takes a worker of its own for each CPU.
    dataset = ray.data.from_blocks(blocks).map_batches(
        _StageActor,
        fn_constructor_args=(lake, stage, run_id),
        # Ray wants a number where GPUs are asked for. No block is larger, so none is cut.
        batch_size=max(map(len, blocks)) if stage.num_gpus else None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            size=min(num_workers, len(blocks)),
            max_concurrent_calls_per_actor=OVERLAPPING_BLOCKS if stage.concurrency > 1 else 1,
            enable_true_multi_threading=stage.concurrency > 1,  # without it calls that overlap still run in turn
        ),
        num_cpus=stage.num_cpus,
        num_gpus=stage.num_gpus or None,
    )
    committer = _Committer(lake, stage, run_id)
    on_progress(0, len(todo), "")

    def tell_stall(what: str) -> None:
        on_progress(committer.num_done + committer.num_failed, len(todo), what)

    with Watchdog(run_id, stall_s, tell_stall) as watchdog:
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            assert isinstance(batch, pa.Table)  # as asked for
            for row in batch.to_pylist():
                committer.add(row)
                if row["stop"] is not None:
                    committer.commit()  # what is finished is kept
                    raise pickle.loads(row["stop"])
                note = f"{committer.num_failed} failed" if committer.num_failed else ""
                on_progress(committer.num_done + committer.num_failed, len(todo), note)
            committer.commit_if_due()
            watchdog.progressed()
    committer.commit()
    stage.failures.check(f"items of {stage.name}", committer.num_done, committer.failed_by_reason)
    return StageOutcome(
        committer.num_done,
        committer.num_failed,
        dict(committer.failed_by_reason),
        committer.rows_added,
        time.monotonic() - started,
    )


def workers_that_fit(stage: Stage, nodes: Iterable[Mapping[str, Any]]) -> int:
    """Nodes as `ray.nodes()` gives them -> how many workers of a stage they hold. A worker lies on one node.

    Raises: ConfigError if they hold none: Ray would wait for a node that does.
    """
    needs = {"CPU": stage.num_cpus, "GPU": stage.num_gpus, "memory": float(stage.memory_mb << 20)}
    needs = {name: amount for name, amount in needs.items() if amount > 0}
    found = [node.get("Resources", {}) for node in nodes if node["Alive"]]
    if not needs:
        return max(1, len(found))
    fit = sum(int(min(has.get(name, 0.0) / amount for name, amount in needs.items())) for has in found)
    if fit:
        return fit
    most = {name: max((has.get(name, 0.0) for has in found), default=0.0) for name in needs}
    lacks = [
        f"{_amount(name, needs[name])}, and no node has more than {_amount(name, most[name])}"
        for name in needs
        if most[name] < needs[name]
    ]
    told = "; ".join(lacks) or f"{', '.join(_amount(*need) for need in needs.items())} on one node, and no node has all"
    raise ConfigError(
        f"a worker of {stage.name} needs {told} ({len(found)} nodes are up). Ask for less, start a node that has it, "
        "or point RAY_ADDRESS to another cluster"
    )


def _amount(name: str, value: float) -> str:
    return f"{value / (1 << 20):.0f} MB of memory" if name == "memory" else f"{value:g} {name}s"


def _blocks(stage: Stage, todo: pa.Table, num_workers: int) -> Iterator[pa.Table]:
    """Slices small enough to lose, and numerous enough to keep every worker busy to the end."""
    most = max(1, min(stage.max_block_items, -(-len(todo) // (4 * num_workers))))
    costs = todo["cost"].to_pylist() if "cost" in todo.column_names else [0] * len(todo)
    start, spent = 0, 0
    for index, cost in enumerate(costs):
        if index > start and (index - start >= most or spent + cost > stage.max_block_cost):
            yield todo.slice(start, index - start)
            start, spent = index, 0
        spent += cost
    yield todo.slice(start)


class _StageActor:
    """One Ray actor: a worker, and the writing of what it gives.

    An error that stops the job travels as a value too: Ray keeps only the text of what is raised here.
    """

    def __init__(self, lake: Lake, stage: Stage, run_id: str) -> None:
        self.lake, self.stage, self.run_id = lake, stage, run_id
        self.threads = ThreadPoolExecutor(stage.concurrency) if stage.concurrency > 1 else None
        self.in_hand = InHand(run_id)
        self.writing = threading.Lock()  # blocks that overlap share one lake
        self.worker: Worker | OutbackError
        try:
            self.worker = stage.make_worker()
        except OutbackError as error:
            self.worker = error

    def __call__(self, batch: pa.Table) -> pa.Table:
        import pickle

        rows: dict[str, list[Mapping[str, object]]] = {table.name: [] for table in (*self.stage.tables, ATTEMPTS)}
        num_done, stop = 0, None
        items = batch.to_pylist()
        for item, ended in zip(items, (self.threads.map if self.threads else map)(self._ended, items), strict=True):
            if isinstance(ended, RowError):
                rows[ATTEMPTS.name].append(self._attempt(item, ended))
            elif isinstance(ended, OutbackError):
                stop = ended
            else:
                num_done += 1
                for name, found in ended.items():
                    rows[name].extend(found)
        tables = (*self.stage.tables, ATTEMPTS)
        with self.writing:
            written = [
                self.lake.write_files(table, rows[table.name], self.run_id) for table in tables if rows[table.name]
            ]
        return pa.table(
            {
                "written": pa.array([pickle.dumps(written)], pa.binary()),
                "num_done": [num_done],
                "failed": [[str(row["error_class"]) for row in rows[ATTEMPTS.name]]],
                "stop": pa.array([pickle.dumps(stop) if stop else None], pa.binary()),
            }
        )

    def _attempt(self, item: Mapping[str, Any], error: RowError) -> dict[str, object]:
        stage, item_id = self.stage, item[self.stage.item_key]
        return attempt_row(stage.name, stage.stage_id, item_id, error, attempt=item["attempt"], uri=item.get("uri"))

    def _ended(self, item: Mapping[str, Any]) -> Rows | OutbackError:
        if isinstance(self.worker, OutbackError):
            return self.worker
        try:
            with self.in_hand.holding(str(item[self.stage.item_key]), item.get("uri")):
                return self.worker.process(item)
        except OutbackError as error:
            return error
        except Exception as error:  # of one item, whatever it is, and no reason to lose the others
            return RowError(type(error).__name__, f"{error}\n{traceback.format_exc(limit=-3)}", terminal=False)


def attempt_row(
    stage: str, stage_id: str, item_id: str, error: RowError, *, attempt: int = 1, uri: str | None = None
) -> dict[str, object]:
    """The `attempts` row of an item that failed."""
    return {
        "stage": stage,
        "stage_id": stage_id,
        "item_id": item_id,
        "attempt": attempt,
        "error_class": error.reason,
        "message": readable_text(error.message),
        "terminal": error.terminal,
        "uri": uri,
        "host": platform.node(),
        "written_at": datetime.now(UTC),
    }


class _Committer:
    """Collects what workers wrote and publishes it every few seconds, completion marks last."""

    def __init__(self, lake: Lake, stage: Stage, run_id: str) -> None:
        self.lake, self.stage, self.run_id = lake, stage, run_id
        self.num_done = 0
        self.failed_by_reason: Counter[str] = Counter()
        self.rows_added: dict[str, int] = {}
        self._pending: list[WrittenFiles] = []
        self._last = time.monotonic()

    def add(self, row: Mapping[str, Any]) -> None:
        import pickle

        self.num_done += row["num_done"]
        self.failed_by_reason.update(row["failed"])
        self._pending += pickle.loads(row["written"])

    @property
    def num_failed(self) -> int:
        return self.failed_by_reason.total()

    def commit_if_due(self) -> None:
        if len(self._pending) >= COMMIT_FILES or time.monotonic() - self._last >= COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        for table in (ATTEMPTS, *self.stage.tables):
            files = [written for written in self._pending if written.table == table.name]
            if files:
                added = self.lake.commit_files(table, files, self.run_id)
                self.rows_added[table.name] = self.rows_added.get(table.name, 0) + added
        self._pending = []
        self._last = time.monotonic()
