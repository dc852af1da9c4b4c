"""What a user offers: every file below the sources, told apart, and what manifests and sidecars say of the media.

Nothing is opened but manifests and sidecars, and nothing goes missing: each file offered is a text file, a sidecar, a
manifest, refused with a reason, or else taken for a medium until it is probed, since only its content can tell; each
manifest row names one of these or is refused. A manifest is read as one wherever it lies, in a folder too.
"""

import errno
import glob
import json
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.local_uris import local_path
from pipeline.probe_media import named_kind
from pipeline.read_rows import ROW_SUFFIXES, columns_of, read_rows
from pipeline.read_texts import LICENCE_COLUMNS, text_column
from schemas.errors import ConfigError, RowError

PATH_COLUMNS = ("path", "uri", "file", "image", "video")
CAPTION_COLUMNS = ("caption", "text")
SOURCE_COLUMNS = ("source",)
MAX_SIDECAR_BYTES = 1 << 20


@dataclass(frozen=True)
class Statement:
    """What a manifest row or a sidecar says of one file."""

    caption: str | None = None
    caption_source: str | None = None
    licence: str | None = None
    source: str | None = None
    manifest: str | None = None


@dataclass(frozen=True)
class OfferedFile:
    """A file to be read, and what was said of it: one statement per distinct caption, and at least one."""

    path: Path
    statements: tuple[Statement, ...]


@dataclass(frozen=True)
class Refused:
    """Something offered that is nothing to be read: where, and why. `uri` is printable whatever the name was."""

    uri: str
    reason: str
    message: str


@dataclass
class Listing:
    """Everything offered, each in exactly one of the lists."""

    media: list[OfferedFile] = field(default_factory=list)
    texts: list[OfferedFile] = field(default_factory=list)
    sidecars: list[Path] = field(default_factory=list)
    manifests: list[Path] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)

    @property
    def num_offered(self) -> int:
        """Files and manifest rows that were offered."""
        return sum(len(part) for part in (self.media, self.texts, self.sidecars, self.manifests, self.refused))


def list_sources(sources: Sequence[str | Path]) -> Listing:
    """Files, folders, globs and manifests -> everything they offer, in order of path.

    Raises: ConfigError if a source is not there.
    """
    walk = _Walk()
    for source in sources:
        for path in _expand(str(source)):
            walk.offer(path)
    walk.follow_links()
    return _Sorter(walk).sort()


