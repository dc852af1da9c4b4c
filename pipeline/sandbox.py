"""A child process in which media are opened, with a time and a memory limit: what hangs, leaks or crashes a decoder
costs one item, never the worker.

The child is a fresh interpreter, started at the first call and reused until it dies or is killed. Calls and results
travel over a socket of their own, so nothing that a library prints can get between them. The child dies with its
parent: the kernel signals it when the parent's end of a pipe closes, even in the middle of native code.
"""

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import ParamSpec, Self, TypeVar

from schemas.errors import OutbackError, RowError, TransientError

P = ParamSpec("P")
T = TypeVar("T")

POLL_S = 0.02
START_TIMEOUT_S = 300.0  # a fresh interpreter on a machine under load
MEGABYTE = 1 << 20
QUIET = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OPENCV_LOG_LEVEL": "OFF",
    "OPENCV_FFMPEG_LOGLEVEL": "-8",
    "GLOG_minloglevel": "3",
}


class Sandbox:
    """Runs calls in a child process, one at a time. Not safe to share between threads.

    `memory_mb` bounds the resident memory of the child. It is watched, not reserved by the kernel: native libraries
    map far more address space than they touch, and fail in odd ways when that is bounded.
    """

    def __init__(self, timeout_s: float, memory_mb: int) -> None:
        self._timeout_s = timeout_s
        self._memory_mb = memory_mb
        self._child: subprocess.Popen[bytes] | None = None
        self._channel: Connection | None = None
        self._lifeline: int | None = None

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Calls `function`, which must be importable by name, in the child -> its result.

        Raises: RowError with the reason of a RowError raised in the child, DecodeTimeout, DecoderCrashed, MemoryLimit,
            or the class name of any other exception; other errors of our own as they are.
        """
        call = pickle.dumps((function, args, kwargs))
        channel = self._started()
        try:
            channel.send_bytes(call)
            answer = self._awaited(channel, getattr(function, "__name__", "the call"))
        except (BrokenPipeError, ConnectionResetError, EOFError):
            raise self._post_mortem() from None
        except BaseException:
            self.close()  # a half-done call would answer the next one
            raise
        ok, value = pickle.loads(answer)
        if ok:
            result: T = value
            return result
        raise value

    def _awaited(self, channel: Connection, name: str) -> bytes:
        deadline = time.monotonic() + self._timeout_s
        while not channel.poll(POLL_S):
            resident_mb = self._resident_mb()
            if resident_mb > self._memory_mb:
                raise RowError("MemoryLimit", f"{name} took {resident_mb} MB; the limit is {self._memory_mb} MB")
            if time.monotonic() > deadline:
                raise RowError("DecodeTimeout", f"{name} was stopped after {self._timeout_s:g} s")
        return channel.recv_bytes()

    def _resident_mb(self) -> int:
        import psutil

        try:
            return int(psutil.Process(self._running().pid).memory_info().rss) // MEGABYTE
        except psutil.Error:
            return 0  # it has just died: the closed channel says so next

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._child is None:
            raise RuntimeError("the sandbox has no child")
        return self._child

    def _started(self) -> Connection:
        if self._channel is not None and self._child is not None and self._child.poll() is None:
            return self._channel
        self.close()
        ours, theirs = socket.socketpair()
        hangup, self._lifeline = os.pipe()
        paths = [os.path.abspath(entry) for entry in sys.path]
        self._child = subprocess.Popen(
            [sys.executable, "-m", "pipeline.sandbox", str(theirs.fileno()), str(hangup)],
            pass_fds=(theirs.fileno(), hangup),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **QUIET, "PYTHONPATH": os.pathsep.join(paths)},
        )
        os.close(hangup)
        theirs.close()
        self._channel = Connection(ours.detach())
        self._greet(self._channel)
        return self._channel

    def _greet(self, channel: Connection) -> None:
        try:
            if channel.poll(START_TIMEOUT_S) and channel.recv_bytes() == b"ready":
                return
        except (EOFError, ConnectionResetError):
            pass  # it died while starting: told below
        self.close()
        raise TransientError(f"the sandbox process did not start within {START_TIMEOUT_S:g} s")

    def _post_mortem(self) -> RowError:
        """What the end of the child means for the item it was working on."""
        status = self._running().wait()
        self.close()
        if status >= 0:
            return RowError("DecoderCrashed", f"the process that decoded ended with exit code {status}")
        name = signal.Signals(-status).name
        by_others = -status in (signal.SIGKILL, signal.SIGTERM)  # no decoder does that: a machine short of memory does
        return RowError("DecoderCrashed", f"the process that decoded was ended by {name}", terminal=not by_others)

    def close(self) -> None:
        """Ends the child at once. The next call starts another."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
        if self._channel is not None:
            self._channel.close()
        if self._lifeline is not None:
            os.close(self._lifeline)
        self._child = self._channel = self._lifeline = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> tuple[object, ...]:
        return (Sandbox, (self._timeout_s, self._memory_mb))


class SandboxPool:
    """Sandboxes that threads share: each call takes an idle one, or waits for one."""

    def __init__(self, size: int, timeout_s: float, memory_mb: int) -> None:
        self._idle: SimpleQueue[Sandbox] = SimpleQueue()
        for _ in range(size):
            self._idle.put(Sandbox(timeout_s, memory_mb))

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """See `Sandbox.run`."""
        sandbox = self._idle.get()
        try:
            return sandbox.run(function, *args, **kwargs)
        finally:
            self._idle.put(sandbox)

    def close(self) -> None:
        """Ends the children that are idle at once. The next call starts another."""
        for _ in range(self._idle.qsize()):
            sandbox = self._idle.get()
            sandbox.close()
            self._idle.put(sandbox)


def serve(channel: Connection) -> None:
    """Answers calls until the parent hangs up. The child's main loop."""
    channel.send_bytes(b"ready")
    while True:
        try:
            call = channel.recv_bytes()
        except (EOFError, ConnectionResetError):
            return
        channel.send_bytes(_answer(call))


def _answer(call: bytes) -> bytes:
    try:
        function, args, kwargs = pickle.loads(call)
        return pickle.dumps((True, function(*args, **kwargs)))
    except OutbackError as error:
        return pickle.dumps((False, error))
    except MemoryError as error:
        return pickle.dumps((False, RowError("MemoryLimit", f"out of memory: {error}")))
    except OSError as error:
        # With a number it is the system that speaks (no such file, no such host): a store may be back tomorrow.
        return pickle.dumps((False, RowError(type(error).__name__, str(error), terminal=error.errno is None)))
    except Exception as error:  # whatever a library raises on a bad file is that file's reason
        return pickle.dumps((False, RowError(type(error).__name__, str(error))))


def die_with_parent(lifeline: int) -> None:
    """Makes the kernel end this process when the parent's end of `lifeline` closes.

    PR_SET_PDEATHSIG would fire when the parent's thread ends, and a worker's threads come and go. SIGIO ends a process
    by default, and reaches one that is stuck in native code.
    """
    import fcntl

    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)


def _quiet_libraries() -> None:
    import cv2

    cv2.setNumThreads(1)


def main() -> None:
    """Entry of the child: `python -m pipeline.sandbox CHANNEL_FD LIFELINE_FD`."""
    channel_fd, lifeline = (int(argument) for argument in sys.argv[1:3])
    die_with_parent(lifeline)
    _quiet_libraries()
    serve(Connection(channel_fd))


if __name__ == "__main__":
    main()
