"""Ingest: every file offered is accounted for, content decides what a medium is, and a second run adds nothing."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import jobs.ingest
from jobs.ingest import IngestConfig, IngestReport, ingest, print_ingest
from pipeline.list_sources import list_sources
from schemas.catalog import Lake
from schemas.errors import ConfigError, FailureRateError, RowError
from schemas.identity import file_digest
from schemas.media import LOCATIONS, MEDIA
from schemas.runs import ATTEMPTS, RUNS
from schemas.tables import TABLES
from schemas.texts import TEXTS
from tests.conftest import CHECKOUT

SHARED = CHECKOUT.parent / "shared" / "media"
OPTIONS = IngestConfig()


def picture(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 32, 3), np.uint8)
    done, data = cv2.imencode(path.suffix, pixels)
    assert done
    path.write_bytes(bytes(data))
    return path


def run(lake: Lake, *sources: Path, **options: Any) -> IngestReport:
    report = ingest(lake, sources, options=IngestConfig(**options))
    assert report.balances
    return report


def contents(lake: Lake) -> dict[str, str]:
    return {table.name: lake.content_sha256(table) for table in TABLES if not table.ledger}


def attempts(lake: Lake) -> dict[str, str]:
    """Reason by the name of the file or row."""
    rows = lake.read(ATTEMPTS, ["item_id", "error_class"]).to_pylist()
    return {Path(row["item_id"]).name: row["error_class"] for row in rows}


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(tmp_path / "lake")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two pictures, one of them twice, with captions; texts; and a few things that are nothing."""
    folder = tmp_path / "corpus"
    first = picture(folder / "a.png", 1)
    picture(folder / "sub" / "b.png", 2)
    (folder / "copy of a.png").write_bytes(first.read_bytes())
    (folder / "a.txt").write_text("the first")
    (folder / "list.jsonl").write_text(
        json.dumps({"path": "sub/b.png", "caption": "the second", "licence": "CC0-1.0", "source": "here"})
        + "\n"
        + json.dumps({"path": "gone.png"})
        + "\n"
    )
    (folder / "plain.txt").write_text("a plain text")
    (folder / "texts.jsonl").write_text('{"text": "one"}\n{"text": ""}\n{"text": "one"}\n{"text": "two"}\n')
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 and then nothing")
    (folder / "empty.png").touch()
    (folder / "notes.md").write_text("# notes")
    (folder / "nothing.txt").touch()
    return folder


def test_everything_offered_is_accounted_for(lake: Lake, corpus: Path) -> None:
    report = run(lake, corpus)
    assert report.offered == 13  # eleven files, and two rows that are nothing
    assert (report.media_files, report.text_files, report.sidecars, report.manifests) == (3, 2, 1, 1)
    assert report.rejected | report.failed == attempts_by_reason(lake)
    assert report.failed == {"Missing": 1, "Unreadable": 1}
    found = attempts(lake)
    assert found["list.jsonl#row=1"] == "Missing"
    assert found["texts.jsonl#row=1"] == "EmptyText"
    assert (found["notes.md"], found["empty.png"], found["nothing.txt"]) == ("NotMedia", "Empty", "EmptyText")
    assert found["broken.jpg"] in ("Truncated", "Unreadable")
    assert len(found) == report.num_rejected + report.num_failed == 6
    assert all(lake.read(ATTEMPTS, ["terminal"])["terminal"].to_pylist())


def attempts_by_reason(lake: Lake) -> dict[str, int]:
    counted: dict[str, int] = {}
    for reason in lake.read(ATTEMPTS, ["error_class"])["error_class"].to_pylist():
        counted[reason] = counted.get(reason, 0) + 1
    return counted


