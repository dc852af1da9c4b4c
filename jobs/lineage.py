"""Lineage: from one generation back to every file that had a part in it, by id and by place.

generation -> checkpoint -> runs; the checkpoint that it began with; sequence set -> sequences -> clips and texts -> media ->
locations; preference set -> pairs -> generations -> the checkpoints that drew them; the captions that the documents had ->
captioner, prompt and the frames that were shown to it; and the same for the vision tokenizer that drew the pixels and for
captioners of this lake, whose trainings read curated sets.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.read_frames import moments
from schemas.captions import CAPTIONERS, CAPTIONS
from schemas.catalog import Lake
from schemas.checkpoints import CHECKPOINTS
from schemas.clips import CLIPS
from schemas.curated import CURATED, CURATED_SETS
from schemas.errors import ConfigError
from schemas.generations import GENERATIONS, PREFERENCE_PAIRS, PREFERENCE_SETS
from schemas.media import LOCATIONS, MEDIA
from schemas.runs import RUNS
from schemas.sequences import SEQUENCE_SETS, SEQUENCES
from schemas.table import Table
from schemas.texts import TEXTS
from schemas.vision_tokens import TOKENIZERS

Row = dict[str, Any]
NUM_SHOWN = 8
ANY_WIDTH = 100_000


@dataclass(frozen=True)
class Data:
    """What something was made from: clips, their media with every known location, captions that were learnt, and texts."""

    clips: tuple[Row, ...]
    media: tuple[Row, ...]
    texts: tuple[Row, ...]
    captions: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Captioner:
    """Who wrote captions: its row, with prompt, sampling and windows as values, and its training if this lake has it."""

    captioner: Row
    training: "Training | None"


@dataclass(frozen=True)
class Preferences:
    """The sets of pairs that a model learnt from, their pairs and generations, and the trainings of the checkpoints that drew
    them, without the one that the model began with.
    """

    sets: tuple[Row, ...]
    pairs: tuple[Row, ...]
    generations: tuple[Row, ...]
    drawn_by: "tuple[Training, ...]"


@dataclass(frozen=True)
class Training:
    """A checkpoint, the runs that trained it, the data that it saw, and whose captions those were. A model that learnt
    preferences has seen clips where its drawings continue some.
    """

    checkpoint: Row
    runs: tuple[Row, ...]
    curated_sets: tuple[Row, ...]
    sequence_sets: tuple[Row, ...]
    sequences: tuple[Row, ...]
    data: Data
    captioners: tuple[Captioner, ...] = ()
    start: "Training | None" = None
    preferences: Preferences | None = None


@dataclass(frozen=True)
class Lineage:
    """Everything behind one generation. `missing` names what the lake should hold for it and does not."""

    generation: Row
    training: Training | None
    tokenizer: Row | None
    tokenizer_training: Training | None
    context: Data | None
    missing: tuple[str, ...]


def trace(lake: Lake, generation: str) -> Lineage:
    """A generation id, or a beginning that only one has -> what it was made from.

    Raises: ConfigError if none or several fit.
    """
    return _Tracer(lake).trace(generation)


def print_trace(lineage: Lineage, as_json: bool) -> None:
    """A lineage -> a tree for people, or one JSON document with every id and location."""
    if as_json:
        print(json.dumps(asdict(lineage), default=str, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree

    made = lineage.generation
    root = Tree(Text(f"generation {made['generation_id']}  {made['kind']}  {made['prompt']!r}  {made['uri']}"))
    for heading, lines in _outline(lineage):
        branch = root.add(Text(heading))
        for depth, line in lines:
            parent = branch
            for _ in range(depth):
                parent = parent.children[-1]
            parent.add(Text(line))
    for what in lineage.missing:
        root.add(Text(f"missing: {what}"))
    console = Console()
    # A terminal wraps inside the tree. A pipe has no width: no line of it is cut.
    Console(width=None if console.is_terminal else ANY_WIDTH).print(root)


class _Tracer:
    """Looks rows up by id, and notes those that are not there."""

    def __init__(self, lake: Lake) -> None:
        self._lake = lake
        self._missing: list[str] = []

    def trace(self, generation: str) -> Lineage:
        """A generation id or the beginning of one -> its lineage."""
        made = self._generation(generation)
        tokenizer = self._one(TOKENIZERS, "tokenizer_id", made["tokenizer_id"])
        clip_id = made["continued_clip_id"]
        return Lineage(
            generation=made,
            training=self._training(made["checkpoint_id"]),
            tokenizer=tokenizer,
            tokenizer_training=self._training(tokenizer["checkpoint_id"]) if tokenizer else None,
            context=self._data([clip_id], []) if clip_id else None,
            missing=tuple(dict.fromkeys(self._missing)),
        )

    def _generation(self, beginning: str) -> Row:
        ids = self._lake.read(GENERATIONS, ["generation_id"])["generation_id"].to_pylist()
        found = sorted(one for one in ids if one.startswith(beginning))
        if beginning in found:
            found = [beginning]
        if len(found) != 1:
            which = f"; they are {', '.join(found[:NUM_SHOWN])}" if found else ""
            raise ConfigError(f"{beginning!r} begins {len(found)} of {len(ids)} generation ids, expected one{which}")
        columns = [name for name in GENERATIONS.names if name != "tokens"]
        return _plain(self._lake.read_where(GENERATIONS, "generation_id", found, columns))[0]

    def _training(self, checkpoint_id: str) -> Training | None:
        columns = [name for name in CHECKPOINTS.names if name != "losses"]
        checkpoint = self._one(CHECKPOINTS, "checkpoint_id", checkpoint_id, columns)
        if checkpoint is None:
            return None
        checkpoint["recipe"] = json.loads(checkpoint["recipe"])
        data_id, start_id = checkpoint["data_id"], checkpoint["start_id"]
        # Published weights to begin with have no row here: they are named, and nothing is missing.
        is_ours = start_id not in (None, checkpoint_id) and self._many(
            CHECKPOINTS, "checkpoint_id", start_id, ["checkpoint_id"]
        )
        start = self._training(start_id) if is_ours else None
        runs = self._runs(checkpoint)
        preferred = self._many(PREFERENCE_SETS, "pairset_id", data_id, _all_but(PREFERENCE_SETS, "text_tokenizer"))
        if preferred:
            preferences = self._preferences(preferred, {checkpoint_id, start_id})
            given = {row["continued_clip_id"] for row in preferences.generations} - {None}
            data = self._data(given, [])
            return Training(checkpoint, runs, (), (), (), data, start=start, preferences=preferences)
        packed = self._many(SEQUENCE_SETS, "seqset_id", data_id, _all_but(SEQUENCE_SETS, "text_tokenizer"))
        curated_ids = sorted({one for row in packed for one in row["curated_ids"]}) if packed else [data_id]
        curated = self._many(CURATED_SETS, "curated_id", curated_ids, ["name", "curated_id", "recipe_id", "num_clips"])
        sequences: tuple[Row, ...] = ()
        if packed:
            columns = ["seqset_id", "seq_index", "num_tokens", "segments", "captioner_ids", "chats"]
            sequences = self._many(SEQUENCES, "seqset_id", data_id, columns)
            items = [segment for row in sequences for segment in row["segments"]]
            clip_ids = {item["item_id"] for item in items if item["kind"] in ("image", "video")}
            clip_ids |= {clip for row in sequences for chat in row["chats"] or () for clip in chat["clip_ids"]}
            captions = self._captions(_packed_captions(sequences))
            data = self._data(clip_ids, {item["item_id"] for item in items if item["kind"] == "text"}, captions)
        else:
            clip_ids = {row["clip_id"] for row in self._many(CURATED, "curated_id", data_id, ["clip_id"])}
            learnt = (checkpoint["recipe"].get("examples") or {}).get("captioner")
            captions = self._captions({learnt: clip_ids}, written_before=checkpoint["written_at"]) if learnt else ()
            data = self._data(clip_ids, [], captions)
        if not packed and not curated:
            self._missing.append(f"data {data_id} of checkpoint {checkpoint_id}")
        captioners = tuple(self._captioner(one) for one in sorted({row["captioner_id"] for row in captions}))
        return Training(checkpoint, runs, curated, packed, sequences, data, captioners, start)

    def _preferences(self, sets: tuple[Row, ...], known: set[str | None]) -> Preferences:
        """Sets -> their pairs and everything behind them but the trainings of `known` checkpoints."""
        pair_ids = {one for row in sets for one in row["pair_ids"]}
        pairs = self._all_of(PREFERENCE_PAIRS, "pair_id", pair_ids, PREFERENCE_PAIRS.names)
        ids = {row[side] for row in pairs for side in ("chosen_id", "rejected_id")}
        made = self._all_of(GENERATIONS, "generation_id", ids, _all_but(GENERATIONS, "tokens"))
        found = [self._training(one) for one in sorted({row["checkpoint_id"] for row in made} - known)]
        return Preferences(
            sets,
            tuple(sorted(pairs, key=lambda row: str(row["pair_id"]))),
            tuple(sorted(made, key=lambda row: str(row["generation_id"]))),
            tuple(training for training in found if training is not None),
        )

    def _captions(self, wanted: Mapping[str, set[str]], *, written_before: datetime | None = None) -> tuple[Row, ...]:
        """Captioner ids, each with the clips whose captions by it were learnt -> those captions, and the moments whose
        frames were shown for each. Documents have the caption of a clip's first window; a captioner has learnt those of all
        windows that were there when it was trained.
        """
        rows = self._lake.read_where(CAPTIONS, "captioner_id", sorted(wanted), _CAPTION_COLUMNS).to_pylist()
        found = [row for row in rows if row["clip_id"] in wanted[row["captioner_id"]] and row["problem"] is None]
        if written_before is not None:
            found = [row for row in found if row["written_at"] <= written_before]
        else:
            found = [row for row in found if row["window"] == 0]
            lost = {(who, clip) for who, clips in wanted.items() for clip in clips}
            lost -= {(row["captioner_id"], row["clip_id"]) for row in found}
            self._missing += [f"caption of clip {clip} by {who}" for who, clip in sorted(lost)]
        for row in found:
            if row["num_frames"] is not None:
                start_s, end_s = row["window_start_ms"] / 1000, row["window_end_ms"] / 1000
                row["frame_ms"] = [round(1000 * at) for at in moments(start_s, end_s, None, row["num_frames"])]
        return tuple(sorted(found, key=lambda row: (row["clip_id"], row["window"], row["captioner_id"])))

    def _captioner(self, captioner_id: str) -> Captioner:
        row = self._one(CAPTIONERS, "captioner_id", captioner_id)
        if row is None:
            return Captioner({"captioner_id": captioner_id}, None)
        captioner = {
            name: json.loads(value) if name in _JSON_COLUMNS and value else value for name, value in row.items()
        }
        trained = self._lake.read_where(CHECKPOINTS, "uri", [row["model"]], ["checkpoint_id"])[
            "checkpoint_id"
        ].to_pylist()
        return Captioner(captioner, self._training(trained[0]) if trained else None)

    def _runs(self, checkpoint: Row) -> tuple[Row, ...]:
        """The runs of a training: the one that finished it, and those it was resumed from."""
        rows = self._lake.read(RUNS, ["run_id", "status", "job", "inputs", "code_version", "written_at"]).to_pylist()
        ids = {checkpoint["run_id"]}
        ids |= {
            row["run_id"] for row in rows if json.loads(row["inputs"]).get("training_id") == checkpoint["training_id"]
        }
        found: dict[str, Row] = {}
        for row in sorted((row for row in rows if row["run_id"] in ids), key=lambda row: row["written_at"]):
            run = found.setdefault(row["run_id"], {"run_id": row["run_id"], "job": row["job"], "status": "killed"})
            run["code_version"] = row["code_version"]
            run["status" if row["status"] != "started" else "started_at"] = (
                row["status"] if row["status"] != "started" else row["written_at"].isoformat()
            )
        self._missing += [f"run {one}" for one in sorted(ids - set(found))]
        return tuple(found.values())

    def _data(self, clip_ids: Iterable[str], text_ids: Iterable[str], captions: tuple[Row, ...] = ()) -> Data:
        clips = {row["clip_id"]: row for row in self._all_of(CLIPS, "clip_id", clip_ids, _CLIP_COLUMNS)}
        media_ids = {row["media_id"] for row in clips.values()}
        media = {
            row["media_id"]: {**row, "locations": []}
            for row in self._all_of(MEDIA, "media_id", media_ids, _MEDIA_COLUMNS)
        }
        for row in self._all_of(LOCATIONS, "media_id", media_ids, ["media_id", *_LOCATION_COLUMNS]):
            if row["media_id"] in media:
                media[row["media_id"]]["locations"].append({name: row[name] for name in _LOCATION_COLUMNS})
        texts = {
            row["text_id"]: row
            for row in self._all_of(TEXTS, "text_id", text_ids, ["text_id", "uri", "row", "licence"])
        }
        return Data(_in_order(clips), _in_order(media), _in_order(texts), captions)

    def _all_of(self, table: Table, column: str, wanted: Iterable[str], columns: Sequence[str]) -> list[Row]:
        """The rows of some ids; ids without a row are missing."""
        ids = set(wanted)
        if not ids:
            return []
        rows = self._lake.read(table, columns)
        found = _plain(rows.filter(pc.is_in(rows[column], value_set=pa.array(sorted(ids), pa.string()))))
        self._missing += [f"{column} {one} in {table.name}" for one in sorted(ids - {row[column] for row in found})]
        return found

    def _many(self, table: Table, column: str, wanted: str | Sequence[str], columns: Sequence[str]) -> tuple[Row, ...]:
        values = [wanted] if isinstance(wanted, str) else list(wanted)
        rows = _plain(self._lake.read_where(table, column, values, columns))
        return tuple(sorted(rows, key=lambda row: tuple(row[name] for name in table.key if name in row)))

    def _one(self, table: Table, column: str, wanted: str, columns: Sequence[str] | None = None) -> Row | None:
        found = self._many(table, column, wanted, columns or table.names)
        if not found:
            self._missing.append(f"{column} {wanted} in {table.name}")
        return found[0] if found else None


_CLIP_COLUMNS = ["clip_id", "media_id", "kind", "start_ms", "end_ms"]
_MEDIA_COLUMNS = ["media_id", "digest", "kind"]
_LOCATION_COLUMNS = ["uri", "licence", "source", "manifest"]
_CAPTION_COLUMNS = [
    "clip_id", "window", "captioner_id", "text", "problem", "window_start_ms", "window_end_ms", "num_frames",
    "written_at",
]  # fmt: skip
_JSON_COLUMNS = ("prompt", "sampling", "windowing", "checks")


def _packed_captions(sequences: Sequence[Row]) -> dict[str, set[str]]:
    """Captioner id -> the clips whose documents have a caption by it."""
    found: dict[str, set[str]] = {}
    for row in sequences:
        for segment, captioner_id in zip(row["segments"], row["captioner_ids"] or [], strict=False):
            if captioner_id is not None:
                found.setdefault(captioner_id, set()).add(segment["item_id"])
    return found


def _all_but(table: Table, *names: str) -> list[str]:
    return [name for name in table.names if name not in names]


def _plain(rows: pa.Table) -> list[Row]:
    found: list[Row] = rows.to_pylist()
    return found


def _in_order(rows: Mapping[str, Row]) -> tuple[Row, ...]:
    for row in rows.values():
        if "locations" in row:
            row["locations"].sort(key=lambda place: place["uri"])
    return tuple(rows[key] for key in sorted(rows))


# --- the tree ---

Lines = list[tuple[int, str]]


def _outline(lineage: Lineage) -> list[tuple[str, Lines]]:
    branches = []
    if lineage.training is not None:
        branches.append((f"checkpoint {_checkpoint(lineage.training)}", _training_lines(lineage.training)))
    if lineage.tokenizer_training is not None and lineage.tokenizer is not None:
        heading = f"vision tokenizer {lineage.tokenizer['tokenizer_id']}, checkpoint "
        heading += _checkpoint(lineage.tokenizer_training)
        branches.append((heading, _training_lines(lineage.tokenizer_training)))
    if lineage.context is not None:
        branches.append(("continues a clip", _data_lines(lineage.context)))
    return branches


def _checkpoint(training: Training) -> str:
    row = training.checkpoint
    return f"{row['checkpoint_id']}  {row['objective']}, step {row['step']}  {row['uri']}"


def _training_lines(training: Training) -> Lines:
    lines: Lines = [(0, f"run {run['run_id']}  {run['status']}  {run['code_version']}") for run in training.runs]
    for row in training.sequence_sets:
        counts = f"{row['num_sequences']} sequences, {row['num_tokens']} tokens"
        lines.append((0, f"sequence set {row['name']}  {row['seqset_id']}  {counts}"))
    for row in training.curated_sets:
        lines.append((0, f"curated set {row['name']}  {row['curated_id']}  {row['num_clips']} clips"))
    if training.preferences is not None:
        lines += _preference_lines(training.preferences)
    for captioner in training.captioners:
        lines += _captioner_lines(captioner, training.data)
    lines += _data_lines(training.data)
    if training.start is not None:
        lines.append((0, f"began with checkpoint {_checkpoint(training.start)}"))
        lines += [(1 + depth, line) for depth, line in _training_lines(training.start)]
    elif training.checkpoint["start_id"]:
        lines.append((0, f"began with weights {training.checkpoint['start_id']}, which were not trained in this lake"))
    return lines


def _preference_lines(preferences: Preferences) -> Lines:
    lines: Lines = []
    for row in preferences.sets:
        heading = f"preference set {row['name']}  {row['pairset_id']}"
        lines.append((0, f"{heading}  {row['num_pairs']} pairs by {row['judge']}"))
    made = {row["generation_id"]: row for row in preferences.generations}
    for pair in preferences.pairs[:NUM_SHOWN]:
        lines.append((1, f"pair {pair['pair_id']}"))
        for side in ("chosen", "rejected"):
            row = made.get(pair[f"{side}_id"], {})
            lines.append((2, f"{side} {pair[f'{side}_id']}  {row.get('prompt')!r}  {row.get('uri')}"))
    if len(preferences.pairs) > NUM_SHOWN:
        lines.append((1, f"and {len(preferences.pairs) - NUM_SHOWN} more: --json lists them all"))
    for training in preferences.drawn_by:
        lines.append((0, f"drawn by checkpoint {_checkpoint(training)}"))
        lines += [(1 + depth, line) for depth, line in _training_lines(training)]
    return lines


def _captioner_lines(captioner: Captioner, data: Data) -> Lines:
    row = captioner.captioner
    count = sum(caption["captioner_id"] == row["captioner_id"] for caption in data.captions)
    lines: Lines = [(0, f"captioner {row['captioner_id']}  {count} captions  {row.get('model', '')}")]
    if row.get("prompt_id"):
        asked = row["prompt"]
        lines.append((1, f"prompt {row['prompt_id']}"))
        lines += [(2, f"{name}: {words.strip()}") for name, words in sorted(asked.items()) if words.strip()]
    if captioner.training is not None:
        lines.append((1, f"checkpoint {_checkpoint(captioner.training)}"))
        lines += [(2 + depth, line) for depth, line in _training_lines(captioner.training)]
    return lines


def _caption_line(caption: Row) -> str:
    line = f"caption {caption['text']!r}  by {caption['captioner_id']}"
    if "frame_ms" in caption:
        line += f", shown its frames at {', '.join(map(str, caption['frame_ms']))} ms"
    return line


def _data_lines(data: Data) -> Lines:
    media = {row["media_id"]: row for row in data.media}
    lines: Lines = []
    if data.clips:
        lines.append((0, f"{len(data.clips)} clips of {len(media)} media"))
    captions: dict[str, list[Row]] = {}
    for caption in data.captions:
        captions.setdefault(caption["clip_id"], []).append(caption)
    for clip in data.clips[:NUM_SHOWN]:
        lines.append((1, f"clip {clip['clip_id']}  {clip['kind']}"))
        lines += [(2, _caption_line(caption)) for caption in captions.get(clip["clip_id"], [])[:NUM_SHOWN]]
        medium = media.get(clip["media_id"])
        lines.append((2, f"medium {clip['media_id']}"))
        for place in medium["locations"][:NUM_SHOWN] if medium else []:
            lines.append((3, f"{place['uri']}  ({place['licence'] or 'licence not stated'})"))
    if len(data.clips) > NUM_SHOWN:
        lines.append((1, f"and {len(data.clips) - NUM_SHOWN} more: --json lists them all"))
    if data.texts:
        places = sorted({str(row["uri"]) for row in data.texts})
        lines.append((0, f"{len(data.texts)} texts from {len(places)} files"))
        lines += [(1, place) for place in places[:NUM_SHOWN]]
        lines += [(1, f"and {len(places) - NUM_SHOWN} more")] if len(places) > NUM_SHOWN else []
    return lines
