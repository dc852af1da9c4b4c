import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import doctor as doctors
from jobs.doctor import CLIP_FRAMES, Check, count_frames, print_doctor, write_clip
from schemas.catalog import Lake
from schemas.errors import ConfigError

ENOUGH = [Check("memory", "ok", "24 GiB"), Check("gpu", "limited", "none", "add one")]
LACKING = [*ENOUGH, Check("decoder pyav", "missing", "nothing", "run `make install`")]


@pytest.mark.parametrize(("checks", "exit_code"), [(ENOUGH, 0), (LACKING, 1)])
def test_only_what_the_demo_needs_makes_doctor_fail(checks: list[Check], exit_code: int) -> None:
    assert print_doctor(checks, json=False) == exit_code
    assert print_doctor(checks, json=True) == exit_code


def test_every_lack_is_printed_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    print_doctor(LACKING, json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["limited", "gpu", "none"]
    assert "add one" in lines[2]
    assert "run `make install`" in lines[4]


def test_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    print_doctor(LACKING, json=True)
    answer = json.loads(capsys.readouterr().out)
    assert answer["can_run_demo"] is False
    assert answer["checks"][1] == {"name": "gpu", "state": "limited", "found": "none", "remedy": "add one"}


def test_a_clip_written_here_is_decoded_here(tmp_path: Path) -> None:
    assert count_frames(write_clip(tmp_path, "h264"), "pyav") == ("pyav", CLIP_FRAMES)


def test_a_decoder_is_judged_by_what_it_decodes() -> None:
    able = doctors._decoder_check("opencv", ["h264", "av1"], {})
    assert (able.state, able.found) == ("ok", "h264, av1")
    partly = doctors._decoder_check("opencv", ["h264", "av1"], {"av1": "cannot open it"})
    assert partly.state == "limited"
    assert partly.found == "h264; not av1 (cannot open it)"
    assert partly.remedy
    assert doctors._decoder_check("pyav", ["h264"], {"h264": "3 of 8 frames"}).state == "missing"


def broken() -> Iterator[Check]:
    yield Check("first", "ok", "found before it broke")
    raise OSError("no such device")


def wrong() -> Iterator[Check]:
    yield from ()
    raise ConfigError("set OUTBACK_FILES")


def test_a_check_that_breaks_is_a_finding() -> None:
    first, second = doctors._tried("device", broken)
    assert first.state == "ok"
    assert (second.name, second.state, second.found) == ("device", "missing", "OSError: no such device")
    assert doctors._tried("lake", wrong) == [Check("lake", "missing", "set OUTBACK_FILES")]


def test_little_memory_is_missing_and_little_shared_memory_a_limit() -> None:
    assert doctors._amount("memory", 2.0, 4, "missing", "close") == Check(
        "memory", "missing", "2.0 GiB, 4 wanted", "close"
    )
    assert doctors._amount("memory", 8.0, 4, "missing", "close").state == "ok"


def test_a_lake_that_is_not_there_is_no_lack(tmp_path: Path) -> None:
    (check,) = doctors._lake(str(tmp_path / "lake"))
    assert check.state == "ok"
    assert not (tmp_path / "lake").exists()


def test_a_lake_is_counted_and_a_broken_one_reported(tmp_path: Path) -> None:
    from schemas.texts import TEXTS

    lake = Lake.open(tmp_path)
    lake.append(TEXTS, [{"text_id": "a", "text": "a", "uri": "f", "row": 0}], "run")
    (check,) = doctors._lake(str(tmp_path))
    assert check.state == "ok"
    assert "0 media" in check.found
    (tmp_path / "catalog.db").write_bytes(b"this is no database, and long enough to be told from an empty one" * 40)
    (check,) = doctors._lake(str(tmp_path))
    assert check.state == "missing"


def test_a_cluster_that_does_not_answer_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        assert next(doctors._ray()).state == "ok"
    check = next(doctors._ray())
    assert check.state == "missing"
    assert str(port) in check.found


def test_packages_are_compared_with_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text("numpy==0.1 \\\n    --hash=sha256:00\nno-such-package==1.0\n")
    monkeypatch.setattr(doctors, "LOCK", lock)
    _, check = doctors._packages()
    assert check.state == "limited"
    assert "2 of 2" in check.found
    assert "no-such-package absent" in check.found


@pytest.mark.slow
def test_this_machine_can_run_the_demo(tmp_path: Path) -> None:
    checks = doctors.doctor(str(tmp_path / "lake"))
    assert [check for check in checks if check.state == "missing"] == []
    assert {check.name for check in checks} >= {"memory", "gpu", "decoder pyav", "text model", "ray", "lake"}
    assert all(check.remedy for check in checks if check.state == "limited")
