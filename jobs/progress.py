"""Progress for people: a bar on a terminal, plain lines with counts otherwise. Always on stderr."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

Advance = Callable[[int, int, str], None]
"""Called with (done, total, note): how far the work is, and what to say beside it."""

PLAIN_INTERVAL_S = 10.0


@contextlib.contextmanager
def progress(title: str) -> Iterator[Advance]:
    """A function to report progress with, while the block runs. What Ray prints meanwhile, such as the death of a worker
    that it replaces, goes to stderr too: stdout is for answers.
    """
    with contextlib.redirect_stdout(sys.stderr), _bar(title) if sys.stderr.isatty() else _lines(title) as advance:
        yield advance


@contextlib.contextmanager
def _bar(title: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None, note="")

        def advance(done: int, total: int, note: str) -> None:
            bar.update(task, completed=done, total=total, note=note)

        yield advance


@contextlib.contextmanager
def _lines(title: str) -> Iterator[Advance]:
    last = [time.monotonic() - PLAIN_INTERVAL_S]
    said = [""]

    def advance(done: int, total: int, note: str) -> None:
        line = f"{title}: {done}/{total} {note}".rstrip()
        if line != said[0] and (done >= total or time.monotonic() - last[0] >= PLAIN_INTERVAL_S):
            print(line, file=sys.stderr, flush=True)
            last[0], said[0] = time.monotonic(), line

    yield advance
