"""Show: what the lake holds and what happened in it, for people as tables and for machines as JSON."""

import json as jsonlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow.compute as pc

from jobs.curate import print_funnel as print_steps
from jobs.curate import set_row
from jobs.families import all_tables
from pipeline.rules import Example, FunnelStep
from schemas.catalog import Lake
from schemas.clips import CLIPS
from schemas.curated import CURATED_SETS
from schemas.generations import PREFERENCE_SETS
from schemas.runs import ATTEMPTS, RUNS
from schemas.scores import PREFIX, SECONDS
from schemas.sequences import SEQUENCE_SETS
from schemas.table import Table

NUM_EXAMPLES = 3
WIDTH = 200  # of a table that no terminal shows


@dataclass(frozen=True)
class TableReport:
    """One table as it is now. `content_sha256` is None where it was not asked for, and for ledgers, which have none.

    Of scores: the mean of what a clip took, None where the scan measured many families at once; and the share of all
    clips that have a row, by any scorer.
    """

    name: str
    num_rows: int
    num_files: int
    num_bytes: int
    num_snapshots: int
    snapshot_id: int | None
    tags: tuple[str, ...]
    content_sha256: str | None
    seconds_per_clip: float | None
    coverage: float | None


@dataclass(frozen=True)
class RunReport:
    """One execution. `status` is running-or-killed until its end is written."""

    run_id: str
    job: str
    status: str
    started_at: str
    seconds: float | None
    code_version: str
    recipe: Any
    inputs: Any
    outcome: Any


@dataclass(frozen=True)
class AttemptReport:
    """The items that failed in one stage for one reason, with a few examples."""

    stage: str
    reason: str
    num_items: int
    terminal: bool
    examples: tuple[dict[str, str], ...]


def table_reports(lake: Lake, *, hashes: bool = False) -> list[TableReport]:
    """Every table of the lake, made or not, in the order of the road."""
    reports = []
    num_clips = _num_clips(lake, CLIPS)
    for table in all_tables(lake):
        sha256 = lake.content_sha256(table) if hashes and not table.ledger else None
        facts = lake.facts(table)
        seconds, coverage = _cost_and_coverage(lake, table, num_clips) if facts.num_rows else (None, None)
        reports.append(TableReport(**asdict(facts), content_sha256=sha256, seconds_per_clip=seconds, coverage=coverage))
    return reports


def _cost_and_coverage(lake: Lake, table: Table, num_clips: int) -> tuple[float | None, float | None]:
    if not table.name.startswith(PREFIX) or not num_clips:
        return None, None
    seconds = lake.read(table, [SECONDS.name])[SECONDS.name] if SECONDS.name in table.names else None
    return pc.mean(seconds).as_py() if seconds is not None else None, _num_clips(lake, table) / num_clips


def _num_clips(lake: Lake, table: Table) -> int:
    """Clips that have rows: as many as rows, where all are by one detector or scorer. Their ids are read only elsewhere."""
    num_rows = lake.facts(table).num_rows
    if num_rows == 0 or lake.only_value(table, table.key[1]) is not None:
        return num_rows
    return int(pc.count_distinct(lake.read(table, ["clip_id"])["clip_id"]).as_py())


