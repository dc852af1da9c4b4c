"""Ingest: media and texts become known to the lake. The bytes stay where they are; every file offered is accounted for.

A medium is its bytes: the same bytes under two names are one medium with two locations. What cannot be read is a row in
`attempts` under the name of the file; the row's stage id covers the digest, so a file that failed for good is not tried
again while its bytes are the same, and is the moment they change. Everything is hashed on every run, for a size and a
time say nothing certain of the content, but only media that are new are opened. Rows are published as the run goes on.
"""

import json
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from pydantic import Field

from jobs.run import recorded
from pipeline.failures import REJECTIONS, FailureBound
from pipeline.list_sources import Listing, OfferedFile, list_sources, os_reason, readable
from pipeline.media_limits import MediaLimits
from pipeline.probe_media import MediumFacts, named_kind, probe
from pipeline.read_rows import ROW_SUFFIXES
from pipeline.read_texts import BrokenText, Text, read_texts
from pipeline.sandbox import Sandbox
from pipeline.stage import MAX_ATTEMPTS, attempt_row
from schemas.catalog import Lake
from schemas.errors import RowError
from schemas.identity import file_digest, media_id
from schemas.media import LOCATIONS, MEDIA
from schemas.recipe import Config, short_hash
from schemas.runs import ATTEMPTS
from schemas.texts import TEXTS

STAGE = "ingest"
NUM_SHOWN = 20
MAX_MESSAGE = 200  # characters of a message for people; `attempts` has it whole

OnProgress = Callable[[int, int, str], None]
"""Called with files done, files in all, and the last one's name."""


class IngestConfig(Config):
    """How media are opened for the first time, and how often what was found is published."""

    timeout_s: float = Field(default=60.0, gt=0)
    memory_mb: int = Field(default=4096, gt=0)
    max_bytes: int = Field(default=1 << 38, gt=0)
    """Of one file: a larger one, such as a sparse file of nothing, is not even hashed."""
    limits: MediaLimits = MediaLimits()
    failures: FailureBound = FailureBound()
    commit_files: int = Field(default=512, gt=0)
    commit_bytes: int = Field(default=16 << 30, gt=0)


@dataclass(frozen=True)
class Failure:
    """Something offered that gave nothing: where, why, and what was found."""

    uri: str
    reason: str
    message: str


@dataclass
class IngestReport:
    """What was offered and what became of it.

    `offered` = `media_files` + `text_files` + `sidecars` + `manifests` + everything in `rejected` and in `failed`, always.
    """

    offered: int = 0
    media_files: int = 0
    text_files: int = 0
    sidecars: int = 0
    manifests: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    """By reason: what is nothing to be read, or is beyond a limit."""
    failed: dict[str, int] = field(default_factory=dict)
    """By reason: what should have been read and could not."""
    media_new: int = 0
    locations_new: int = 0
    text_rows: int = 0
    texts_new: int = 0
    failures: list[Failure] = field(default_factory=list)
    """The first few, for people; all of them are in `attempts`."""

    @property
    def num_rejected(self) -> int:
        """Files and rows that were refused."""
        return sum(self.rejected.values())

    @property
    def num_failed(self) -> int:
        """Files and rows that could not be read."""
        return sum(self.failed.values())

    @property
    def balances(self) -> bool:
        """Whether everything offered is accounted for."""
        named = self.media_files + self.text_files + self.sidecars + self.manifests
        return self.offered == named + self.num_rejected + self.num_failed


