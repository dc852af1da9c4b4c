import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.job_submission import JobStatus

from jobs.submit import (
    PACKAGES,
    _exit_code,
    _interrupted,
    _print_log,
    connect,
    entrypoint,
    job_settings,
    shipped_code,
    submit,
    token_header,
)
from schemas.errors import ConfigError
from tests.conftest import CHECKOUT

ARGUMENTS = ["sql", "select 'it''s; $HOME `x`' as a, \"b\"", "--at", "état 1", "*.toml"]


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    """A folder as Ray unpacks it, whose `jobs.cli` says how it was called."""
    package = tmp_path / "shipped" / "jobs"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    answer = "import json, os, sys; print(json.dumps([sys.argv[1:], os.getcwd(), __file__, sys.executable]))"
    (package / "cli.py").write_text(answer)
    return package.parent


def run_in(folder: Path, line: str) -> subprocess.CompletedProcess[str]:
    """As Ray's job supervisor does: a shell, in the folder of the shipped code."""
    return subprocess.run(line, shell=True, cwd=folder, capture_output=True, text=True, check=False)


def test_the_shell_line_runs_the_shipped_code_with_these_arguments_in_the_callers_folder(
    shipped: Path, tmp_path: Path
) -> None:
    caller = tmp_path / "the caller's folder"
    (caller / "jobs").mkdir(parents=True)
    (caller / "jobs" / "cli.py").write_text("raise SystemExit('the code of the current folder ran')")
    found = run_in(shipped, entrypoint(ARGUMENTS, caller))
    arguments, folder, code, python = json.loads(found.stdout)
    assert arguments == ARGUMENTS
    assert Path(folder) == caller
    assert Path(code) == shipped / "jobs" / "cli.py"
    assert python == sys.executable


def test_the_shell_line_stays_in_the_shipped_folder_where_the_callers_does_not_exist(shipped: Path) -> None:
    found = run_in(shipped, entrypoint(["scan"], Path("/no/such/folder")))
    assert json.loads(found.stdout)[:2] == [["scan"], str(shipped)]


def test_a_cluster_without_ray_says_what_to_set(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTBACK_CLUSTER_PYTHON", "/no/such/python")
    found = run_in(shipped, entrypoint(["scan"], shipped))
    assert found.returncode == 1
    assert "/no/such/python" in found.stderr
    assert "OUTBACK_CLUSTER_PYTHON" in found.stderr


def test_shipped_code_is_our_packages_and_can_be_imported() -> None:
    with shipped_code() as folder:
        packages = {path.name for path in folder.iterdir() if not path.name.endswith(".dist-info")}
        assert packages == set(PACKAGES)
        assert not list(folder.rglob("__pycache__"))
        program = (
            "import importlib.metadata as m, jobs.cli, jobs.shipped; print(jobs.cli.__file__, m.version('outback'))"
        )
        command = [sys.executable, "-P", "-c", program]
        found = subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)}, capture_output=True)
        file, version = found.stdout.decode().split()
        assert Path(file).is_relative_to(folder)
        assert version.startswith("0.")
        assert list((folder / "jobs" / "recipes").glob("*.toml"))
    assert not folder.exists()


@pytest.mark.parametrize("lake", ["lake", "./lake", "/data/lake"])
def test_a_folder_lake_is_named_absolutely(lake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert job_settings(lake, {}) == {"OUTBACK_LAKE": str((tmp_path / lake).resolve())}


def test_a_catalog_stays_a_catalog_and_credentials_stay_at_home() -> None:
    environment = {"OUTBACK_FILES": "/data/files", "PYICEBERG_CATALOG__PROD__TOKEN": "secret"}
    assert job_settings("catalog:prod", environment) == {"OUTBACK_LAKE": "catalog:prod", "OUTBACK_FILES": "/data/files"}


def test_the_token_comes_from_the_environment_then_a_file_then_the_default_file(tmp_path: Path) -> None:
    other = tmp_path / "token"
    other.write_text("from-file\n")
    (tmp_path / ".ray").mkdir()
    assert token_header({}, tmp_path) == {}
    (tmp_path / ".ray" / "auth_token").write_text("by-default")
    assert token_header({}, tmp_path) == {"Authorization": "Bearer by-default"}
    assert token_header({"RAY_AUTH_TOKEN_PATH": str(other)}, tmp_path) == {"Authorization": "Bearer from-file"}
    assert token_header({"RAY_AUTH_TOKEN": "direct", "RAY_AUTH_TOKEN_PATH": str(other)}, tmp_path) == {
        "Authorization": "Bearer direct"
    }
    assert token_header({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "direct"}, tmp_path) == {}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_no_cluster_is_an_error_that_says_how_to_start_one() -> None:
    with pytest.raises(ConfigError, match="ray start --head"):
        connect(f"http://127.0.0.1:{free_port()}")


def test_the_environment_names_the_cluster_when_no_address_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{port}")
    with pytest.raises(ConfigError, match=str(port)):
        connect(None)


def test_a_submission_cannot_be_submitted() -> None:
    with pytest.raises(ConfigError, match="submit"):
        submit(["submit", "--", "scan"], address=None, lake="lake")


class FakeClient:
    """A job server whose job ended as told, and whose log connection breaks as often as told."""

    def __init__(self, status: str, exit_code: int | None = None, breaks: int = 0) -> None:
        self.status, self.exit_code, self.breaks = JobStatus(status), exit_code, breaks
        self.stopped: list[str] = []

    def get_job_status(self, _: str) -> JobStatus:
        return self.status

    def get_job_info(self, _: str) -> SimpleNamespace:
        return SimpleNamespace(status=self.status, driver_exit_code=self.exit_code, message="why\nlog")

    def stop_job(self, job_id: str) -> bool:
        self.stopped.append(job_id)
        return True

    async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
        yield "one\ntw"
        if self.breaks:
            self.breaks -= 1
            raise RuntimeError("connection closed")
        yield "o\n"


@pytest.mark.parametrize(
    ("status", "exit_code", "answer"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 2, 2),
        ("FAILED", 3, 3),
        ("FAILED", -9, 1),
        ("FAILED", None, 1),
        ("STOPPED", 0, 1),
    ],
)
def test_the_jobs_exit_code_is_ours(status: str, exit_code: int | None, answer: int) -> None:
    assert _exit_code(cast(Any, FakeClient(status, exit_code)), "job") == answer


