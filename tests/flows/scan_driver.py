"""A scan in a process of its own, which may kill itself or one of its workers at a chosen place.

    python -m tests.flows.scan_driver LAKE [--decoder NAME] [--die-before TABLE] [--timeout-s S]

`--die-before clips` sends SIGKILL to this process when workers have written files and `clips` is about to be published.
"""

import argparse
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from jobs.scan import scan
from pipeline.scan_medium import ScanConfig, ScanLimits
from schemas.catalog import Lake, WrittenFiles
from schemas.table import Table


def main() -> None:
    """Scan, or die trying."""
    parser = argparse.ArgumentParser()
    parser.add_argument("lake", type=Path)
    parser.add_argument("--decoder", default="pyav")
    parser.add_argument("--die-before")
    parser.add_argument("--timeout-s", type=float, default=60.0)
    options = parser.parse_args()
    publish = Lake.commit_files

    def commit_files(lake: Lake, table: Table, written: Sequence[WrittenFiles], run_id: str) -> int:
        if table.name == options.die_before:
            os.kill(os.getpid(), signal.SIGKILL)
        return publish(lake, table, written, run_id)

    Lake.commit_files = commit_files  # type: ignore[method-assign, assignment]  # where a real driver could die
    report = scan(
        Lake.open(options.lake), ScanConfig(decoder=options.decoder, limits=ScanLimits(timeout_s=options.timeout_s))
    )
    print(report.outcome.num_done if report.outcome else f"nothing to do, {report.num_given_up} given up")


if __name__ == "__main__":
    main()