def ingest(
    lake: Lake,
    sources: Sequence[str | Path],
    *,
    options: IngestConfig,
    on_progress: OnProgress | None = None,
    retry_failed: bool = False,
    on_report: Callable[[IngestReport], None] | None = None,
) -> IngestReport:
    """Files, folders, globs and manifests -> rows of `media`, `media_locations`, `texts` and `attempts`.

    `on_report` is called with the balance before it is held against the bound on failures.

    Raises: ConfigError if a source is not there; nothing has been written then. FailureRateError if more media, or more
        texts, could not be read than the recipe allows; what could be is kept.
    """
    listing = list_sources(sources)
    offered = [readable(os.path.abspath(source)) for source in sources]
    with recorded(lake, STAGE, options, {"sources": offered}) as run:
        job = _Ingest(lake, options, run.run_id, listing, on_progress or _silent, retry_failed)
        report = job.run()
        run.outcome |= {name: value for name, value in asdict(report).items() if name != "failures"}
        assert report.balances, report
        if on_report is not None:
            on_report(report)
        options.failures.check("media", report.media_files, job.failed_media)
        options.failures.check("texts", report.text_rows, job.failed_texts)
    return report


def print_ingest(report: IngestReport, as_json: bool) -> None:
    """A report -> stdout, for people with the balance spelled out, or as one JSON document."""
    if as_json:
        print(json.dumps(asdict(report)))
        return
    print(
        f"offered {report.offered} = {report.media_files} media files + {report.text_files} text files "
        f"+ {report.sidecars} sidecars + {report.manifests} manifests + {report.num_rejected} rejected "
        f"+ {report.num_failed} failed"
    )
    if not report.offered:
        print("found no file in what was given: nothing was done")
    new = f"{report.media_new} media, {report.locations_new} locations, {report.texts_new} of {report.text_rows} texts"
    print(f"new: {new}")
    for how, counts in (("rejected", report.rejected), ("failed", report.failed)):
        for reason, count in sorted(counts.items()):
            print(f"{how}: {count} {reason}")
    for failure in report.failures:
        print(f"  {failure.reason}: {failure.uri!r}: {failure.message[:MAX_MESSAGE]}", file=sys.stderr)
    num_left = report.num_rejected + report.num_failed - len(report.failures)
    if num_left:
        print(f"  and {num_left} more: outback show attempts", file=sys.stderr)


@dataclass(frozen=True)
class _Looked:
    """What one look at a file gave: the medium's row if it is new, or the failure, or neither if it was known."""

    file: OfferedFile
    medium: Mapping[str, Any] | None = None
    medium_id: str = ""
    error: RowError | None = None
    stage_id: str = ""
    attempt: int = 1
    known: bool = False


