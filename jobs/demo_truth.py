"""What was planted in the demo's corpus, held against what the lake says of it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from jobs.curate import explain_clips
from jobs.demo_corpus import FileTruth, load_truth
from jobs.shapes import ShapeFacts, parse_caption
from pipeline.rules import CurateRecipe
from schemas.catalog import Lake
from schemas.clips import CLIPS, SCANS
from schemas.media import LOCATIONS
from schemas.runs import ATTEMPTS


@dataclass(frozen=True)
class Finding:
    """One planted file: what must become of it, what became of it, and whether that is the same."""

    path: str
    what: str
    expected: str
    found: str
    ok: bool


@dataclass(frozen=True)
class _Seen:
    """Everything the lake says, by the path of the file."""

    media_id: Mapping[str, str]
    attempts: Mapping[str, list[dict[str, Any]]]
    cuts: Mapping[str, list[int]]
    clips: Mapping[str, list[str]]
    rejects: Mapping[str, set[str]]
    kept: set[str]


def clip_places(lake: Lake) -> dict[str, dict[str, Any]]:
    """Every clip by its id, with a place of its medium as `uri`."""
    places = {
        row["media_id"]: row["uri"] for row in lake.read(LOCATIONS, ["media_id", "uri"]).sort_by("uri").to_pylist()
    }
    columns = ["clip_id", "media_id", "kind", "start_ms", "end_ms"]
    return {row["clip_id"]: {**row, "uri": places[row["media_id"]]} for row in lake.read(CLIPS, columns).to_pylist()}


@dataclass(frozen=True)
class ShownClip:
    """A clip of the corpus that nobody named: where it is, and what it shows by the corpus' truth."""

    clip_id: str
    place: Mapping[str, Any]
    facts: ShapeFacts


def shown_clips(lake: Lake, truth_path: Path, what: str) -> list[ShownClip]:
    """The clips of files that are `what`, and came without a caption, in the order of ids."""
    files = load_truth(truth_path).files
    shows = {str(truth_path.parent / file.path): file.shows for file in files if file.what == what}
    found = []
    for clip_id, place in sorted(clip_places(lake).items()):
        facts = parse_caption(shows.get(place["uri"]) or "")
        if facts is not None:
            found.append(ShownClip(clip_id, place, facts))
    return found


def check_truth(lake: Lake, truth_path: Path, recipe: CurateRecipe) -> list[Finding]:
    """Every image and video of the corpus -> what was expected and found, cuts first, then its fate under the recipe."""
    truth = load_truth(truth_path)
    seen = _see(lake, truth_path.parent, recipe, {file.rule for file in truth.files if file.rule})
    return [finding for file in truth.files if file.kind != "text" for finding in _check(file, seen)]


def _see(lake: Lake, corpus: Path, recipe: CurateRecipe, rules: set[str]) -> _Seen:
    prefix = f"{corpus.resolve()}/"
    media_id: dict[str, str] = {}
    path_of: dict[str, str] = {}
    for row in lake.read(LOCATIONS, ["media_id", "uri"]).sort_by("uri").to_pylist():
        media_id[row["uri"].removeprefix(prefix)] = row["media_id"]
        path_of[row["media_id"]] = row["uri"].removeprefix(prefix)
    attempts: dict[str, list[dict[str, Any]]] = {}
    for row in lake.read(ATTEMPTS).to_pylist():
        if row["uri"]:
            attempts.setdefault(row["uri"].removeprefix(prefix), []).append(row)
    clips: dict[str, list[str]] = {}
    for row in lake.read(CLIPS, ["clip_id", "media_id"]).sort_by("clip_id").to_pylist():
        clips.setdefault(row["media_id"], []).append(row["clip_id"])
    cuts = {row["media_id"]: row["cuts"] for row in lake.read(SCANS, ["media_id", "cuts"]).to_pylist()}
    rejects = {rule: set(_rejected(explain_clips(lake, _only(recipe, rule)))) for rule in sorted(rules)}
    whole = explain_clips(lake, recipe)
    return _Seen(media_id, attempts, cuts, clips, rejects, set(whole["clip_id"].to_pylist()) - set(_rejected(whole)))


def _only(recipe: CurateRecipe, rule: str) -> CurateRecipe:
    """The recipe with one rule left: does that rule refuse a clip, whatever the others say?"""
    pins = recipe.model_dump(include={"kinds", "coverage", "segmentation_id", "scorers"})
    return CurateRecipe.model_validate({**pins, rule: getattr(recipe, rule)})


def _rejected(verdicts: pa.Table) -> Iterator[str]:
    for row in verdicts.to_pylist():
        if row["verdict"] == "rejected":
            yield row["clip_id"]


def _check(file: FileTruth, seen: _Seen) -> Iterator[Finding]:
    if file.outcome == "failed":
        reasons = [f"{row['stage']}: {row['error_class']}" for row in seen.attempts.get(file.path, [])]
        yield _finding(file, f"{file.stage}: {file.reason}", ", ".join(reasons) or "no failure")
        return
    medium = seen.media_id.get(file.path)
    if medium is None:
        yield _finding(file, file.outcome, "not in the lake")
        return
    if file.kind == "video":
        yield _check_cuts(file, seen.cuts.get(medium, []))
    clips = seen.clips.get(medium, [])
    if file.outcome == "kept":
        missing = [clip for clip in clips if clip not in seen.kept]
        yield _finding(
            file, "kept", "kept" if clips and not missing else f"{len(missing)} of {len(clips)} clips rejected"
        )
    else:
        rejected = [clip for clip in clips if clip in seen.rejects[file.rule or ""]]
        all_out = clips and len(rejected) == len(clips) and not seen.kept.intersection(clips)
        found = (
            f"rejected by {file.rule}" if all_out else f"{len(rejected)} of {len(clips)} clips rejected by {file.rule}"
        )
        yield _finding(file, f"rejected by {file.rule}", found)


def _check_cuts(file: FileTruth, cuts: Sequence[int]) -> Finding:
    """Hard cuts on their exact frame, fades within their tolerance, and no other."""
    hard, fades = list(file.cut_frames), list(file.fades)
    expected = ", ".join(sorted([str(frame) for frame in hard] + [f"{f.frame}±{f.tolerance_frames}" for f in fades]))
    left = [cut for cut in cuts if cut not in hard]
    near = all(any(abs(cut - fade.frame) <= fade.tolerance_frames for cut in left) for fade in fades)
    ok = set(hard) <= set(cuts) and near and len(left) == len(fades)
    return Finding(file.path, file.what, f"cuts [{expected}]", f"cuts {list(cuts)}", ok)


def _finding(file: FileTruth, expected: str, found: str) -> Finding:
    return Finding(file.path, file.what, expected, found, expected == found)
