"""Every spelling of a file of this machine is read, and of another place refused, with no more of it told than where it is."""

import os

import pytest

from pipeline.local_uris import local_path
from schemas.errors import RowError


@pytest.mark.parametrize(
    ("named", "path"),
    [
        ("a.mp4", "a.mp4"),
        ("12:30 #1?.mp4", "12:30 #1?.mp4"),
        ("http%3A//host/a.mp4", "http%3A//host/a.mp4"),
        (r"\\host\share\a.mp4", r"\\host\share\a.mp4"),
        ("//host/a.mp4", "/host/a.mp4"),
        ("file:///srv/a%20b.mp4", "/srv/a b.mp4"),
        ("FILE://LocalHost/srv/a.mp4", "/srv/a.mp4"),
        ("file:/srv/a.mp4", "/srv/a.mp4"),
        ("file:///srv/a#1?.mp4", "/srv/a#1?.mp4"),
        ("file:///srv/caf%e9.mp4", os.fsdecode(b"/srv/caf\xe9.mp4")),
    ],
)
def test_files_of_this_machine(named: str, path: str) -> None:
    assert local_path(named) == path


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("http://127.0.0.1/a.mp4", "http:// URL of the host '127.0.0.1'"),
        ("HTTP://[::1]:80/a.mp4", r"http:// URL of the host '\[::1\]:80'"),
        ("https://user:secret@10.0.0.1/a.mp4?signature=secret", "https:// URL of the host '10.0.0.1'"),
        ("s3://bucket/a.mp4", "s3:// URL of the host 'bucket'"),
        ("gopher+x.y-z://localhost/1", "the host 'localhost'"),
        ("http://\nhost/a.mp4", "the host"),
        ("https://ｌｏｃａｌｈｏｓｔ/a.mp4", "the host 'ｌｏｃａｌｈｏｓｔ'"),
        ("file://ｌｏｃａｌｈｏｓｔ/etc/passwd", "the machine 'ｌｏｃａｌｈｏｓｔ'"),
        ("file://[::1/a.mp4", r"the machine '\[::1'"),
        ("file://elsewhere/a.mp4", "the machine 'elsewhere'"),
        ("file://localhost%2Felsewhere/a.mp4", "the machine"),
        ("data:image/png;base64," + "A" * 100_000, "a data: URL"),
    ],
)
def test_other_places(named: str, told: str) -> None:
    with pytest.raises(RowError, match=told) as raised:
        local_path(named)
    assert raised.value.reason == "UrlNotAllowed"
    assert "secret" not in raised.value.message
    assert len(raised.value.message) < 300


@pytest.mark.parametrize("named", ["a\0.mp4", "file:///srv/a%00.mp4"])
def test_a_nul_byte(named: str) -> None:
    with pytest.raises(RowError, match="NUL byte") as raised:
        local_path(named)
    assert raised.value.reason == "BrokenRow"
