"""What is offered is told apart, and nothing goes missing, whatever the names and whatever the file system holds."""

import json
import os
import socket
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.list_sources import Listing, Statement, list_sources, readable
from schemas.errors import ConfigError


def put(path: Path, data: bytes | str = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def names(listing: Listing) -> dict[str, list[str]]:
    return {
        "media": [file.path.name for file in listing.media],
        "texts": [file.path.name for file in listing.texts],
        "sidecars": [path.name for path in listing.sidecars],
        "manifests": [path.name for path in listing.manifests],
    }


def reasons(listing: Listing) -> dict[str, str]:
    return {Path(one.uri).name: one.reason for one in listing.refused}


def captions(listing: Listing) -> dict[str, list[str | None]]:
    return {file.path.name: [said.caption for said in file.statements] for file in listing.media}


def test_a_folder_is_read_to_its_depths_and_told_apart(tmp_path: Path) -> None:
    for name in ("a.mp4", "sub/b.JPG", "sub/deep/c.webm", "a.txt", "b.txt", "sub/b.json", "notes.md"):
        put(tmp_path / name, '{"caption": "c"}' if name.endswith(".json") else "text")
    put(tmp_path / "rows.jsonl", '{"text": "t"}\n')
    listing = list_sources([tmp_path])
    assert names(listing) == {
        "media": ["a.mp4", "notes.md", "b.JPG", "c.webm"],  # only its content says that notes.md is none
        "texts": ["b.txt", "rows.jsonl"],
        "sidecars": ["a.txt", "b.json"],
        "manifests": [],
    }
    assert not listing.refused
    assert listing.num_offered == 8


def test_files_globs_and_doubles_are_one_file_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.mp4", "b.mp4", "sub/c.mp4", "[x].mp4"):
        put(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    listing = list_sources(
        ["a.mp4", str(tmp_path / "*.mp4"), ".", "**/c.mp4", "[x].mp4", (tmp_path / "a.mp4").as_uri()]
    )
    assert names(listing)["media"] == ["[x].mp4", "a.mp4", "b.mp4", "c.mp4"]
    assert all(file.path.is_absolute() for file in listing.media)


@pytest.mark.parametrize("source", ["missing", "*.mp4", "s3://bucket/x.mp4"])
def test_a_source_that_is_not_there_stops_before_anything_starts(tmp_path: Path, source: str) -> None:
    with pytest.raises(ConfigError):
        list_sources([source if "://" in source else str(tmp_path / source)])


# --- manifests and sidecars ---


def write_manifest(path: Path, rows: list[dict[str, str | None]]) -> Path:
    columns = list(rows[0])
    if path.suffix == ".jsonl":
        return put(path, "".join(json.dumps(row) + "\n" for row in rows))
    if path.suffix == ".csv":
        lines = [columns, *([f'"{row[c] or ""}"' for c in columns] for row in rows)]
        return put(path, "".join(",".join(line) + "\r\n" for line in lines))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize(("column", "licence"), [("path", "licence"), ("image", "license"), ("uri", "licence")])
def test_a_manifest_gives_its_files_and_what_is_said_of_them(
    tmp_path: Path, suffix: str, column: str, licence: str
) -> None:
    for name in ("a.png", "b, two.png", "sub/c.png"):
        put(tmp_path / name)
    rows: list[dict[str, str | None]] = [
        {column: "a.png", "caption": "A, with comma", licence: "CC0-1.0", "source": "here"},
        {column: "b, two.png", "caption": None, licence: None, "source": None},
        {column: "sub/c.png", "caption": "C\nin two lines", licence: None, "source": None},
    ]
    manifest = write_manifest(tmp_path / f"list{suffix}", rows)
    listing = list_sources([manifest])
    assert not listing.refused
    said = {file.path.name: file.statements for file in listing.media}
    place = str(manifest)
    assert said == {
        "a.png": (Statement("A, with comma", "manifest", "CC0-1.0", "here", place),),
        "b, two.png": (Statement(manifest=place),),
        "c.png": (Statement("C\nin two lines", "manifest", manifest=place),),
    }
    assert listing.num_offered == 4


def test_a_manifest_in_a_folder_names_the_files_that_walking_finds(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        put(tmp_path / name)
    write_manifest(tmp_path / "list.jsonl", [{"path": "./sub/../a.png", "caption": "A"}])
    put(tmp_path / "a.txt", "from the sidecar")
    put(tmp_path / "b.txt", " from its sidecar \n")
    listing = list_sources([tmp_path])
    assert captions(listing) == {"a.png": ["A", "from the sidecar"], "b.png": ["from its sidecar"]}
    assert listing.num_offered == 5


def test_a_licence_without_a_caption_joins_the_captions(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    write_manifest(tmp_path / "facts.csv", [{"file": "a.png", "licence": "MIT"}])
    write_manifest(tmp_path / "words.csv", [{"file": "a.png", "caption": "A"}])
    (file,) = list_sources([tmp_path]).media
    assert file.statements == (Statement("A", "manifest", "MIT", None, str(tmp_path / "words.csv")),)


def test_a_file_with_several_captions_keeps_each_once(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    rows: list[dict[str, str | None]] = [{"path": "a.png", "caption": text} for text in ("one", "two", "one")]
    write_manifest(tmp_path / "list.jsonl", rows)
    assert captions(list_sources([tmp_path])) == {"a.png": ["one", "two"]}


def test_a_json_sidecar_states_licence_and_source(tmp_path: Path) -> None:
    put(tmp_path / "a.mp4")
    put(tmp_path / "a.json", json.dumps({"caption": "A", "license": "CC0", "source": "me", "other": 1}))
    (file,) = list_sources([tmp_path]).media
    assert file.statements == (Statement("A", "sidecar_json", "CC0", "me", None),)


def test_rows_that_name_no_file_are_refused_one_by_one(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    (tmp_path / "folder").mkdir()
    good = json.dumps({"path": "a.png"})
    bad = [
        json.dumps({"path": "gone.png"}),
        "{not json",
        json.dumps(["a.png"]),
        json.dumps({"caption": "nothing named"}),
        json.dumps({"path": 7}),
        json.dumps({"path": "folder"}),
        json.dumps({"path": "a\0b.png"}),
        json.dumps({"path": "s3://bucket/a.png"}),
        json.dumps({"path": "a.png", "caption": ["x"]}),
        json.dumps({"path": "\ud800.png"}),
        json.dumps({"path": "file:///caf%e9.png"}),
        json.dumps({"path": "list.jsonl"}),
    ]
    put(tmp_path / "list.jsonl", "\n".join([good, *bad, ""]).encode() + b'{"path": "\xff.png"}\n')
    listing = list_sources([tmp_path / "list.jsonl"])
    assert [file.path.name for file in listing.media] == ["a.png"]
    assert [one.uri.rpartition("#row=")[2] for one in listing.refused] == sorted(map(str, range(1, 14)))
    assert Counter(one.reason for one in listing.refused) == {
        "Missing": 1,
        "BrokenRow": 8,
        "NotAFile": 1,
        "UrlNotAllowed": 1,
        "NameNotUtf8": 2,
    }
    assert listing.num_offered == 15


def test_csv_rows_that_do_not_fit_the_header(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    put(tmp_path / "list.csv", 'path,caption\na.png,fine\na.png\na.png,x,y\n\na.png,"open\nquote\n')
    listing = list_sources([tmp_path / "list.csv"])
    assert captions(listing) == {"a.png": ["fine"]}
    assert [one.reason for one in listing.refused] == ["BrokenRow"] * 3


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("x.parquet", b"PAR1 is how it begins", "BrokenRows"),
        ("x.parquet", b"", "BrokenRows"),
        ("x.csv", b"", "EmptyFile"),
        ("x.jsonl", b"", "EmptyFile"),
        ("x.jsonl", b"[1]\n[2]\n", "BrokenRow"),
        ("x.csv", b"width,height\n1,2\n", "NotMedia"),
        ("x.jsonl", b'{"width": 1}\n', "NotMedia"),
    ],
)
def test_files_of_rows_that_are_neither_manifest_nor_texts(tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    put(tmp_path / name, data)
    listing = list_sources([tmp_path])
    assert reasons(listing) == {name: reason}
    assert listing.num_offered == 1


@pytest.mark.parametrize("data", [b"{", b'"text"', b"\xff", b'{"caption": 7}'])
def test_a_broken_sidecar_is_refused_and_its_medium_is_not(tmp_path: Path, data: bytes) -> None:
    put(tmp_path / "a.png")
    put(tmp_path / "a.json", data)
    listing = list_sources([tmp_path])
    assert reasons(listing) == {"a.json": "BrokenSidecar"}
    assert captions(listing) == {"a.png": [None]}


# --- what a file system may hold ---


def test_hostile_names_are_only_names(tmp_path: Path) -> None:
    hostile = ["-rf.mp4", "new\nline.mp4", "quote'\".mp4", "$(x) ; rm.mp4", "#row=1?.mp4", "ü 日本.mp4", "tab\t.mp4"]
    for name in hostile:
        put(tmp_path / name)
    listing = list_sources([tmp_path])
    assert sorted(file.path.name for file in listing.media) == sorted(hostile)


def test_a_name_that_is_not_utf8_is_refused_in_readable_form(tmp_path: Path) -> None:
    bad = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4")
    with open(bad, "wb") as file:
        file.write(b"x")
    listing = list_sources([tmp_path])
    assert [(one.uri, one.reason) for one in listing.refused] == [(f"{tmp_path}/caf\\xe9.mp4", "NameNotUtf8")]
    readable(bad).encode()


def test_what_is_no_file_is_refused_without_being_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "folder.mp4").mkdir()
    put(tmp_path / "folder.mp4" / "in.mp4")
    (tmp_path / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (tmp_path / "self.mp4").symlink_to(tmp_path / "self.mp4")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket.mp4"))
        listing = list_sources([tmp_path])
    assert reasons(listing) == {
        "pipe.mp4": "NotAFile",
        "folder.mp4": "NotAFile",
        "gone.mp4": "Missing",
        "self.mp4": "LinkLoop",
        "socket.mp4": "NotAFile",
    }
    assert names(listing)["media"] == ["in.mp4"]


def test_a_pipe_that_a_manifest_names_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    os.mkfifo(tmp_path / "pipe.mp4")
    write_manifest(tmp_path / "list.jsonl", [{"path": "pipe.jsonl"}, {"path": "pipe.mp4"}])
    listing = list_sources([tmp_path / "list.jsonl"])
    assert [one.reason for one in listing.refused] == ["NotAFile"] * 2


def test_links_are_names_and_loops_end(tmp_path: Path) -> None:
    put(tmp_path / "real" / "a.mp4")
    (tmp_path / "link.mp4").symlink_to(tmp_path / "real" / "a.mp4")
    (tmp_path / "real" / "up").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "real")
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    put(outside / "b.mp4")
    (outside / "back").symlink_to(tmp_path)
    (tmp_path / "out").symlink_to(outside)
    listing = list_sources([tmp_path])
    found = sorted(str(file.path.relative_to(tmp_path)) for file in listing.media)
    assert found == ["link.mp4", "out/b.mp4", "real/a.mp4"]
    assert reasons(listing) == {"up": "LinkLoop", "again": "FolderSeen", "back": "LinkLoop"}


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_what_may_not_be_read(tmp_path: Path) -> None:
    put(tmp_path / "closed" / "a.mp4")
    put(tmp_path / "list.jsonl", '{"path": "x"}').chmod(0)
    (tmp_path / "closed").chmod(0)
    listing = list_sources([tmp_path])
    (tmp_path / "closed").chmod(0o755)
    assert reasons(listing) == {"closed": "NotPermitted", "list.jsonl": "NotPermitted"}


@pytest.mark.timeout(20)
def test_a_pattern_over_all_depths_enters_no_linked_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.mp4", "sub/b.mp4", "sub/deep/c.mp4"):
        put(tmp_path / name)
    for link in ("self", "again", "sub/up"):
        (tmp_path / link).symlink_to(tmp_path, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    for pattern in ("**/*.mp4", str(tmp_path / "**" / "*.mp4"), "./**/*.mp4"):
        listing = list_sources([pattern])
        assert sorted(str(file.path.relative_to(tmp_path)) for file in listing.media) == [
            "a.mp4",
            "sub/b.mp4",
            "sub/deep/c.mp4",
        ]
    assert len(list_sources(["**"]).media) == 3


def test_a_file_of_another_machine_is_not_one_of_this(tmp_path: Path) -> None:
    put(tmp_path / "a.mp4")
    assert names(list_sources([f"file://localhost{tmp_path}/a.mp4"]))["media"] == ["a.mp4"]
    with pytest.raises(ConfigError, match="of the machine 'elsewhere'"):
        list_sources([f"file://elsewhere{tmp_path}/a.mp4"])


@pytest.mark.parametrize("first", ['{"text": "x"}', '{"caption": "of nothing"}', "{}", "not json"])
def test_every_row_says_what_a_jsonl_file_is(tmp_path: Path, first: str) -> None:
    put(tmp_path / "ok.png")
    put(tmp_path / "list.jsonl", f'{first}\n{{"path": "ok.png", "text": "a caption"}}\n')
    listing = list_sources([tmp_path / "list.jsonl"])
    assert names(listing)["manifests"] == ["list.jsonl"]
    assert [statement.caption for statement in listing.media[0].statements] == ["a caption"]
    assert [refused.uri.rpartition("#")[2] for refused in listing.refused] == ["row=0"]


def test_a_csv_line_that_never_ends_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.read_rows.MAX_LINE_BYTES", 1000)
    (tmp_path / "first.csv").write_bytes(bytes(1001))
    (tmp_path / "later.csv").write_text("path,caption\na.png,short\n" + "x" * 1001)
    (tmp_path / "fits.csv").write_text("path\n" + "x" * 999 + "\n")
    listing = list_sources([tmp_path])
    refused = {Path(one.uri).name: one.reason for one in listing.refused}
    assert (refused["first.csv"], refused["later.csv"]) == ("BrokenRows", "BrokenRows")
    assert [path.name for path in listing.manifests] == ["fits.csv"]


def test_a_pattern_with_a_nul_byte_is_named() -> None:
    with pytest.raises(ConfigError, match="NUL byte"):
        list_sources(["file:///a%00b/*"])