class _Ingest:
    """One run over a listing."""

    def __init__(
        self,
        lake: Lake,
        options: IngestConfig,
        run_id: str,
        listing: Listing,
        advance: OnProgress,
        retry_failed: bool,
    ) -> None:
        self._lake, self._options, self._run_id, self._listing = lake, options, run_id, listing
        self._advance, self._retry_failed = advance, retry_failed
        self.failed_media = Counter(refused.reason for refused in listing.refused)
        self.failed_texts: Counter[str] = Counter()
        self._done, self._total = 0, len(listing.media) + len(listing.texts)
        self._known: set[str] = set(lake.read(MEDIA, ["media_id"])["media_id"].to_pylist())
        self._failed_before = _earlier_attempts(lake)
        self._report = IngestReport(
            offered=listing.num_offered, sidecars=len(listing.sidecars), manifests=len(listing.manifests)
        )

    def run(self) -> IngestReport:
        """Publish what was refused, then media, then texts."""
        refused = [self._attempt(r.uri, RowError(r.reason, r.message), r.uri) for r in self._listing.refused]
        self._append_attempts(refused)
        with _Prober(self._options) as prober:
            for part in _parts(self._listing.media, self._options):
                self._publish_media(list(self._progressing(prober.map(self._look, part))))
        self._read_texts()
        return self._report

    # --- media ---

    def _look(self, file: OfferedFile, open_medium: Callable[[Path], MediumFacts]) -> _Looked:
        """Hash a file, and open it if its content is new. Never raises for what the file holds."""
        stage_id = self._stage_id("")
        attempt = 1
        try:
            before = file.path.stat()
            if before.st_size > self._options.max_bytes:
                found = f"found {before.st_size} bytes; the limit is max_bytes={self._options.max_bytes}"
                raise RowError("TooManyBytes", found)
            digest = file_digest(file.path)
            stage_id = self._stage_id(digest)
            medium_id = media_id(digest)
            if medium_id in self._known:
                return _Looked(file, medium_id=medium_id)
            earlier = self._failed_before.get((stage_id, str(file.path)), [])
            if not self._retry_failed and (len(earlier) >= MAX_ATTEMPTS or any(one["terminal"] for one in earlier)):
                last = max(earlier, key=lambda one: int(one["attempt"]))
                return _Looked(file, error=RowError(last["error_class"], last["message"]), known=True)
            attempt = max((int(one["attempt"]) for one in earlier), default=0) + 1
            facts = open_medium(file.path)
            after = file.path.stat()
            if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                raise RowError("Changed", "the file was written to while it was read", terminal=False)
        except RowError as error:
            return _Looked(file, error=_told_apart(file.path, error), stage_id=stage_id, attempt=attempt)
        except OSError as error:
            return _Looked(file, error=RowError(*os_reason(error, file.path)), stage_id=stage_id)
        row = {"media_id": medium_id, "digest": digest, "num_bytes": before.st_size, **_columns(facts)}
        return _Looked(file, medium=row, medium_id=medium_id)

    def _publish_media(self, looked: Sequence[_Looked]) -> None:
        """Media before their locations, so that a location always names a medium."""
        media = [one.medium for one in looked if one.medium is not None]
        self._report.media_new += self._lake.append(MEDIA, media, self._run_id)
        self._known.update(str(row["media_id"]) for row in media)
        found = [one for one in looked if one.error is None]
        self._report.media_files += len(found)
        places = [_location(one.medium_id, one.file, said) for one in found for said in one.file.statements]
        self._report.locations_new += self._lake.append(LOCATIONS, places, self._run_id)
        attempts = []
        for one in looked:
            if one.error is not None:
                uri = str(one.file.path)
                self.failed_media[one.error.reason] += 1
                row = self._attempt(uri, one.error, uri, one.stage_id, one.attempt)
                attempts += [] if one.known else [row]
        self._append_attempts(attempts)

    # --- texts ---

    def _read_texts(self) -> None:
        rows: list[dict[str, object]] = []
        num_chars = 0
        for file in self._progressing_files(self._listing.texts):
            for text in self._texts_of(file):
                rows.append(
                    {
                        "text_id": text.text_id,
                        "text": text.text,
                        "uri": str(file.path),
                        "row": text.row,
                        "licence": text.licence,
                    }
                )
                num_chars += len(text.text)
                if len(rows) >= 8192 or num_chars >= 32 << 20:
                    self._publish_texts(rows)
                    rows, num_chars = [], 0
        self._publish_texts(rows)

    def _texts_of(self, file: OfferedFile) -> Iterator[Text]:
        """Documents of a file. A broken row is offered and failed by itself; a broken file failed as a whole."""
        uri = str(file.path)
        is_rows = file.path.suffix.lower() in ROW_SUFFIXES
        broken = []
        try:
            for item in read_texts(file.path, file.statements[0].licence):
                if isinstance(item, BrokenText) and not is_rows:
                    raise item.error
                if isinstance(item, BrokenText):
                    self._report.offered += 1
                    broken.append(self._attempt(f"{uri}#row={item.row}", item.error, uri))
                else:
                    yield item
            self._report.text_files += 1
        except RowError as error:
            broken.append(self._attempt(uri, error, uri))
        except OSError as error:
            broken.append(self._attempt(uri, RowError(*os_reason(error, file.path)), uri))
        self.failed_texts.update(str(row["error_class"]) for row in broken)
        self._append_attempts(broken)

    def _publish_texts(self, rows: list[dict[str, object]]) -> None:
        self._report.text_rows += len(rows)
        self._report.texts_new += self._lake.append(TEXTS, rows, self._run_id)

    # --- failures ---

    def _attempt(
        self, item_id: str, error: RowError, uri: str, stage_id: str = "", attempt: int = 1
    ) -> dict[str, object]:
        """Count a failure, and give its row."""
        counts = self._report.rejected if error.reason in REJECTIONS else self._report.failed
        counts[error.reason] = counts.get(error.reason, 0) + 1
        if len(self._report.failures) < NUM_SHOWN:
            self._report.failures.append(Failure(item_id, error.reason, error.message))
        return attempt_row(STAGE, stage_id or self._stage_id(""), item_id, error, attempt=attempt, uri=uri)

    def _append_attempts(self, rows: Sequence[Mapping[str, object]]) -> None:
        self._lake.append(ATTEMPTS, rows, self._run_id)

    def _stage_id(self, digest: str) -> str:
        limits = self._options.model_dump(mode="json", include={"timeout_s", "memory_mb", "max_bytes", "limits"})
        return short_hash([STAGE, limits, digest])

    # --- progress ---

    def _progressing(self, looked: Iterable[_Looked]) -> Iterator[_Looked]:
        for one in looked:
            self._done += 1
            self._advance(self._done, self._total, one.file.path.name)
            yield one

    def _progressing_files(self, files: Iterable[OfferedFile]) -> Iterator[OfferedFile]:
        for file in files:
            yield file
            self._done += 1
            self._advance(self._done, self._total, file.path.name)


