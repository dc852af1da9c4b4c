"""The program as people call it: mistakes end in one line and an exit code, never in a traceback."""

import sys
from pathlib import Path

import pytest

from jobs import cli

SURROGATE = "a \udcff circle"


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["outback", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["show", "tables", "--lake", "{folder}/nothing"], 2, "there is no lake"),
        (
            ["score", "caption", "x", "--set", "failures.max_ratio=2", "--lake", "{folder}/lake"],
            2,
            "score caption is wrong",
        ),
        (
            ["score", "caption", "x", "--set", "failures.max_ratio=1", "--lake", "{folder}/lake"],
            2,
            "no curated set 'x'",
        ),
        (["score", "semantic", "--retry-failed", "--lake", "{folder}/lake"], 2, "takes no --captioner"),
        (["score", "continuity", "--retry-failed", "--lake", "{folder}/lake"], 2, "takes no SET"),
        (["show", "tables", "--lake", ""], 2, "empty name"),
        (["show", "tables", "--lake", "{folder}/broken"], 2, "no catalog of a lake"),
        (["ingest", "{folder}", "--lake", "{folder}/file"], 1, "File exists"),
        (["sql", SURROGATE, "--lake", "{folder}/lake"], 2, "not UTF-8"),
        (["scan", "--set", "decoder=xyz", "--lake", "{folder}/lake"], 2, "unknown decoder 'xyz'"),
        (["scan", "--set", "decoder=nowhere:nothing", "--lake", "{folder}/lake"], 2, "cannot be imported"),
        (["curate", "x" * 5000, "--lake", "{folder}/lake"], 2, "no recipe"),
        (["curate", "--name", "x", "--lake", "{folder}/lake"], 2, "no recipe was given"),
        (["curate", "--explain", "x", "--lake", "{folder}/lake"], 2, "give one of them"),
        (["curate", "offline", "--explain", "x", "--lake", "{folder}/lake"], 2, "no clip begins with 'x'"),
        (["curate", "--name", "x", "--explain", "x", "--lake", "{folder}/lake"], 2, "no curated set 'x'"),
        (["tokenize", "all", "--set", "num_threads=-1", "--lake", "{folder}/lake"], 2, "num_threads"),
        (["submit", "--address", "http://127.0.0.1:99999", "--", "scan"], 2, "is no address"),
        (["generate", "a", "--seed", "99999999999999999999", "--lake", "{folder}/lake"], 2, "--seed"),
        (["prefer", "--name", "x", "--lake", "{folder}/lake"], 2, "give --votes or --scorer"),
        (["prefer", "--name", "x", "--votes", "{folder}/file", "--lake", "{folder}/lake"], 2, "expected .csv, .jsonl"),
        (["train", "dpo", "--data", "x", "--lake", "{folder}/lake"], 2, "Give --from CHECKPOINT"),
        (["demo", "--folder", "/dev/null/x"], 1, "Not a directory"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_mistakes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    said: str,
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "catalog.db").write_text("not a database, whatever it is called" * 30)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("words")
    call(monkeypatch, "ingest", str(tmp_path / "texts"), "--lake", str(tmp_path / "lake"))
    capsys.readouterr()
    assert call(monkeypatch, *(argument.format(folder=tmp_path) for argument in arguments)) == code
    told = capsys.readouterr()
    assert said in told.err
    assert "Traceback" not in told.err
    assert not told.out
