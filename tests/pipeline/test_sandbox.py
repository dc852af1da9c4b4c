"""Whatever a call does to its process, the caller gets a result or a reason, and the next call works."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipeline.sandbox import Sandbox
from schemas.errors import ConfigError, RowError
from tests.pipeline import hanging

ROOT = Path(__file__).parents[2]


def double(value: int) -> int:
    return 2 * value


def child_pid() -> int:
    return os.getpid()


def crash() -> None:
    ctypes.string_at(0)


def leave(code: int) -> None:
    os._exit(code)


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def take(megabytes: int, for_s: float = 0.0) -> int:
    held = np.ones(megabytes << 20, np.uint8)
    time.sleep(for_s)
    return int(held[-1])


def fail_as_row() -> None:
    raise RowError("Unreadable", "a.mp4 is broken", terminal=False)


def fail_as_config() -> None:
    raise ConfigError("no such decoder")


def fail_as_bug() -> None:
    raise ZeroDivisionError("by nothing")


def babble() -> str:
    print("noise on stdout", flush=True)
    os.write(1, b"noise on the descriptor\n")
    os.write(2, b"noise on stderr\n")
    return "result"


def num_cv2_threads() -> int:
    import cv2

    return int(cv2.getNumThreads())


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(timeout_s=120, memory_mb=2000) as sandbox:
        yield sandbox


def reason(sandbox: Sandbox, function: object, *args: object) -> str:
    with pytest.raises(RowError) as caught:
        sandbox.run(function, *args)  # type: ignore[arg-type]  # any of the functions above
    return caught.value.reason


def test_results_come_back_from_one_lasting_child(sandbox: Sandbox) -> None:
    assert sandbox.run(double, 21) == 42
    first = sandbox.run(child_pid)
    assert first != os.getpid()
    assert sandbox.run(child_pid) == first


def test_errors_come_back_with_their_reason(sandbox: Sandbox) -> None:
    with pytest.raises(RowError) as caught:
        sandbox.run(fail_as_row)
    assert (caught.value.reason, caught.value.message, caught.value.terminal) == (
        "Unreadable",
        "a.mp4 is broken",
        False,
    )
    assert reason(sandbox, fail_as_bug) == "ZeroDivisionError"
    with pytest.raises(ConfigError, match="no such decoder"):
        sandbox.run(fail_as_config)
    assert sandbox.run(double, 1) == 2


def test_a_crash_is_named_by_its_signal(sandbox: Sandbox) -> None:
    with pytest.raises(RowError, match="SIGSEGV") as caught:
        sandbox.run(crash)
    assert caught.value.reason == "DecoderCrashed"
    assert sandbox.run(double, 2) == 4


def test_whom_the_machine_kills_may_try_again(sandbox: Sandbox) -> None:
    with pytest.raises(RowError, match="SIGKILL") as killed:
        sandbox.run(be_killed)
    with pytest.raises(RowError) as crashed:
        sandbox.run(crash)
    assert (killed.value.terminal, crashed.value.terminal) == (False, True)


def test_an_exit_is_a_crash_too(sandbox: Sandbox) -> None:
    with pytest.raises(RowError, match="exit code 3") as caught:
        sandbox.run(leave, 3)
    assert caught.value.reason == "DecoderCrashed"


@pytest.mark.parametrize("function", [hanging.hang, hanging.hang_in_native_code])
def test_what_hangs_is_stopped(function: object, tmp_path: Path) -> None:
    with Sandbox(timeout_s=4, memory_mb=2000) as sandbox:
        sandbox.run(hanging.come_back, str(tmp_path / "before"))
        assert reason(sandbox, function, str(tmp_path / "hung")) == "DecodeTimeout"
        assert (tmp_path / "hung").exists()
        sandbox.run(hanging.come_back, str(tmp_path / "after"))
        assert (tmp_path / "after").exists()


def test_what_takes_too_much_memory_is_stopped() -> None:
    with Sandbox(timeout_s=120, memory_mb=500) as sandbox:
        assert sandbox.run(take, 50) == 1
        assert reason(sandbox, take, 900, hanging.FOREVER_S) == "MemoryLimit"
        assert sandbox.run(take, 50) == 1


def test_noise_does_not_reach_the_results(sandbox: Sandbox, capfd: pytest.CaptureFixture[str]) -> None:
    assert sandbox.run(babble) == "result"
    assert capfd.readouterr() == ("", "")


def test_libraries_use_one_thread(sandbox: Sandbox) -> None:
    assert sandbox.run(num_cv2_threads) == 1


def test_closing_ends_the_child(sandbox: Sandbox) -> None:
    child = sandbox.run(child_pid)
    sandbox.close()
    assert not psutil.pid_exists(child)


@pytest.mark.parametrize("function", ["hang", "hang_in_native_code", "come_back"])
def test_the_child_dies_with_its_parent(function: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    script = (
        "import sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from pipeline.sandbox import Sandbox\n"
        "from tests.pipeline import hanging, test_sandbox\n"
        "sandbox = Sandbox(600, 2000)\n"
        "print(sandbox.run(test_sandbox.child_pid), flush=True)\n"
        f"sandbox.run(hanging.{function}, {str(mark)!r})\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    wait_for(mark.exists, "the call did not begin")
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    wait_for(lambda: is_gone(child), "the child outlived its parent")


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_for(happened: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.05)


def test_a_sandbox_can_be_sent_elsewhere() -> None:
    import pickle

    with Sandbox(timeout_s=120, memory_mb=2000) as sandbox:
        sandbox.run(double, 1)
        with pickle.loads(pickle.dumps(sandbox)) as copy:
            assert copy.run(child_pid) != sandbox.run(child_pid)