@pytest.mark.parametrize("breaks", [0, 1, 2])
def test_a_log_that_breaks_off_is_printed_once(breaks: int, capsys: pytest.CaptureFixture[str]) -> None:
    asyncio.run(_print_log(cast(Any, FakeClient("SUCCEEDED", breaks=breaks)), "job"))
    assert capsys.readouterr().out == "one\ntwo\n"


@pytest.mark.parametrize(("answer", "stopped"), [("", ["job"]), ("y", ["job"]), ("n", []), (None, ["job"])])
def test_an_interrupted_submission_asks_on_a_terminal_and_stops_the_job_elsewhere(
    answer: str | None, stopped: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: answer is not None))
    monkeypatch.setattr("builtins.input", lambda _: answer)
    client = FakeClient("RUNNING")
    assert _interrupted(cast(Any, client), "job") == 1
    assert client.stopped == stopped


# --- on a real cluster ---


@dataclass(frozen=True)
class Cluster:
    """A cluster of one machine, with its own home, so that its token is not the developer's."""

    address: str
    home: Path
    environment: dict[str, str]

    def outback(self, *arguments: str, cwd: Path, home: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run the command line against the cluster."""
        command = [sys.executable, "-m", "jobs.cli", *arguments]
        environment = self.environment | {"HOME": str(home or self.home), "PYTHONPATH": str(CHECKOUT)}
        return subprocess.run(
            command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=240, check=False
        )


def start_cluster(home: Path, auth_mode: str | None) -> Cluster:
    """`ray start --head` on free ports, as an administrator would type it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(home)} | ({"RAY_AUTH_MODE": auth_mode} if auth_mode else {})
    port, dashboard = free_port(), free_port()
    ray = str(Path(sys.executable).parent / "ray")
    options = [f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}"]
    options += [f"--temp-dir={home}/r", "--num-cpus=2", "--disable-usage-stats", "--object-store-memory=200000000"]
    subprocess.run([ray, "start", "--head", *options], env=environment, check=True, capture_output=True, timeout=120)
    return Cluster(f"http://127.0.0.1:{dashboard}", home, environment)


def kill_processes_of(folder: Path) -> None:
    """End the processes of one cluster and of no other: those whose command line names its folder."""
    mark = str(folder).encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (process / "cmdline").read_bytes() and int(process.name) != os.getpid():
                os.kill(int(process.name), signal.SIGKILL)


@pytest.fixture(scope="module", params=[None, "disabled"], ids=["token", "open"])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    home = Path(tempfile.mkdtemp(prefix="ob-"))  # Ray's socket paths must stay short
    if request.param is None:
        subprocess.run(
            [str(Path(sys.executable).parent / "ray"), "get-auth-token", "--generate"],
            env=os.environ | {"HOME": str(home)},
            check=True,
            capture_output=True,
        )
    running = start_cluster(home, request.param)
    yield running
    kill_processes_of(home / "r")
    shutil.rmtree(home, ignore_errors=True)


@pytest.mark.cluster
def test_commands_run_on_the_cluster_and_their_logs_and_exit_codes_come_back(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "lines.txt").write_text("A red ball.\n")
    (tmp_path / "texts" / "broken.mp4").write_bytes(b"no video")

    def submitted(*command: str) -> subprocess.CompletedProcess[str]:
        return cluster.outback("submit", "--address", cluster.address, "--lake", "lake", "--", *command, cwd=tmp_path)

    missing = submitted("scan")
    assert missing.returncode == 2, missing.stdout + missing.stderr
    assert "there is no lake" in missing.stdout
    ingested = submitted("ingest", "texts", "--strict")  # a relative path, and one file that is no medium
    assert ingested.returncode == 3, ingested.stdout + ingested.stderr
    assert (tmp_path / "lake" / "catalog.db").exists()
    scanned = submitted("scan")
    assert scanned.returncode == 0, scanned.stdout + scanned.stderr
    assert "scan" in scanned.stdout


@pytest.mark.cluster
def test_without_the_token_the_cluster_refuses_and_we_say_what_to_do(cluster: Cluster, tmp_path: Path) -> None:
    if cluster.environment.get("RAY_AUTH_MODE") == "disabled":
        pytest.skip("an open cluster asks for no token")
    refused = cluster.outback("submit", "--address", cluster.address, "--", "scan", cwd=tmp_path, home=tmp_path)
    assert refused.returncode == 2
    assert "auth_token" in refused.stderr
