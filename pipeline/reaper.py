"""Ends the processes that a library started, when the process it started them for is gone.

A worker that is killed cannot end its children, and a library's own children may not notice: an engine core would go on
holding a GPU's memory that the worker's successor needs. The reaper is a process beside the worker. It remembers the
worker's descendants and, when the kernel closes the worker's end of a pipe, kills those that are left.
"""

import contextlib
import os
import select
import subprocess
import sys

import psutil

POLL_S = 1.0


class Reaper:
    """Watches over this process's descendants from the moment it is made. `close` leaves them alone."""

    def __init__(self) -> None:
        theirs, self._lifeline = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.reaper", str(os.getpid()), str(theirs)],
            pass_fds=(theirs,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path)},
            start_new_session=True,  # what kills the worker's whole group must not kill the reaper
        )
        os.close(theirs)

    def close(self) -> None:
        """Ends the watch: the worker ends its children itself."""
        os.write(self._lifeline, b"done")
        os.close(self._lifeline)
        self._process.wait()


def watch(pid: int, lifeline: int) -> None:
    """Remember the descendants of `pid` until the pipe says that it is done or gone; in the second case kill them."""
    found: set[psutil.Process] = set()  # equal only with the same time of creation, so a reused pid is another process
    while not select.select([lifeline], [], [], POLL_S)[0]:
        found |= _descendants(pid)
    if os.read(lifeline, 1):
        return
    for process in list(found):
        found |= _descendants(process.pid)
    for process in found:
        if process.pid != os.getpid():
            with contextlib.suppress(psutil.NoSuchProcess):  # ended by itself
                process.kill()


def _descendants(pid: int) -> set[psutil.Process]:
    try:
        return set(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


if __name__ == "__main__":
    watch(int(sys.argv[1]), int(sys.argv[2]))
