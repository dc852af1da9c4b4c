"""What no file of the project may hold. Judged on what git tracks or would track."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import CHECKOUT

HOSTS = ("pypi" + ".org", "python" + "hosted.org", "download.pytorch" + ".org", "anaconda" + ".org", "ghcr" + ".io")
LOCAL_PATH = re.compile(r"(?<![\w.:/-])/(?:work|root|home|Users|mnt)/\w[\w./-]*")
NOT_LOCAL = ("/home/you",)  # the stranger of the docs
BYTES = {".png", ".jpg", ".jpeg", ".gif", ".mp4", ".webm", ".pdf", ".parquet", ".safetensors", ".npz"}


def tracked() -> list[Path]:
    command = ["git", "-C", str(CHECKOUT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    found = subprocess.run(command, capture_output=True, check=False)
    if found.returncode:
        pytest.skip("no git checkout: nothing says which files belong to the project")
    files = [CHECKOUT / name for name in found.stdout.decode().split("\0") if name]
    return [file for file in files if file.is_file()]


def text_files() -> list[tuple[Path, str]]:
    texts = [file for file in tracked() if file.suffix not in BYTES and file.name != "LICENSE"]
    assert len(texts) > 50
    return [(file.relative_to(CHECKOUT), file.read_text(encoding="utf-8")) for file in texts]


def python_files() -> list[tuple[Path, str]]:
    return [(path, text) for path, text in text_files() if path.suffix == ".py"]


def test_no_file_names_a_package_registry() -> None:
    found = [f"{path}: {host}" for path, text in text_files() for host in HOSTS if host in text]
    assert not found, "where packages come from is the installing machine's business"


def local_paths(text: str) -> list[str]:
    return [path for path in LOCAL_PATH.findall(text) if not path.startswith(NOT_LOCAL)]


def test_no_file_names_a_path_of_one_machine() -> None:
    assert not {str(path): found for path, text in text_files() if (found := local_paths(text))}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("--lake /ro" + "ot/lake", True),
        ("open('/ho" + "me/ann/x.py')", True),
        ("/home/you/lake", False),
        ("tests/ro" + "ot/x", False),
        ("s3://bucket/work/x", False),
    ],
)
def test_local_paths_are_told_from_others(text: str, found: bool) -> None:
    assert bool(local_paths(text)) == found


def test_no_file_has_the_name_of_a_standard_library_module() -> None:
    """Run as a script, `jobs/tokenize.py` would be what Python's own `inspect` imports."""
    taken = [
        str(path) for path, _ in python_files() if path.stem in sys.stdlib_module_names and path.stem != "__main__"
    ]
    assert not taken


def unsafe_loads(source: str) -> list[int]:
    """Line numbers of `torch.load` calls that would unpickle whatever a file says."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            lines += [] if safe else [node.lineno]
    return lines


def test_weights_are_never_unpickled() -> None:
    assert not {str(path): lines for path, source in python_files() if (lines := unsafe_loads(source))}


def test_an_unsafe_load_is_seen() -> None:
    assert unsafe_loads("import torch\ntorch.load(f)\ntorch.load(f, weights_only=True)\n") == [2]
    assert unsafe_loads("torch.load(f, weights_only=False)") == [1]


def test_package_folders_hold_no_code_in_init() -> None:
    for path, source in python_files():
        if path.name == "__init__.py":
            body = ast.parse(source).body
            assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body), path
