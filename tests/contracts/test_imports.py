import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("av", "cv2", "duckdb", "pyarrow", "pyiceberg", "ray", "torch", "transformers", "vllm")
PACKAGES = ("jobs", "model", "pipeline", "schemas", "train")


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    program = (
        "import sys; from importlinter.cli import lint_imports as run; sys.exit(run(no_logo=True, cache_dir=None))"
    )
    return subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)


def test_imports_run_one_way(checkout: Path) -> None:
    found = lint_imports(checkout)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize(
    ("importer", "imported", "broken"),
    [
        ("train", "model", False),
        ("jobs", "pipeline", False),
        ("pipeline", "model", True),
        ("train", "pipeline", True),
        ("schemas", "jobs", True),
        ("model", "ray", True),
        ("jobs", "pyiceberg", True),
        ("schemas", "torch", True),
    ],
)
def test_the_contracts_see_a_wrong_import(
    tmp_path: Path, checkout: Path, importer: str, imported: str, broken: bool
) -> None:
    shutil.copy(checkout / "pyproject.toml", tmp_path)
    for package in PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / importer / "door.py").write_text(f"import {imported}\n")
    found = lint_imports(tmp_path)
    assert (found.returncode != 0) == broken, found.stdout + found.stderr


def test_the_command_line_imports_nothing_heavy() -> None:
    """`outback --help` answers at once because of this."""
    program = "import sys, json, jobs.cli; print(json.dumps(sorted(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(json.loads(found.stdout.splitlines()[-1]))
    assert not loaded & set(HEAVY)
