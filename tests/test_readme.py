"""The README's commands, run as printed and in order, on the lake of a small demo."""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import CHECKOUT, DEMO_SECONDS, Demo
from tests.jobs.test_submit import kill_processes_of

README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
BLOCK_SECONDS = 600
BIN = Path(sys.executable).parent


def test_there_are_commands_to_run() -> None:
    assert len(BLOCKS) >= 5
    assert "source .venv/bin/activate" in BLOCKS[0]


def test_every_make_target_it_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (CHECKOUT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"make ([a-z-]+)", README)) | {"lint", "type", "test", "test-slow", "docs", "lock", "hooks"}
    assert named <= targets


def test_every_file_it_links_to_exists() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert [link for link in links if not (CHECKOUT / link).exists()] == []


@pytest.fixture(scope="module")
def readers_checkout(smoke_demo: Demo) -> Iterator[Path]:
    """A checkout as the README's reader has it, after a small `make demo`, in a shell that has a Ray of its own.

    `ray` on its PATH starts its cluster on free ports and stops only that one, so that the README's commands leave
    other clusters of the machine alone.
    """
    folder = Path(tempfile.mkdtemp(prefix="ob-"))  # Ray's socket paths must stay short
    for name in ("jobs", "model", "pipeline", "schemas", "train", "lock", "docs", "pyproject.toml", "README.md"):
        (folder / name).symlink_to(CHECKOUT / name)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").write_text(f'export PATH="{folder}/bin:{BIN}:$PATH"\n')
    write_ray(folder)
    (folder / "demo").symlink_to(smoke_demo.folder)
    yield folder
    kill_processes_of(folder / "r")
    shutil.rmtree(folder, ignore_errors=True)


def environment(folder: Path) -> dict[str, str]:
    """The reader's shell: no settings of the developer's, and a home of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "OUTBACK_"))}
    return kept | {"HOME": str(folder / "home"), "PYTHONPATH": str(CHECKOUT)}


def write_ray(folder: Path) -> None:
    ports = [free_port() for _ in range(3)]
    options = f"--port={ports[0]} --dashboard-port={ports[1]} --dashboard-agent-listen-port={ports[2]}"
    program = f"""#!/bin/bash
case "$1" in
  start) exec "{BIN}/ray" "$@" {options} --temp-dir="{folder}/r" --num-cpus=2 --disable-usage-stats ;;
  stop) exec "{sys.executable}" -c 'from pathlib import Path; from tests.jobs.test_submit import kill_processes_of
kill_processes_of(Path("{folder}/r"))' ;;
esac
exit 2
"""
    (folder / "bin").mkdir()
    (folder / "home").mkdir()
    (folder / "bin" / "ray").write_text(program)
    (folder / "bin" / "ray").chmod(0o755)
    activate = folder / ".venv" / "bin" / "activate"
    activate.write_text(activate.read_text() + f"export RAY_API_SERVER_ADDRESS=http://127.0.0.1:{ports[1]}\n")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.slow
@pytest.mark.timeout(DEMO_SECONDS + BLOCK_SECONDS * len(BLOCKS))
def test_the_commands_work_as_printed(readers_checkout: Path) -> None:
    """Each block in a shell of its own that has seen the first one, as a reader's terminal has."""
    for block in BLOCKS:
        script = f"set -eo pipefail\n{BLOCKS[0]}\n{block}"
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=readers_checkout,
            env=environment(readers_checkout),
            capture_output=True,
            text=True,
            timeout=BLOCK_SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