def readable(path: str | Path) -> str:
    r"""A path -> text that any table can hold: bytes that are no UTF-8 become `\xNN`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _expand(source: str) -> list[str]:
    """A source as typed -> absolute paths. What exists under the very name is no pattern."""
    try:
        source = local_path(source)
    except RowError as error:
        raise ConfigError(f"source: {error.message}") from error
    if os.path.lexists(source):
        return [os.path.abspath(source)]
    found = sorted(_matches(os.path.expanduser(source)))
    if not found:
        raise ConfigError(
            f"source {readable(source)!r}: there is no such file or folder, and no file matches it as a pattern"
        )
    return [os.path.abspath(path) for path in found]


def _matches(pattern: str) -> list[str]:
    """Paths that a pattern matches. `**` enters no linked folder: a link to where it lies would never end."""
    parts = Path(pattern).parts
    if "**" not in parts:
        return glob.glob(pattern)
    fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    return [str(path) for path in Path(*parts[:fixed]).glob(os.path.join(*parts[fixed:]))]


class _Walk:
    """Regular files by absolute path, and what is none. Links to folders come last, so that real names win."""

    def __init__(self) -> None:
        self.files: dict[str, None] = {}
        self.refused: dict[str, Refused] = {}
        self._folders: set[str] = set()
        self._links: list[str] = []

    def offer(self, path: str) -> None:
        """Take a file, or everything below a folder."""
        pending = [path]
        while pending:
            path = pending.pop()
            try:
                mode = os.lstat(path).st_mode
                if stat.S_ISLNK(mode):
                    mode = os.stat(path).st_mode
                    if stat.S_ISDIR(mode):
                        self._links.append(path)
                        continue
                if stat.S_ISDIR(mode):
                    pending += self._enter(path)
                elif stat.S_ISREG(mode):
                    self._take(path)
                else:
                    self.refuse(path, "NotAFile", "found a pipe, socket or device, expected a file")
            except OSError as error:
                self.refuse(path, *os_reason(error, path))

    def follow_links(self) -> None:
        """Take what lies below links to folders, each folder once."""
        while self._links:
            links, self._links = sorted(set(self._links)), []
            for link in links:
                target = os.path.realpath(link)
                if target == os.path.dirname(link) or os.path.dirname(link).startswith(target.rstrip("/") + "/"):
                    self.refuse(link, "LinkLoop", f"found a link to {readable(target)}, a folder that it lies in")
                elif target in self._folders:
                    self.refuse(
                        link, "FolderSeen", f"found a link to {readable(target)}, which was read under its own name"
                    )
                else:
                    for path in self._enter(link):
                        self.offer(path)

    def refuse(self, path: str, reason: str, message: str) -> None:
        """Note that something offered is nothing to be read."""
        self.refused.setdefault(path, Refused(readable(path), reason, message))

    def _enter(self, folder: str) -> list[str]:
        real = os.path.realpath(folder)
        if real in self._folders:
            return []
        self._folders.add(real)
        if _named_medium(folder):
            self.refuse(
                folder, "NotAFile", "found a folder under the name of a medium; what is in it was read as usual"
            )
        return [os.path.join(folder, name) for name in os.listdir(folder)]

    def _take(self, path: str) -> None:
        try:
            path.encode("utf-8")
        except UnicodeEncodeError:
            self.refuse(path, "NameNotUtf8", "found a name that is not UTF-8, which no table can hold; rename the file")
        else:
            self.files.setdefault(path, None)


class _Sorter:
    """Files of a walk -> a listing. Manifests are read first, for they name more files and say what is said of them."""

    def __init__(self, walk: _Walk) -> None:
        self._walk = walk
        self._manifests_say: dict[str, list[Statement]] = {}
        self._sidecars_say: dict[str, list[Statement]] = {}
        self._listing = Listing()

    def sort(self) -> Listing:
        """Tell every file apart."""
        seen: set[str] = set()
        texts: list[str] = []
        while rest := sorted(path for path in self._walk.files if path not in seen and _is_rows(path)):
            seen.update(rest)
            texts += [path for path in rest if not self._read_rows_file(path)]
        by_stem = {os.path.splitext(p)[0] for p in self._walk.files if _named_medium(p)}
        for path in sorted(set(self._walk.files) - seen):
            self._sort_file(path, by_stem)
        self._listing.texts += [
            OfferedFile(Path(path), self._statements(path)) for path in texts if path not in self._walk.refused
        ]
        self._listing.media = [OfferedFile(f.path, self._statements(str(f.path))) for f in self._listing.media]
        self._listing.refused += [self._walk.refused[path] for path in sorted(self._walk.refused)]
        self._listing.texts.sort(key=lambda file: file.path)
        return self._listing

    def _sort_file(self, path: str, stems: set[str]) -> None:
        stem, suffix = os.path.splitext(path)
        suffix = suffix.lower()
        try:
            if suffix in (".txt", ".json") and stem in stems:
                self._sidecars_say.setdefault(stem, []).append(_read_sidecar(Path(path)))
                self._listing.sidecars.append(Path(path))
            elif suffix == ".txt":
                self._listing.texts.append(OfferedFile(Path(path), self._statements(path)))
            else:
                self._listing.media.append(OfferedFile(Path(path), ()))
        except OSError as error:
            self._walk.refuse(path, *os_reason(error, path))
        except RowError as error:
            self._walk.refuse(path, error.reason, error.message)

    def _read_rows_file(self, path: str) -> bool:
        """Read a manifest; returns False for a file of texts, which is read later."""
        try:
            columns = columns_of(Path(path))
            if any(name in columns for name in PATH_COLUMNS):
                self._read_manifest(path)
                self._listing.manifests.append(Path(path))
            elif text_column(columns) is not None:
                return False
            else:
                expected = f"expected one of {', '.join(PATH_COLUMNS)} (a manifest) or text"
                self._walk.refuse(path, "NotMedia", f"found the columns {', '.join(columns)[:500]}, {expected}")
        except OSError as error:
            self._walk.refuse(path, *os_reason(error, path))
        except RowError as error:
            self._walk.refuse(path, error.reason, error.message)
        return True

    def _read_manifest(self, manifest: str) -> None:
        wanted = (*PATH_COLUMNS, *CAPTION_COLUMNS, *LICENCE_COLUMNS, *SOURCE_COLUMNS)
        for row in read_rows(Path(manifest), wanted):
            try:
                if row.error is not None:
                    raise row.error
                path = _row_path(row.values, manifest)
                self._offer_row(path, manifest)
                self._manifests_say.setdefault(path, []).append(_row_statement(row.values, manifest))
            except RowError as error:
                place = f"{manifest}#row={row.index}"
                self._walk.refused[place] = Refused(readable(place), error.reason, error.message)

    def _offer_row(self, path: str, manifest: str) -> None:
        if path == manifest:
            raise RowError("BrokenRow", "the manifest names itself")
        if path in self._walk.files:
            return
        try:
            mode = os.stat(path).st_mode
        except OSError as error:
            raise RowError(*os_reason(error, path)) from error
        if not stat.S_ISREG(mode):
            raise RowError("NotAFile", f"{readable(path)} is a folder, pipe or device; a manifest names files")
        self._walk.offer(path)

    def _statements(self, path: str) -> tuple[Statement, ...]:
        """What was said of a file, merged: a licence holds for every caption, and a caption is taken once."""
        said = self._manifests_say.get(path, []) + self._sidecars_say.get(os.path.splitext(path)[0], [])
        licence = next((s.licence for s in said if s.licence is not None), None)
        source = next((s.source for s in said if s.source is not None), None)
        manifest = next((s.manifest for s in said if s.manifest is not None), None)
        merged: dict[str | None, Statement] = {}
        for one in said:
            if one.caption is not None:
                stated = Statement(
                    one.caption,
                    one.caption_source,
                    one.licence or licence,
                    one.source or source,
                    one.manifest or manifest,
                )
                merged.setdefault(one.caption, stated)
        return tuple(merged.values()) or (Statement(licence=licence, source=source, manifest=manifest),)


def _is_rows(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in ROW_SUFFIXES


def _named_medium(path: str) -> bool:
    return named_kind(Path(path)) != "other"


def _row_path(values: Mapping[str, Any], manifest: str) -> str:
    value = next((values[name] for name in PATH_COLUMNS if values.get(name)), None)
    if not isinstance(value, str):
        raise RowError(
            "BrokenRow", f"found {value!r} as path, expected a file name in one of {', '.join(PATH_COLUMNS)}"
        )
    try:
        value.encode("utf-8")
        value = local_path(value)
        value.encode("utf-8")  # once more: a percent sign may stand for any byte
    except UnicodeEncodeError as error:
        raise RowError("NameNotUtf8", f"found the name {readable_text(value)!r}, which is not UTF-8") from error
    return os.path.abspath(os.path.join(os.path.dirname(manifest), value))


def _row_statement(values: Mapping[str, Any], manifest: str) -> Statement:
    caption = _said(values, CAPTION_COLUMNS)
    return Statement(
        caption=caption,
        caption_source=None if caption is None else "manifest",
        licence=_said(values, LICENCE_COLUMNS),
        source=_said(values, SOURCE_COLUMNS),
        manifest=manifest,
    )


def _read_sidecar(path: Path) -> Statement:
    """A caption file -> what it says. Raises: RowError if it is not what its name promises."""
    if path.stat().st_size > MAX_SIDECAR_BYTES:
        raise RowError("BrokenSidecar", f"found {path.stat().st_size} bytes, expected a caption")
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if path.suffix.lower() == ".txt":
            return Statement(caption=text.strip() or None, caption_source="sidecar_txt" if text.strip() else None)
        values = json.loads(text)
    except UnicodeDecodeError as error:
        raise RowError("BrokenSidecar", f"not UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        raise RowError("BrokenSidecar", f"not JSON: {error}") from error
    if not isinstance(values, dict):
        raise RowError("BrokenSidecar", f"found a JSON {type(values).__name__}, expected an object with a caption")
    try:
        caption = _said(values, CAPTION_COLUMNS)
        source = None if caption is None else "sidecar_json"
        return Statement(caption, source, _said(values, LICENCE_COLUMNS), _said(values, SOURCE_COLUMNS))
    except RowError as error:
        raise RowError("BrokenSidecar", error.message) from error


def _said(values: Mapping[str, Any], columns: Iterable[str]) -> str | None:
    """The first of some columns that says anything. Raises: RowError if it is no text."""
    for name in columns:
        value = values.get(name)
        if value is None or value == "":
            continue
        if not isinstance(value, str):
            raise RowError("BrokenRow", f"found {type(value).__name__} as {name}, expected a string")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowError("BrokenRow", f"found {name} {readable_text(value)!r}, which is not UTF-8") from error
        return value.strip() or None
    return None


def readable_text(text: str) -> str:
    """Text that may hold stray surrogates -> text that any table can hold."""
    return text.encode("utf-8", "backslashreplace").decode()


def os_reason(error: OSError, path: str | Path) -> tuple[str, str]:
    """What the file system answered -> a reason and a message."""
    if isinstance(error, FileNotFoundError):
        return "Missing", f"there is no such file {readable(path)!r}"
    if isinstance(error, PermissionError):
        return "NotPermitted", f"the file may not be read: {error.strerror}"
    if error.errno == errno.ELOOP:
        return "LinkLoop", "found a link that leads to itself"
    return "NotReadable", f"the file cannot be read: {error.strerror or error}"
