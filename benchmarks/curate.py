"""How long another threshold takes on a made-up lake of a million clips, beside DuckDB on the same Parquet files.

Usage: python benchmarks/curate.py [--clips N] [--commits N] [--duplicates] [--folder LAKE] [--page FILE]

The lake has 36 score columns in four families, written in as many commits as asked for; the clips of each commit are the
same in all tables, as a scan writes them, unless --apart has the last family written in batches of its own. Five rounds;
in each, one after the other and each in a process of its own on two cores: `outback --help`; the whole command `outback
curate`; the funnel and the set after imports; and the same funnel and set by DuckDB, which is told the files, and the count
of the set alone. Both must find the same. The figures are medians. With --duplicates the lake has a family of duplicates too, a
tenth of its clips linked at random, and each round also takes the time of a recipe that keeps one of each group.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from schemas.catalog import Lake
from schemas.clips import CLIPS
from schemas.identity import clip_id
from schemas.scores import DUPLICATE, MOTION, RESOLUTION, TECHNICAL, TEXT
from schemas.table import Column, Table

ROUNDS = 5
RECIPE = "offline"
FAMILIES = (RESOLUTION, MOTION, TEXT, TECHNICAL)
SCORES_A_FAMILY = 9
CLIPS_A_MEDIUM = 8
CORES = 2
RANGES = {
    "short_edge_px": (256, 2160),
    "aspect_ratio": (1, 3.2),
    "duration_s": (0.4, 20),
    "motion": (0, 0.25),
    "text_coverage_max": (0, 0.12),
    "sharpness": (0, 500),
    "monochrome_ratio": (0, 1),
    "letterbox_ratio": (0, 0.17),
}


def make_lake(folder: Path, num_clips: int, num_commits: int, *, apart: bool, duplicates: bool) -> Lake:
    """Clips of media with random ids, and scores drawn at random, one in a thousand of them null."""
    lake, rng = Lake(folder), np.random.default_rng(0)
    media = [f"{number:016x}" for number in rng.integers(0, 2**64, num_clips, np.uint64).tolist()]
    names = np.array([
        clip_id(media[index // CLIPS_A_MEDIUM], 4000 * (index % CLIPS_A_MEDIUM), 4000 * (index % CLIPS_A_MEDIUM + 1))
        for index in range(num_clips)
    ])  # fmt: skip
    for part in np.array_split(names, num_commits):
        lake.append(CLIPS, _clips(part), "benchmark")
        for family in FAMILIES[:-1] if apart else FAMILIES:
            lake.append(*_scores(family, part, rng), "benchmark")
    for part in np.array_split(rng.permutation(names), num_commits) if apart else ():
        lake.append(*_scores(FAMILIES[-1], part, rng), "benchmark")
    if duplicates:
        lake.append(DUPLICATE, _duplicates(rng.permutation(names), rng), "benchmark")
    return lake


def _duplicates(names: np.ndarray, rng: np.random.Generator) -> pa.Table:
    """Clips, the best first, of which a tenth are like a better one."""
    count = len(names)
    better = (rng.random(count) * np.arange(count)).astype(np.int64)
    alone = rng.random(count) >= 0.1
    alone[0] = True
    near = np.where(alone, 0, rng.uniform(0.9, 1, count)).astype(np.float32)
    ranks = {"rank": np.arange(count, dtype=np.int32), "rank_of_better": pa.array(better.astype(np.int32), mask=alone)}
    of = pa.array(names).take(pa.array(better, mask=alone))
    scores = {"exact": pa.repeat(pa.scalar(0, pa.float32()), count), "near": near, "duplicate_of": of, **ranks}
    return pa.table({"clip_id": names, "scorer_id": pa.repeat("fedcba9876543210", count), **scores})


def _clips(names: np.ndarray) -> pa.Table:
    count = len(names)
    same = {"segmentation_id": "0123456789abcdef", "kind": "video", "start_ms": 0, "end_ms": 4000}
    same |= {"start_frame": 0, "end_frame": 96, "fps": 24.0}
    ids = {"clip_id": pa.array(names), "media_id": pa.array([name[:16] for name in names.tolist()])}
    return pa.table({**ids, **{name: pa.repeat(value, count) for name, value in same.items()}})


def _scores(family: Table, names: np.ndarray, rng: np.random.Generator) -> tuple[Table, pa.Table]:
    """The family with made-up columns beside its own, and rows of it."""
    own = [column for column in family.columns if column.type == pa.float32()]
    more = [
        Column(f"made_up_{index}", pa.float32(), "no rule asks", nullable=True)
        for index in range(len(own), SCORES_A_FAMILY)
    ]
    wide = replace(family, columns=(*family.columns, *more))
    rows = {"clip_id": pa.array(names), "scorer_id": pa.repeat("fedcba9876543210", len(names))}
    for column in (*own, *more):
        values = rng.uniform(*RANGES.get(column.name, (0, 1)), len(names)).astype(np.float32)
        rows[column.name] = pa.array(values, mask=rng.random(len(names)) < 0.001)
    if "num_samples" in family.names:
        rows["num_samples"] = pa.repeat(pa.scalar(8, pa.int32()), len(names))
    return wide, pa.table(rows)


def time_outback(folder: str, small: str, change: str, name: str, *more: str) -> dict[str, Any]:
    """In a process of its own: seconds from an open recipe to a published set. The small lake brings the imports."""
    os.environ["MIMALLOC_PURGE_DELAY"] = "-1"  # as the command does
    from jobs.curate import curate, leave_pandas_out, load_curate_recipe

    leave_pandas_out()
    recipe = load_curate_recipe(RECIPE, [change, *more])
    curate(Lake(small), recipe, name)
    wall, cpu = time.perf_counter(), time.process_time()
    result = curate(Lake(folder), recipe, name)
    spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    return {**spent, "rejected": [step.num_rejected for step in result.funnel], "kept": result.num_clips}


def time_duckdb(folder: str, small: str, change: str, target: str) -> dict[str, Any]:
    """In a process of its own: seconds for the same funnel and set by SQL, and for the count of the set alone."""
    import duckdb

    from jobs.curate import load_curate_recipe
    from pipeline.rules import rules_of

    rules = rules_of(load_curate_recipe(RECIPE, [change]))
    asked = []
    for rule in rules:
        column = f"{rule.family.name}.{rule.column}"
        bounds = [f"{column} >= cast({rule.low!r} as float)"] if rule.low is not None else []
        bounds += [f"{column} <= cast({rule.high!r} as float)"] if rule.high is not None else []
        applies = f"clips.kind not in ({', '.join(map(repr, rule.kinds))})"
        asked.append(f"({applies} or coalesce({' and '.join(bounds)}, false))")
    case = "case " + " ".join(f"when not {one} then {index}" for index, one in enumerate(asked)) + " end"
    database = duckdb.connect(config={"threads": CORES})

    def tables(where: str) -> str:
        lake = Lake(where)
        read = [f"read_parquet({lake.data_files(table)!r}) as {table.name}" for table in (CLIPS, *FAMILIES)]
        return read[0] + "".join(f" left join {one} using (clip_id)" for one in read[1:])

    def whole(source: str) -> list[tuple[int | None, int]]:
        database.execute(f"create or replace temp table said as select clips.clip_id, {case} as first from {source}")
        counts = database.execute("select first, count(*) from said group by first").fetchall()
        kept = "select clip_id from said where first is null order by clip_id"
        database.execute(f"copy ({kept}) to '{target}' (format parquet, compression zstd)")
        return counts

    def count(source: str) -> int:
        return int(database.execute(f"select count(*) from {source} where {' and '.join(asked)}").fetchall()[0][0])

    whole(tables(small))
    source = tables(folder)
    wall, cpu = time.perf_counter(), time.process_time()
    counts = dict(whole(source))
    spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    wall, cpu = time.perf_counter(), time.process_time()
    kept = count(source)
    alone = {"count_wall": time.perf_counter() - wall, "count_cpu": time.process_time() - cpu}
    assert kept == counts.get(None, 0), (kept, counts)
    return {**spent, **alone, "rejected": [counts.get(index, 0) for index in range(len(rules))], "kept": kept}


def seconds(command: Sequence[str]) -> dict[str, float]:
    """Wall and CPU seconds of one process. Raises: CalledProcessError if it fails."""
    before, start = os.times(), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - start, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"wall": wall, "cpu": cpu}


def _child(what: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", what, *arguments]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(json.loads(told))


def measure(folder: str, small: str, scratch: Path, *, duplicates: bool) -> dict[str, list[dict[str, Any]]]:
    """Five rounds of everything, one after the other."""
    found: dict[str, list[dict[str, Any]]] = {"help": [], "command": [], "outback": [], "duckdb": []}
    program, stamp = [sys.executable, "-m", "jobs.cli"], time.time_ns()
    for index in range(ROUNDS):
        change, name = f"motion.low={0.002 + 1e-6 * (stamp % 1000 + index)!r}", f"benchmark-{stamp}-{index}"
        found["help"].append(seconds([*program, "--help"]))
        other = f"motion.low={0.003 + 1e-6 * (stamp % 1000 + index)!r}"
        whole = [*program, "curate", RECIPE, "--set", other, "--name", f"{name}-command", "--lake", folder]
        found["command"].append(seconds(whole))
        found["outback"].append(_child("outback", folder, small, change, name))
        found["duckdb"].append(_child("duckdb", folder, small, change, str(scratch / "kept.parquet")))
        if duplicates:
            one = _child("outback", folder, small, change, f"{name}-one", "duplicate.high=0.9")
            found.setdefault("one_of_a_group", []).append(one)
        ours, theirs = found["outback"][-1], found["duckdb"][-1]
        assert (ours["rejected"], ours["kept"]) == (theirs["rejected"], theirs["kept"]), (ours, theirs)
        print(f"round {index + 1} of {ROUNDS}: {ours['wall']:.2f} s, DuckDB {theirs['wall']:.2f} s", file=sys.stderr)
    return found


def page(found: dict[str, list[dict[str, Any]]], about: str) -> str:
    """The measurements as a table in Markdown."""

    def row(text: str, name: str, wall: str = "wall", cpu: str = "cpu") -> str:
        walls, cpus = [one[wall] for one in found[name]], [one[cpu] for one in found[name]]
        spread = f"{min(walls):.2f} to {max(walls):.2f}"
        return f"| {text} | {statistics.median(walls):.2f} | {spread} | {statistics.median(cpus):.2f} |"

    ratios = [ours["wall"] / theirs["wall"] for ours, theirs in zip(found["outback"], found["duckdb"], strict=True)]
    counts = [
        ours["wall"] / theirs["count_wall"] for ours, theirs in zip(found["outback"], found["duckdb"], strict=True)
    ]
    lines = [
        about,
        "",
        "| | wall, s | range, s | CPU, s |",
        "|---|---|---|---|",
        row("funnel and set, after imports", "outback"),
        *([row("the same, and one clip of each group", "one_of_a_group")] if "one_of_a_group" in found else []),
        row("DuckDB: the same funnel and set", "duckdb"),
        row("DuckDB: the count of the set alone", "duckdb", "count_wall", "count_cpu"),
        row("`outback curate`, the whole process", "command"),
        row("`outback --help`", "help"),
        "",
        f"Funnel and set take {statistics.median(ratios):.2f} of DuckDB's wall time for both, and "
        f"{statistics.median(counts):.2f} of its wall time for the count: medians of each round's ratio.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make the lakes, measure, print the table, and put it into the page where one is given."""
    if sys.argv[1:2] == ["--child"]:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
        print(json.dumps({"outback": time_outback, "duckdb": time_duckdb}[sys.argv[2]](*sys.argv[3:])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=1_000_000)
    parser.add_argument("--commits", type=int, default=64)
    parser.add_argument("--apart", action="store_true", help="write the last family in batches of its own")
    parser.add_argument("--duplicates", action="store_true", help="also keep one clip of each group of duplicates")
    parser.add_argument("--folder", type=Path, help="keep the lake here, or use the one that is here")
    parser.add_argument(
        "--page", type=Path, help="Markdown file whose beginning, up to its first section, this replaces"
    )
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    with tempfile.TemporaryDirectory() as scratch:
        small = make_lake(Path(scratch) / "small", 2_000, 1, apart=False, duplicates=options.duplicates).where
        folder = options.folder or Path(scratch) / "lake"
        if not folder.exists():
            make_lake(folder, options.clips, options.commits, apart=options.apart, duplicates=options.duplicates)
        found = measure(str(folder), small, Path(scratch), duplicates=options.duplicates)
        facts = Lake(folder).facts(CLIPS)
    last = found["outback"][-1]
    about = (
        f"`python benchmarks/curate.py`: {facts.num_rows:,} clips, {len(FAMILIES) * SCORES_A_FAMILY} score columns in "
        f"{len(FAMILIES)} families, {facts.num_files} files a table, {len(last['rejected'])} rules, {last['kept']:,} clips "
        f"kept; {CORES} cores, median of {ROUNDS} interleaved rounds."
    )
    text = page(found, about)
    print(text)
    if options.page:
        _, section, rest = options.page.read_text(encoding="utf-8").partition("\n## ")
        options.page.write_text(f"# Filtering again\n\n{text}{section}{rest}", encoding="utf-8")


if __name__ == "__main__":
    main()