def run_reports(lake: Lake) -> list[RunReport]:
    """Every execution, the newest first."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in lake.read(RUNS).to_pylist():
        found.setdefault(row["run_id"], {})[row["status"]] = row
    reports = []
    for run_id, rows in found.items():
        end = rows.get("done") or rows.get("failed")
        begin = rows.get("started") or end
        assert begin is not None
        outcome = jsonlib.loads((end or begin)["outcome"])
        reports.append(
            RunReport(
                run_id=run_id,
                job=begin["job"],
                status=end["status"] if end else "running or killed",
                started_at=begin["written_at"].isoformat(timespec="seconds"),
                seconds=outcome.get("seconds"),
                code_version=begin["code_version"],
                recipe=jsonlib.loads(begin["recipe"]),
                inputs=jsonlib.loads(begin["inputs"]),
                outcome=outcome,
            )
        )
    return sorted(reports, key=lambda run: (run.started_at, run.run_id), reverse=True)


def attempt_reports(lake: Lake) -> list[AttemptReport]:
    """Failures by stage and reason, each item counted once, by its latest attempt."""
    latest: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in sorted(lake.read(ATTEMPTS).to_pylist(), key=lambda row: row["attempt"]):
        latest[row["stage"], row["stage_id"], row["item_id"]] = row
    groups: dict[tuple[str, str, bool], list[dict[str, Any]]] = {}
    for row in latest.values():
        groups.setdefault((row["stage"], row["error_class"], row["terminal"]), []).append(row)
    return [
        AttemptReport(
            stage=stage,
            reason=reason,
            num_items=len({row["item_id"] for row in rows}),
            terminal=terminal,
            examples=tuple(
                {name: str(row[name] or "") for name in ("item_id", "uri", "message")}
                for row in sorted(rows, key=lambda row: str(row["item_id"]))[:NUM_EXAMPLES]
            ),
        )
        for (stage, reason, terminal), rows in sorted(groups.items())
    ]


def print_tables(lake: Lake, *, hashes: bool, json: bool) -> None:
    """Rows, files, sizes and tags of every table, cost and coverage of scores, and a hash of the content if asked for."""
    reports = table_reports(lake, hashes=hashes)
    if json:
        _print_json([asdict(report) for report in reports])
        return
    columns = ["table", "rows", "files", "bytes", "snapshots", "coverage", "s a clip", "tags"]
    columns += ["content_sha256"] if hashes else []
    rows = []
    for one in reports:
        sha256 = [one.content_sha256 or "ledger"] if hashes else []
        coverage = "" if one.coverage is None else f"{one.coverage:.1%}"
        seconds = "" if one.seconds_per_clip is None else f"{one.seconds_per_clip:.3g}"
        sizes = [one.num_rows, one.num_files, one.num_bytes, one.num_snapshots]
        rows.append([one.name, *sizes, coverage, seconds, _few(one.tags), *sha256])
    _print_table(columns, rows)


def print_sets(lake: Lake, *, json: bool) -> None:
    """Curated sets, sequence sets and preference sets by name."""
    names = ["name", "curated_id", "recipe_id", "num_clips", "content_sha256", "written_at"]
    curated = lake.read(CURATED_SETS, names).sort_by("name").to_pylist()
    names = [
        "name",
        "seqset_id",
        "curated_ids",
        "tokenizer_id",
        "num_sequences",
        "num_tokens",
        "context_len",
        "written_at",
    ]
    packed = lake.read(SEQUENCE_SETS, names).sort_by("name").to_pylist()
    names = ["name", "pairset_id", "judge", "tokenizer_id", "num_pairs", "num_tokens", "written_at"]
    preferred = lake.read(PREFERENCE_SETS, names).sort_by("name").to_pylist()
    if json:
        _print_json({"curated_sets": curated, "sequence_sets": packed, "preference_sets": preferred})
        return
    _print_table(
        ["curated set", "id", "recipe", "clips", "made"],
        [
            [row["name"], row["curated_id"], row["recipe_id"], row["num_clips"], _when(row["written_at"])]
            for row in curated
        ],
    )
    by_id = {row["curated_id"]: row["name"] for row in curated}
    _print_table(
        ["sequence set", "id", "of", "sequences", "tokens", "made"],
        [
            [
                row["name"],
                row["seqset_id"],
                ", ".join(by_id.get(one, one) for one in row["curated_ids"]),
                row["num_sequences"],
                row["num_tokens"],
                _when(row["written_at"]),
            ]
            for row in packed
        ],
    )
    names = ["name", "pairset_id", "judge", "num_pairs", "num_tokens"]
    rows = [[*(row[name] for name in names), _when(row["written_at"])] for row in preferred]
    _print_table(["preference set", "id", "by", "pairs", "tokens", "made"], rows)


def print_funnel(lake: Lake, name: str, *, json: bool) -> None:
    """What each rule of a set rejected, as it was when the set was made."""
    row = set_row(lake, name)
    steps = jsonlib.loads(row["funnel"])
    if json:
        _print_json({"name": name, "curated_id": row["curated_id"], "num_clips": row["num_clips"], "funnel": steps})
        return
    read = [FunnelStep(**{**step, "examples": tuple(Example(**one) for one in step["examples"])}) for step in steps]
    print_steps(read[0].num_in if read else row["num_clips"], read)
    print(f"{name}: {row['num_clips']} clips, {row['curated_id']}")


def print_runs(lake: Lake, *, json: bool) -> None:
    """Every execution: job, outcome, duration, code."""
    reports = run_reports(lake)
    if json:
        _print_json([asdict(report) for report in reports])
        return
    rows = []
    for run in reports:
        outcome = {key: value for key, value in run.outcome.items() if key != "seconds"}
        if "training_id" in run.inputs:  # by which a training that is not finished is exported
            outcome = {"training_id": run.inputs["training_id"], **outcome}
        seconds = "" if run.seconds is None else f"{run.seconds:.1f}"
        rows.append([run.started_at, run.run_id, run.status, seconds, run.code_version, jsonlib.dumps(outcome)[:100]])
    _print_table(["started", "run", "status", "seconds", "code", "outcome"], rows)


def print_attempts(lake: Lake, *, json: bool) -> None:
    """Everything that failed, by stage and reason, with examples."""
    reports = attempt_reports(lake)
    if json:
        _print_json([asdict(report) for report in reports])
        return
    rows = []
    for one in reports:
        final = "for good" if one.terminal else "may be tried again"
        for index, example in enumerate(one.examples):
            place = example["uri"] or example["item_id"]
            first = [one.stage, one.reason, one.num_items, final] if index == 0 else ["", "", "", ""]
            rows.append([*first, place, example["message"][:100]])
    _print_table(["stage", "reason", "items", "", "for example", "what was found"], rows)


def print_lineage(lake: Lake, generation: str, *, json: bool) -> None:
    """From a generation back to checkpoint, runs, sequences, clips, media and files."""
    from jobs.lineage import print_trace, trace

    print_trace(trace(lake, generation), json)


def _few(names: Sequence[str]) -> str:
    rest = [f"and {len(names) - NUM_EXAMPLES} more"] if len(names) > NUM_EXAMPLES else []
    return ", ".join([*names[:NUM_EXAMPLES], *rest])


def _when(moment: Any) -> str:
    return str(moment.isoformat(sep=" ", timespec="seconds"))


def _print_json(value: Sequence[Any] | Mapping[str, Any]) -> None:
    print(jsonlib.dumps(value, default=str, ensure_ascii=False))


def _print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = list(rows)
    table = Table()
    for index, name in enumerate(columns):
        numbers = bool(rows) and all(isinstance(row[index], int) or row[index] == "" for row in rows)
        table.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    console = Console()
    Console(width=console.width if console.is_terminal else WIDTH).print(table)