class _Prober:
    """Threads that look at files, each with a child process of its own that opens media and may die doing so."""

    def __init__(self, options: IngestConfig) -> None:
        self._options = options
        self._local = threading.local()
        self._sandboxes: list[Sandbox] = []
        self._threads = ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0)), thread_name_prefix="probe")

    def __enter__(self) -> "_Prober":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        for sandbox in self._sandboxes:
            sandbox.close()

    def map(self, look: Callable[..., _Looked], files: Iterable[OfferedFile]) -> Iterator[_Looked]:
        """Files -> what `look` says of each, in order."""
        return self._threads.map(lambda file: look(file, self._open_medium), files)

    def _open_medium(self, path: Path) -> MediumFacts:
        sandbox = getattr(self._local, "sandbox", None)
        if sandbox is None:
            sandbox = self._local.sandbox = Sandbox(self._options.timeout_s, self._options.memory_mb)
            self._sandboxes.append(sandbox)
        facts: MediumFacts = sandbox.run(probe, path, self._options.limits)
        return facts


def _silent(done: int, total: int, note: str) -> None:
    """Progress for nobody."""


def _parts(files: Sequence[OfferedFile], options: IngestConfig) -> Iterator[list[OfferedFile]]:
    """Files -> lists small enough that little is lost when a run is killed between two commits."""
    part: list[OfferedFile] = []
    num_bytes = 0
    for file in files:
        part.append(file)
        try:
            num_bytes += file.path.stat().st_size
        except OSError:
            num_bytes += 0  # its reason is found when it is read
        if len(part) >= options.commit_files or num_bytes >= options.commit_bytes:
            yield part
            part, num_bytes = [], 0
    if part:
        yield part


def _earlier_attempts(lake: Lake) -> dict[tuple[str, str], list[dict[str, Any]]]:
    columns = ["stage", "stage_id", "item_id", "attempt", "error_class", "message", "terminal"]
    rows = lake.read(ATTEMPTS, columns)
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows.filter(pc.equal(rows["stage"], STAGE)).to_pylist():
        found.setdefault((row["stage_id"], row["item_id"]), []).append(row)
    return found


def _told_apart(path: Path, error: RowError) -> RowError:
    """A file that holds no medium and was not named as one is not a broken medium."""
    if error.reason not in ("Unreadable", "NoVideoStream", "Empty") or named_kind(path) != "other":
        return error
    return RowError("NotMedia", f"{path.name} is no medium, text, sidecar or manifest")


def _columns(facts: MediumFacts) -> dict[str, Any]:
    return {name: value for name, value in asdict(facts).items() if name in MEDIA.names}


def _location(medium_id: str, file: OfferedFile, said: Any) -> dict[str, object]:
    stated = asdict(said)
    uri = str(file.path)
    return {"location_id": short_hash([medium_id, uri, stated]), "media_id": medium_id, "uri": uri, **stated}