def test_the_same_bytes_are_one_medium_with_two_locations(lake: Lake, corpus: Path) -> None:
    report = run(lake, corpus)
    assert (report.media_new, report.locations_new) == (2, 3)
    media = {row["media_id"]: row for row in lake.read(MEDIA).to_pylist()}
    digest = file_digest(corpus / "a.png")
    row = media[digest[:16]]
    assert row["digest"] == digest
    assert (row["kind"], row["width_px"], row["height_px"], row["container"]) == ("image", 32, 24, "png")
    assert row["num_bytes"] == (corpus / "a.png").stat().st_size
    places = {Path(row["uri"]).name: row for row in lake.read(LOCATIONS).to_pylist()}
    assert places["a.png"]["media_id"] == places["copy of a.png"]["media_id"] == digest[:16]
    assert all(Path(row["uri"]).is_absolute() for row in places.values())
    said = ("caption", "caption_source", "licence", "source", "manifest")
    assert [places["a.png"][name] for name in said] == ["the first", "sidecar_txt", None, None, None]
    manifest = str(corpus / "list.jsonl")
    assert [places["b.png"][name] for name in said] == ["the second", "manifest", "CC0-1.0", "here", manifest]
    assert [places["copy of a.png"][name] for name in said] == [None] * 5


def test_texts_are_one_row_per_distinct_text(lake: Lake, corpus: Path) -> None:
    report = run(lake, corpus)
    assert (report.text_rows, report.texts_new) == (4, 3)
    rows = {row["text"]: (Path(row["uri"]).name, row["row"]) for row in lake.read(TEXTS).to_pylist()}
    assert rows == {"a plain text": ("plain.txt", 0), "one": ("texts.jsonl", 0), "two": ("texts.jsonl", 3)}


