"""Submit: the same `outback` command, run as a Ray job on a cluster, with the code of this checkout.

The job runs in the folder the command was given in, where that folder exists on the cluster (a shared disk, or the same
machine), so paths mean there what they mean here. Third-party packages are the cluster's own: Ray ships only our code,
under a name made from its content, so the same code is uploaded once.
"""

import asyncio
import importlib.metadata
import logging
import os
import shlex
import shutil
import socket
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

from jobs.run import code_version
from schemas.errors import ConfigError, TransientError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESS_SETTINGS = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
PACKAGES = ("jobs", "model", "pipeline", "schemas", "train")
CHATTY = ("ray._private.runtime_env.packaging", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")
FORWARDED = ("OUTBACK_FILES",)
START_ONE = "start a cluster with `ray start --head` in Outback's environment, or give --address http://HEAD:8265"
CONNECT_SECONDS = 5
RECONNECTS = 5
EXIT_FAILED = 1
EXIT_CODES = range(4)  # what `outback` itself answers; anything else is how a process was ended
NOT_SUBMITTED = ("submit", "doctor")


def submit(command: Sequence[str], *, address: str | None, lake: str, follow: bool = True) -> int:
    """An `outback` command line, without the word `outback` -> the job's exit code, its log on stdout meanwhile.

    `address` is the cluster's dashboard (default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, this machine's port 8265).
    Without `follow` it prints the job's id and returns 0. Ctrl-C asks whether the job is to be stopped as well.

    Raises: ConfigError if the command cannot be submitted or no cluster answers, TransientError if the log is lost.
    """
    if command[:1] and command[0] in NOT_SUBMITTED:
        raise ConfigError(
            f"`outback {command[0]}` is for this machine; submit what reads or writes a lake, as `-- scan`"
        )
    client = connect(address)
    with shipped_code() as folder:
        job_id = client.submit_job(
            entrypoint=entrypoint(command, Path.cwd()),
            submission_id=f"outback-{command[0]}-{uuid.uuid4().hex[:8]}",
            runtime_env={"working_dir": str(folder), "env_vars": job_settings(lake, os.environ)},
            metadata={"command": shlex.join(["outback", *command])},
        )
    if not follow:
        print(job_id)
        return 0
    print(f"submitted {job_id} to {client.get_address()}", file=sys.stderr)
    try:
        asyncio.run(_print_log(client, job_id))
    except KeyboardInterrupt:
        return _interrupted(client, job_id)
    return _exit_code(client, job_id)


def connect(address: str | None) -> "JobSubmissionClient":
    """A dashboard's address, or None for the default -> a client that has reached it.

    Raises: ConfigError if nothing answers there, or if it asks for a token that is not to be found.
    """
    given = address or next((os.environ[name] for name in ADDRESS_SETTINGS if os.environ.get(name)), DEFAULT_ADDRESS)
    _require_listener(given)
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    with _address_in_environment(given):
        try:
            return JobSubmissionClient(given, headers=token_header(os.environ, Path.home()))
        except AuthenticationError as error:
            raise ConfigError(
                f"the cluster at {given} asks for a token: copy ~/.ray/auth_token from its head node to this machine, "
                f"or set RAY_AUTH_TOKEN. It said: {str(error).splitlines()[0]}"
            ) from error
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(f"no Ray dashboard answers at {given} ({error}); {START_ONE}") from error


def token_header(environment: Mapping[str, str], home: Path) -> dict[str, str]:
    """Environment -> the header that carries the cluster's token, empty without one. An open cluster ignores it.

    Ray's own client sends a token only if RAY_AUTH_MODE was set in its environment, while `ray start` needs no setting.
    """
    if environment.get("RAY_AUTH_MODE", "token").lower() != "token":
        return {}
    token = environment.get("RAY_AUTH_TOKEN")
    file = Path(environment.get("RAY_AUTH_TOKEN_PATH") or home / ".ray" / "auth_token")
    if not token and file.is_file():
        token = file.read_text(encoding="utf-8").strip()
    return {"Authorization": f"Bearer {token}"} if token else {}


def entrypoint(command: Sequence[str], folder: Path) -> str:
    """Arguments of `outback` -> the shell line that Ray runs on the cluster's head.

    Ray runs it with the head's PATH, where `python` may be one without Ray. So OUTBACK_CLUSTER_PYTHON is taken, or else
    the first of this process's interpreter and those on PATH that has Ray. The shipped code comes first on the import
    path, whatever the current folder holds.
    """
    chosen = os.environ.get("OUTBACK_CLUSTER_PYTHON")
    candidates = [chosen] if chosen else [sys.executable, "python3", "python"]
    has_ray = 'import sys, importlib.util as u; sys.exit(u.find_spec("ray") is None)'
    lines = [
        'export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"',
        f"cd {shlex.quote(str(folder))} 2>/dev/null",
        f"for python in {shlex.join(candidates)}",
        f'do "$python" -P -c {shlex.quote(has_ray)} 2>/dev/null && exec "$python" -P -m jobs.cli {shlex.join(command)}',
        "done",
        f"echo no Python with Ray among {shlex.quote(shlex.join(candidates))}: set OUTBACK_CLUSTER_PYTHON >&2",
        "exit 1",
    ]
    return "; ".join(lines)


def job_settings(lake: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The lake and the settings a job needs, as environment variables; a folder becomes absolute.

    Credentials stay at home: what a job is given can be read in the dashboard. Catalogs are configured on the cluster.
    """
    where = lake if lake.startswith("catalog:") else str(Path(lake).resolve())
    return {"OUTBACK_LAKE": where} | {name: environment[name] for name in FORWARDED if name in environment}


@contextmanager
def shipped_code() -> Iterator[Path]:
    """A folder with our packages and nothing else, gone afterwards: equal code gives equal content, uploaded once.

    The distribution's metadata travels along, its version naming the commit, as there is no git on the other side.
    """
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory(prefix="outback-code-") as name:
        folder = Path(name)
        for package in PACKAGES:
            shutil.copytree(root / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
        version = importlib.metadata.version("outback")
        info = folder / f"outback-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: outback\nVersion: {code_version()}\n", encoding="utf-8"
        )
        yield folder


async def _print_log(client: "JobSubmissionClient", job_id: str) -> None:
    """Copy the job's log to stdout until it ends; a lost connection is taken up where it broke."""
    printed = 0
    for attempt in range(RECONNECTS + 1):
        position = 0
        try:
            async for text in client.tail_job_logs(job_id):
                start = max(0, printed - position)
                position += len(text)
                if start < len(text):
                    print(text[start:], end="", flush=True)
                    printed = position
            if client.get_job_status(job_id).is_terminal():
                return
        except (RuntimeError, OSError) as error:
            if attempt == RECONNECTS:
                raise TransientError(
                    f"lost the log of {job_id} ({error}); the job may still run: `ray job logs -f {job_id}`"
                ) from error
        await asyncio.sleep(2**attempt / 4)


def _exit_code(client: "JobSubmissionClient", job_id: str) -> int:
    from ray.job_submission import JobStatus

    info = client.get_job_info(job_id)
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.status == JobStatus.STOPPED:
        print(f"{job_id} was stopped; the same command goes on where it was", file=sys.stderr)
        return EXIT_FAILED
    code = info.driver_exit_code
    if code in EXIT_CODES and code:
        return int(code)
    reason = (info.message or "no reason given").splitlines()[0]  # the lines after it repeat the log
    print(f"{job_id} ended with {info.status}, exit code {code}: {reason}", file=sys.stderr)
    return EXIT_FAILED


def _interrupted(client: "JobSubmissionClient", job_id: str) -> int:
    """After Ctrl-C: on a terminal ask, elsewhere stop, since nobody is left to ask."""
    stop = True
    if sys.stdin.isatty():
        try:
            stop = input(f"\nStop {job_id} on the cluster as well? [Y/n] ").strip().lower() not in ("n", "no")
        except (KeyboardInterrupt, EOFError):
            print(file=sys.stderr)
    if stop:
        client.stop_job(job_id)
        print(f"{job_id} is stopped; the same command goes on where it was", file=sys.stderr)
    else:
        print(f"{job_id} runs on; follow it with `ray job logs -f {job_id}`", file=sys.stderr)
    return EXIT_FAILED


def _require_listener(address: str) -> None:
    """Fail within seconds where Ray's client would wait minutes for a machine that is not there."""
    try:
        parts = urlparse(address)
        if parts.scheme not in ("http", "https"):
            return
        where = (parts.hostname or "127.0.0.1", parts.port or (443 if parts.scheme == "https" else 80))
    except ValueError as error:
        raise ConfigError(f"{address!r} is no address ({error}); expected http://HOST:8265") from error
    try:
        socket.create_connection(where, timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ConfigError(f"nothing answers at {address} ({error}); {START_ONE}") from error


@contextmanager
def _address_in_environment(address: str) -> Iterator[None]:
    """Ray's client prefers the environment to its argument; for as long as it is made, both say the same."""
    before = os.environ.get(ADDRESS_SETTINGS[0])
    os.environ[ADDRESS_SETTINGS[0]] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ[ADDRESS_SETTINGS[0]]
        else:
            os.environ[ADDRESS_SETTINGS[0]] = before
