"""A training whose workers, driver and whole group are killed again and again ends as if nothing had happened."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.flows.train_driver import STEPS, make
from tests.train.small_runs import run, run_workers
from train.loop import TrainingFolder
from train.pretrain import PretrainObjective
from train.progress import read_losses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
NUM_KILLS = 10


def _train(rank: int, folder: Path) -> None:
    place = folder / f"data-{rank}"
    place.mkdir()
    run(make(place, PretrainObjective), folder / "whole")


class _Driver:
    """The training in a session of its own, started anew whenever its driver is gone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.starts = 0
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "tests.flows.train_driver", str(self._folder)]
        self._process = subprocess.Popen(command, cwd=Path(__file__).parents[2], start_new_session=True)
        self.starts += 1

    def workers(self) -> list[psutil.Process]:
        """Processes that train: all that Ray started for it and that hold a network."""
        return [process for process in self._tree() if "TrainWorker" in " ".join(_command(process))]

    def kill(self, what: str) -> None:
        victims = {"driver": [psutil.Process(self._process.pid)], "group": self._tree()}.get(what)
        for victim in victims if victims is not None else [random.Random(self.starts).choice(self.workers())]:
            _kill(victim)

    def is_running(self) -> bool:
        return self._process.poll() is None

    def end(self) -> int:
        return self._process.wait(300)

    def clear(self) -> None:
        """What a dead driver left, which goes by itself, but not at once."""
        deadline = time.monotonic() + 60
        while self._leftovers() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not self._leftovers(), "workers outlived their driver"

    def _tree(self) -> list[psutil.Process]:
        try:
            root = psutil.Process(self._process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _leftovers(self) -> list[psutil.Process]:
        holder = TrainingFolder(self._folder / "run").lock
        pid = int(holder.read_text().split()[1]) if holder.exists() and holder.read_text().split() else 0
        return [psutil.Process(pid)] if pid and psutil.pid_exists(pid) else []


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def _kill(process: psutil.Process) -> None:
    try:
        process.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return


def _wait_for(is_so: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_ten_kills_change_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("t")
    run_workers(2, folder, _train)
    whole, parts = TrainingFolder(folder / "whole"), TrainingFolder(folder / "run")
    chance = random.Random(int.from_bytes(os.urandom(4)))
    driver = _Driver(folder)
    plan: list[tuple[str, int]] = []

    def step() -> int:
        lines: list[dict[str, Any]] = read_losses(parts.progress)
        return int(lines[-1]["step"]) if lines else 0

    def stands_beyond(target: int) -> bool:
        return step() > target

    def goes_on_from(killed_at: int) -> bool:
        # It may have been a checkpoint further when it died, and go on from there.
        return step() < killed_at or step() > min(killed_at + 10, STEPS - 1)

    for number in range(NUM_KILLS):
        victim = ("worker", "driver", "group")[number % 3]
        first = step()
        at = min(STEPS - 10, max(first, STEPS * number // NUM_KILLS) + chance.randint(1, STEPS // NUM_KILLS - 3))
        _wait_for(partial(stands_beyond, at - 1))
        plan.append((victim, at))
        driver.kill(victim)
        if victim == "worker":
            _wait_for(partial(goes_on_from, at))
        else:
            driver.end()
            driver.clear()
            driver.start()
    assert driver.end() == 0
    assert read_losses(parts.progress) == read_losses(whole.progress), plan
    expected, found = ((one.weights / "model.safetensors").read_bytes() for one in (whole, parts))
    assert found == expected, plan
    assert [path.name for path in parts.checkpoints.glob(".*")] == []