def test_a_second_run_adds_nothing_and_opens_no_medium(
    lake: Lake, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(lake, corpus)
    before = {table.name: lake.snapshot_id(table) for table in TABLES if table is not RUNS}

    def refuse(*_: object) -> None:
        raise AssertionError("a medium was opened")

    monkeypatch.setattr(jobs.ingest._Prober, "_open_medium", refuse)
    again = run(Lake(lake.where), corpus)
    assert {table.name: lake.snapshot_id(table) for table in TABLES if table is not RUNS} == before
    assert again.failed == first.failed
    assert again.offered == first.offered
    assert (again.media_new, again.locations_new, again.texts_new) == (0, 0, 0)


def test_two_lakes_of_the_same_corpus_hold_the_same(tmp_path: Path, corpus: Path) -> None:
    one, other = Lake(tmp_path / "one"), Lake(tmp_path / "other")
    run(one, corpus)
    run(other, corpus / "copy of a.png", corpus / "texts.jsonl")
    run(other, corpus, commit_files=1)
    assert contents(one) == contents(other)


def test_what_was_broken_is_tried_again_when_its_bytes_change(lake: Lake, corpus: Path) -> None:
    run(lake, corpus)
    picture(corpus / "broken.jpg", 5)
    report = run(lake, corpus)
    assert report.media_new == 1
    assert "broken.jpg" in {Path(uri).name for uri in lake.read(LOCATIONS)["uri"].to_pylist()}
    (corpus / "a.png").write_bytes(b"no longer a picture")
    report = run(lake, corpus)
    assert report.media_files == 3
    assert attempts(lake)["a.png"] in ("WrongExtension", "Unreadable")


def test_something_new_said_of_a_file_is_a_new_location_row(lake: Lake, corpus: Path) -> None:
    run(lake, corpus)
    (corpus / "sub" / "b.txt").write_text("another caption")
    report = run(lake, corpus)
    assert (report.media_new, report.locations_new) == (0, 1)


def test_a_failure_that_may_pass_is_tried_again_a_few_times(
    lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(tmp_path / "media" / "a.png", 1)

    def stumble(*_: object) -> None:
        raise RowError("Stumbled", "try again", terminal=False)

    with monkeypatch.context() as patched:
        patched.setattr(jobs.ingest._Prober, "_open_medium", stumble)
        for _ in range(5):
            assert run(lake, tmp_path / "media").failed == {"Stumbled": 1}
    assert sorted(lake.read(ATTEMPTS, ["attempt"])["attempt"].to_pylist()) == [1, 2, 3]
    assert run(lake, tmp_path / "media").failed == {"Stumbled": 1}  # given up: three times is enough


def test_a_file_written_to_while_it_is_read_is_not_taken(
    lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = picture(tmp_path / "media" / "a.png", 1)
    whole = jobs.ingest._Prober._open_medium

    def grow(self: Any, opened: Path) -> Any:
        facts = whole(self, opened)
        with path.open("ab") as file:
            file.write(b"more")
        return facts

    monkeypatch.setattr(jobs.ingest._Prober, "_open_medium", grow)
    assert run(lake, tmp_path / "media").failed == {"Changed": 1}
    monkeypatch.undo()
    assert run(lake, tmp_path / "media").media_files == 1


def test_rows_are_published_while_the_run_goes_on(lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(6):
        picture(tmp_path / "media" / f"{index}.png", index)
    whole = jobs.ingest._Ingest._look

    def stop(self: Any, file: Any, *rest: Any) -> Any:
        if file.path.name == "4.png":
            raise KeyboardInterrupt
        return whole(self, file, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(jobs.ingest._Ingest, "_look", stop)
        with pytest.raises(KeyboardInterrupt):
            run(lake, tmp_path / "media", commit_files=2)
    assert lake.facts(MEDIA).num_rows == lake.facts(LOCATIONS).num_rows == 4
    assert run(lake, tmp_path / "media").media_new == 2
    statuses = lake.read(RUNS, ["status"])["status"].to_pylist()
    assert sorted(statuses) == ["done", "failed", "started", "started"]


INGEST = """
import sys
from jobs.ingest import *
ingest(Lake(sys.argv[1]), [sys.argv[2]], options=IngestConfig(commit_files=1))
"""


def test_sigkill_and_again_gives_what_an_undisturbed_run_gives(tmp_path: Path, corpus: Path) -> None:
    for index in range(10):
        picture(corpus / f"more{index}.png", 100 + index)
    whole, killed = Lake(tmp_path / "whole"), Lake(tmp_path / "killed")
    run(whole, corpus)
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, "-c", INGEST, killed.where, str(corpus)]
    for wanted in (2, 5):
        process = subprocess.Popen(command, cwd=CHECKOUT, env=environment)
        while killed.facts(MEDIA).num_rows < wanted and process.poll() is None:
            time.sleep(0.02)
        process.kill()
        process.wait()
    report = run(killed, corpus)
    assert 0 < report.media_new < 12
    assert contents(killed) == contents(whole)


def test_hostile_names_and_files_cost_a_row_each(lake: Lake, tmp_path: Path) -> None:
    folder = tmp_path / "media"
    names = ["-rf.png", "new\nline.png", "quo'te\".png", "sép.png"]
    for index, name in enumerate(names):
        picture(folder / name, index)
    os.mkfifo(folder / "pipe.png")
    (folder / "self.png").symlink_to(folder / "self.png")
    (folder / "folder.png").mkdir()
    bad = os.fsencode(folder) + b"/caf\xe9.png"
    os.rename(picture(folder / "x.png", 9), bad)
    report = run(lake, folder)
    assert report.media_files == len(names)
    assert {Path(uri).name for uri in lake.read(LOCATIONS)["uri"].to_pylist()} == set(names)
    assert attempts(lake) == {
        "pipe.png": "NotAFile",
        "self.png": "LinkLoop",
        "folder.png": "NotAFile",
        "caf\\xe9.png": "NameNotUtf8",
    }


def test_a_file_that_vanishes_between_listing_and_reading(
    lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = picture(tmp_path / "media" / "a.png", 1)

    def list_and_remove(sources: Any) -> Any:
        listing = list_sources(sources)
        path.unlink()
        return listing

    monkeypatch.setattr(jobs.ingest, "list_sources", list_and_remove)
    assert run(lake, tmp_path / "media").failed == {"Missing": 1}


def test_a_source_that_is_not_there_leaves_no_lake(lake: Lake, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or folder"):
        run(lake, tmp_path / "missing")
    assert not lake.exists()


def test_progress_and_print(lake: Lake, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[int, int, str]] = []
    report = ingest(lake, [corpus], options=OPTIONS, on_progress=lambda *said: told.append(said))
    assert [done for done, _, _ in told] == list(range(1, len(told) + 1))
    assert told[-1][0] == told[-1][1]
    print_ingest(report, False)
    out = capsys.readouterr().out
    assert "offered 13 = 3 media files + 2 text files + 1 sidecars + 1 manifests + 4 rejected + 2 failed" in out
    print_ingest(report, True)
    assert json.loads(capsys.readouterr().out)["failed"] == report.failed


def broken(folder: Path, num_files: int) -> None:
    folder.mkdir(exist_ok=True)
    for index in range(num_files):
        (folder / f"broken{index}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes([index] * 64))


def test_more_failures_than_the_recipe_allows_fail_the_job_and_keep_what_succeeded(lake: Lake, tmp_path: Path) -> None:
    broken(tmp_path / "media", 4)
    for seed in range(3):
        picture(tmp_path / "media" / f"fine{seed}.png", seed)
    allowed = {"max_ratio": 4 / 7, "min_failed": 1}
    assert run(lake, tmp_path / "media", failures=allowed).failed == {"Unreadable": 4}
    assert run(lake, tmp_path / "media", failures={"max_ratio": 0.5, "min_failed": 5}).failed == {"Unreadable": 4}
    other, told = Lake(tmp_path / "other"), list[IngestReport]()
    options = IngestConfig(failures={"max_ratio": 0.5, "min_failed": 4})
    for _ in range(2):  # what is known to have failed is no better the second time
        with pytest.raises(FailureRateError, match=r"4 of 7 media failed.*4 Unreadable.*is kept"):
            ingest(other, [tmp_path / "media"], options=options, on_report=told.append)
    assert len(other.read(MEDIA)) == 3
    assert contents(other) == contents(lake)
    rows = [row for row in other.read(RUNS).to_pylist() if row["status"] == "failed"]
    for row, report in zip(rows, told, strict=True):
        outcome = json.loads(row["outcome"])
        assert (outcome["offered"], outcome["media_files"]) == (7, 3)
        assert outcome["failed"] == report.failed == {"Unreadable": 4}


def test_what_is_rejected_is_no_failure(lake: Lake, tmp_path: Path) -> None:
    picture(tmp_path / "media" / "fine.png", 1)
    for index in range(30):
        (tmp_path / "media" / f"notes{index}.md").write_text(f"# notes {index}")
    report = run(lake, tmp_path / "media", failures={"max_ratio": 0.0, "min_failed": 1})
    assert (report.rejected, report.failed) == ({"NotMedia": 30}, {})


def test_what_failed_for_good_is_tried_again_when_asked_for(
    lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(tmp_path / "media" / "a.png", 1)
    monkeypatch.setattr(jobs.ingest, "probe", break_library)
    assert run(lake, tmp_path / "media").failed == {"ImportError": 1}
    monkeypatch.undo()
    assert run(lake, tmp_path / "media").failed == {"ImportError": 1}
    assert ingest(lake, [tmp_path / "media"], options=OPTIONS, retry_failed=True).media_files == 1


def break_library(*_: object) -> None:
    raise ImportError("libavcodec.so.61: cannot open shared object file")


def test_a_file_beyond_the_limit_is_not_even_hashed(
    lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = picture(tmp_path / "media" / "a.png", 1)
    with (tmp_path / "media" / "sparse.mp4").open("wb") as file:
        file.truncate(1 << 40)
    hashed: list[Path] = []

    def count(path: Path) -> str:
        hashed.append(path)
        return file_digest(path)

    monkeypatch.setattr(jobs.ingest, "file_digest", count)
    assert run(lake, tmp_path / "media").rejected == {"TooManyBytes": 1}
    assert hashed == [path]


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="the folder of real media is not beside the checkout")
def test_real_media(lake: Lake) -> None:
    report = run(lake, SHARED)
    expected = json.loads((SHARED / "expected.json").read_text())
    failed = {"README.md", "expected.json", "derived.json", "giant_20000x14000.jpg"}
    assert set(attempts(lake)) == failed | {Path(name).name for name in expected["must_fail"]}
    assert report.media_files == 166
    assert report.manifests == 2
    licences = lake.read(LOCATIONS, ["licence"])["licence"]
    assert licences.null_count == 0
    captions = [row for row in (SHARED / "captions.jsonl").read_text().splitlines() if row]
    assert lake.read(LOCATIONS, ["caption"])["caption"].null_count == report.media_files - len(captions)
