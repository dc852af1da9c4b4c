"""Gathers what the demo's page shows: counts and scores from tables, pictures from the media, verdicts from the judge."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.ask import Reply
from jobs.curate import explain_clips, load_curate_recipe, set_row
from jobs.demo_corpus import SHAPE
from jobs.demo_truth import Finding, ShownClip, check_truth, clip_places, shown_clips
from jobs.demo_unseen import UnseenFigures, direction_drawn, num_given, score_unseen
from jobs.generate import Generation
from jobs.lineage import Captioner, Data, Training, trace
from jobs.report import (
    Accuracy,
    AttemptGroup,
    BalanceLine,
    CaptionedClip,
    ClipCard,
    Fact,
    FunnelStep,
    GeneratedVideo,
    Histogram,
    LineageNode,
    NamedShare,
    ReportData,
    Room,
    StageTime,
    write_report,
)
from jobs.report_pictures import (
    answered_clips,
    drawn_images,
    frames_of,
    loss_chart,
    num_parsed,
    reconstructions,
    spread,
    where_made,
    wrong_first,
)
from jobs.shapes import (
    QUESTIONS,
    ShapeScore,
    all_facts,
    judge_direction,
    judge_shape,
    make_scene,
    parse_caption,
    render_image,
    render_video,
    score_captions,
    score_images,
    score_videos,
    write_caption,
)
from jobs.train import TrainReport
from pipeline.frame_chunks import contact_thumbnail
from pipeline.read_frames import read_frames
from pipeline.rules import Rule, rules_of
from pipeline.sandbox import Sandbox
from schemas.captions import CAPTIONERS, CAPTIONS
from schemas.catalog import Lake
from schemas.clips import CLIPS
from schemas.errors import RowError
from schemas.media import LOCATIONS, MEDIA
from schemas.runs import ATTEMPTS, RUNS
from schemas.tables import TABLES
from schemas.texts import TEXTS

Pixels = npt.NDArray[np.uint8]
Thumbnail = Callable[[dict[str, Any], str], bytes | None]

NUM_CARDS = 24
NUM_CONTINUED = 12
NUM_TRUE_IMAGES = 240
THUMBNAIL_PX = 160
JUDGED_SIZE_PX = 64  # true renderings are judged at the size the model draws


@dataclass(frozen=True, eq=False)
class Road:
    """What the demo made, in the order it made it."""

    lake: Lake
    truth: Path
    set_name: str
    recipe: str
    captioner: TrainReport
    captioner_id: str
    tokenizer: TrainReport
    model: TrainReport
    tokenizer_id: str
    drawn: Sequence[Generation]
    unseen: Sequence[ShownClip]
    continued: Sequence[Generation]
    replies: Sequence[Reply]


@dataclass(frozen=True)
class DemoFigures:
    """The demo's own measures: the judge's shares, and what was planted against what was found."""

    images: ShapeScore
    videos: ShapeScore
    true_images: ShapeScore
    true_videos: ShapeScore
    captions: ShapeScore
    unseen: UnseenFigures
    num_parsed: int
    findings: tuple[Finding, ...]

    @property
    def wrong(self) -> list[Finding]:
        """Findings that are not as planted."""
        return [finding for finding in self.findings if not finding.ok]


def measure(road: Road) -> DemoFigures:
    """Judge the drawings, and true renderings at the same size, and check the corpus' truth."""
    images = [(g.ask.prompt, g.frames[0]) for g in road.drawn if g.ask.kind == "image"]
    videos = [(g.ask.prompt, g.frames) for g in road.drawn if g.ask.kind == "video"]
    first = max(g.ask.seed for g in road.drawn) + 1  # scenes that nothing was trained on
    still, moving = all_facts(moving=False), all_facts(moving=True)
    scenes = [make_scene(still[index % len(still)], first + index) for index in range(NUM_TRUE_IMAGES)]
    moves = [make_scene(facts, first + index) for index, facts in enumerate(moving)]
    length, fps = videos[0][1].shape[0], next(g.fps for g in road.drawn if g.fps)
    findings = check_truth(road.lake, road.truth, load_curate_recipe(road.recipe))
    return DemoFigures(
        images=score_images(images),
        videos=score_videos(videos),
        true_images=score_images([(write_caption(s.facts), render_image(s, JUDGED_SIZE_PX)) for s in scenes]),
        true_videos=score_videos(
            [(write_caption(s.facts), render_video(s, length, fps, JUDGED_SIZE_PX)) for s in moves]
        ),
        captions=score_captions([(clip.caption, clip.shown.facts) for clip in unnamed_clips(road)]),
        unseen=score_unseen(road.unseen, road.continued, road.replies),
        num_parsed=num_parsed(road.lake, road.model.folder, [*road.drawn, *road.continued]),
        findings=tuple(findings),
    )


@dataclass(frozen=True)
class UnnamedClip:
    """A clip that came without a caption, and what the captioner says of it."""

    shown: ShownClip
    caption: str


def unnamed_clips(road: Road) -> list[UnnamedClip]:
    """Every clip that its manifest leaves unnamed and the captioner names. One without a caption has an empty one."""
    rows = road.lake.read_where(CAPTIONS, "captioner_id", [road.captioner_id], ["clip_id", "text"]).to_pylist()
    captions = {row["clip_id"]: row["text"] for row in rows}
    clips = shown_clips(road.lake, road.truth, SHAPE)
    return [UnnamedClip(clip, captions.get(clip.clip_id, "")) for clip in clips]


def write_demo_report(path: Path, road: Road, figures: DemoFigures) -> None:
    """The page, whole or not at all."""
    lake = road.lake
    rows = set_row(lake, road.set_name)
    scores, verdicts = _scores(lake, road), explain_clips(lake, load_curate_recipe(road.recipe)).to_pylist()
    with Sandbox(60.0, 4096) as sandbox:
        data = ReportData(
            title="Outback: the whole road, once",
            summary="Raw video, images and text became clips, a curated set, tokens, sequences, and a model that draws.",
            facts=tuple(_facts(road, figures)),
            stages=tuple(stage_times(lake)),
            balance=tuple(_balance(lake)),
            road=tuple(Room(table.name, lake.facts(table).num_rows) for table in TABLES if not table.ledger),
            funnel=tuple(_funnel(json.loads(rows["funnel"]))),
            histograms=tuple(_histograms(road, scores)),
            kept=tuple(_cards(lake, [row for row in verdicts if row["verdict"] == "kept"], road, sandbox)),
            rejected=tuple(_cards(lake, [row for row in verdicts if row["verdict"] == "rejected"], road, sandbox)),
            attempts=tuple(_attempts(lake)),
            captioning=_captioning(road, figures),
            named=tuple(_named(figures.captions)),
            captions=tuple(_captioned(road, sandbox)),
            reconstructions=tuple(reconstructions(lake, road.tokenizer_id, sandbox)),
            losses=(
                loss_chart("captioner", road.captioner.losses, ["loss"]),
                loss_chart("vision tokenizer", road.tokenizer.losses, ["loss", "pixels"]),
                loss_chart("language model", road.model.losses, ["loss", "text", "vision"]),
            ),
            accuracies=tuple(_accuracies(figures)),
            images=tuple(drawn_images(road.drawn)),
            videos=tuple(_video(g) for g in road.drawn if g.ask.kind == "video"),
            unseen=tuple(_unseen(figures.unseen)),
            continuations=tuple(
                _continuation(*pair)
                for pair in spread(list(zip(road.continued, road.unseen, strict=True)), NUM_CONTINUED)
            ),
            answers=tuple(answered_clips(road.unseen, road.replies, sandbox)),
            lineage=_lineage(lake, road.drawn[0], sandbox),
        )
    write_report(path, data)


def _facts(road: Road, figures: DemoFigures) -> Iterator[Fact]:
    yield from where_made(road.lake)
    planted = len(figures.findings)
    yield Fact("planted and found", f"{planted - len(figures.wrong)} of {planted} checks as planted")
    yield from (Fact("not as planted", f"{f.path}: expected {f.expected}, found {f.found}") for f in figures.wrong[:5])


def stage_times(lake: Lake) -> Iterator[StageTime]:
    """Seconds of every finished run, by job, in the order of the first."""
    seconds: dict[str, float] = {}
    for row in lake.read(RUNS, ["job", "status", "outcome", "recipe", "written_at"]).sort_by("written_at").to_pylist():
        if row["status"] == "done":
            job = row["job"] if row["job"] != "train" else f"train {json.loads(row['recipe'])['objective']}"
            seconds[job] = seconds.get(job, 0.0) + json.loads(row["outcome"])["seconds"]
    yield from (StageTime(job, value) for job, value in seconds.items())


def _balance(lake: Lake) -> Iterator[BalanceLine]:
    """Files offered to ingest = places of media + text files + sidecars + manifests + failures."""
    runs = lake.read(RUNS, ["job", "status", "outcome", "written_at"]).sort_by("written_at").to_pylist()
    report = json.loads([row for row in runs if row["job"] == "ingest" and row["status"] == "done"][-1]["outcome"])
    num_media, num_places = lake.facts(MEDIA).num_rows, lake.facts(LOCATIONS).num_rows
    yield BalanceLine("offered", report["offered"])
    yield BalanceLine("media files", report["media_files"], f"{num_media} distinct media at {num_places} places")
    yield BalanceLine("text files", report["text_files"], f"{lake.facts(TEXTS).num_rows} texts")
    yield BalanceLine("sidecars", report["sidecars"])
    yield BalanceLine("manifests", report["manifests"])
    failed = report["offered"] - sum(report[key] for key in ("media_files", "text_files", "sidecars", "manifests"))
    yield BalanceLine("failed", failed, "each is a row in attempts")


def _funnel(steps: Sequence[dict[str, Any]]) -> Iterator[FunnelStep]:
    for step in steps:
        examples = tuple(f"{example['clip_id']}: {example['bound']}" for example in step["examples"])
        yield FunnelStep(
            step["rule"], _bound(step["low"], step["high"]), step["num_in"], step["num_rejected"], examples
        )


def _bound(low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return f"{low:g} to {high:g}"
    return f">= {low:g}" if low is not None else f"<= {high:g}"


def _rules(road: Road) -> list[Rule]:
    return rules_of(load_curate_recipe(road.recipe))


def _scores(lake: Lake, road: Road) -> dict[str, list[float | None]]:
    """Rule name -> the score of every clip, where the rule asks about the clip's kind."""
    kinds = {row["clip_id"]: row["kind"] for row in lake.read(CLIPS, ["clip_id", "kind"]).to_pylist()}
    found: dict[str, list[float | None]] = {}
    for rule in _rules(road):
        rows = lake.read(rule.family, ["clip_id", rule.column]).sort_by("clip_id").to_pylist()
        found[rule.name] = [row[rule.column] for row in rows if kinds.get(row["clip_id"]) in rule.kinds]
    return found


def _histograms(road: Road, scores: dict[str, list[float | None]]) -> Iterator[Histogram]:
    for rule in _rules(road):
        values = [value for value in scores[rule.name] if value is not None]
        if not values:
            continue
        wide = min(values) > 0 and max(values) > 50 * min(values)
        nulls = len(scores[rule.name]) - len(values)
        yield Histogram(f"{rule.name}: {rule.column}", tuple(values), rule.low, rule.high, nulls, wide)


def _cards(lake: Lake, verdicts: Sequence[dict[str, Any]], road: Road, sandbox: Sandbox) -> Iterator[ClipCard]:
    """Clips spread evenly over the list: rejected ones by rule, kept ones by id."""
    rules = {rule.name: rule for rule in _rules(road)}
    ordered = sorted(verdicts, key=lambda row: (row["rule"] or "", row["clip_id"]))
    chosen = spread(ordered, NUM_CARDS)
    captions = {row["clip_id"]: row["text"] for row in lake.read(CAPTIONS, ["clip_id", "text"]).to_pylist()}
    clips = clip_places(lake)
    for row in chosen:
        clip = clips[row["clip_id"]]
        verdict = "kept"
        if row["verdict"] == "rejected":
            value = "no score" if row["value"] is None else f"{row['value']:.4g}"
            rule = rules[row["rule"]]
            verdict = f"{rule.name}: {value}, kept are {_bound(rule.low, rule.high)}"
        thumbnail = _thumbnail(sandbox, clip)
        if thumbnail is not None:
            name = (
                f"{Path(clip['uri']).name} {clip['start_ms'] / 1000:g} s"
                if clip["kind"] == "video"
                else Path(clip["uri"]).name
            )
            yield ClipCard(thumbnail, name, verdict, captions.get(row["clip_id"], ""))


def _middle_thumbnail(uri: str, start_ms: int, end_ms: int) -> bytes:
    return contact_thumbnail(read_frames(Path(uri), start_ms, end_ms, num_frames=1)[0], THUMBNAIL_PX)


def _thumbnail(sandbox: Sandbox, clip: dict[str, Any]) -> bytes | None:
    """A small picture from the clip's middle, or None where the medium has moved since: the page then leaves it out."""
    try:
        return sandbox.run(_middle_thumbnail, clip["uri"], clip["start_ms"], clip["end_ms"])
    except RowError:
        return None


def _attempts(lake: Lake) -> Iterator[AttemptGroup]:
    groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for row in lake.read(ATTEMPTS).sort_by([("stage", "ascending"), ("uri", "ascending")]).to_pylist():
        groups.setdefault((row["stage"], row["error_class"]), []).append((row["uri"] or row["item_id"], row["message"]))
    for (stage, reason), items in sorted(groups.items()):
        yield AttemptGroup(stage, reason, len(items), tuple((Path(uri).name, message) for uri, message in items[:5]))


def _captioning(road: Road, figures: DemoFigures) -> str:
    row = road.lake.read_where(CAPTIONERS, "captioner_id", [road.captioner_id]).to_pylist()[0]
    return (
        f"Captioner {road.captioner_id}: checkpoint {road.captioner.checkpoint_id} of this lake under vLLM, prompt "
        f"{row['prompt_id']}. It learnt from clips whose captions came in a manifest, and names "
        f"{figures.captions.num_judged} others that it has never seen."
    )


def _named(score: ShapeScore) -> Iterator[NamedShare]:
    yield NamedShare("colour", score.colour, score.shuffled_colour)
    yield NamedShare("shape", score.shape, score.shuffled_shape)
    if score.direction is not None and score.shuffled_direction is not None:
        yield NamedShare("direction", score.direction, score.shuffled_direction)
    yield NamedShare("all three", score.exact, score.shuffled_exact)


def _captioned(road: Road, sandbox: Sandbox) -> Iterator[CaptionedClip]:
    """Clips that the captioner named, wrong ones first."""
    clips = unnamed_clips(road)
    rights = [parse_caption(clip.caption) == clip.shown.facts for clip in clips]
    for index in wrong_first(rights):
        clip = clips[index]
        frames = frames_of(clip.shown, sandbox)
        if frames is not None:
            note = f"it is {write_caption(clip.shown.facts)}"
            name = Path(clip.shown.place["uri"]).name
            yield CaptionedClip(name, frames, clip.caption or "(no caption)", rights[index], note)


def _accuracies(figures: DemoFigures) -> Iterator[Accuracy]:
    images, true, videos = figures.images, figures.true_images, figures.videos
    yield Accuracy("colour", images.colour, true.colour, images.shuffled_colour)
    yield Accuracy("shape", images.shape, true.shape, images.shuffled_shape)
    yield Accuracy("colour and shape", images.exact, true.exact, images.shuffled_exact)
    true_direction = figures.true_videos.direction
    if videos.direction is not None and videos.shuffled_direction is not None and true_direction is not None:
        yield Accuracy("direction (videos)", videos.direction, true_direction, videos.shuffled_direction)


def _video(generation: Generation) -> GeneratedVideo:
    colour, shape = judge_shape(generation.frames[len(generation.frames) // 2])
    direction = judge_direction(generation.frames)
    seen = f"{colour or 'no'} {shape or 'shape'} {direction or 'at rest'}"
    asked = parse_caption(generation.ask.prompt)
    right = None if asked is None else (colour, shape, direction) == (asked.colour, asked.shape, asked.direction)
    return GeneratedVideo(generation.ask.prompt, generation.frames, generation.fps or 1.0, seen, right)


def _unseen(figures: UnseenFigures) -> Iterator[NamedShare]:
    yield NamedShare("goes on in its direction", figures.continued.right, figures.continued.shuffled)
    yield NamedShare("the same by drawn frames alone", figures.continued_alone.right, figures.continued_alone.shuffled)
    for fact, share in figures.answers.items():
        yield NamedShare(f"answered: {QUESTIONS[fact]}", share.right, share.shuffled)


def _continuation(generation: Generation, clip: ShownClip) -> GeneratedVideo:
    direction = direction_drawn(generation)
    seen = f"goes on {direction}" if direction else "rests"
    right = direction == clip.facts.direction
    title = f"{write_caption(clip.facts)}, continued"
    return GeneratedVideo(title, generation.frames, generation.fps or 1.0, seen, right, num_given(generation))


def _lineage(lake: Lake, generation: Generation, sandbox: Sandbox) -> LineageNode:
    """One drawing back to media: a few of each, with pictures where there are any."""
    found = trace(lake, generation.generation_id)
    facts = (
        Fact("prompt", generation.ask.prompt),
        Fact("seed", str(generation.ask.seed)),
        Fact("file", str(generation.path)),
    )
    image = contact_thumbnail(generation.frames[0], THUMBNAIL_PX)

    def thumbnail(clip: dict[str, Any], uri: str) -> bytes | None:
        return _thumbnail(sandbox, {**clip, "uri": uri})

    parts = [(found.training, "language model"), (found.tokenizer_training, "vision tokenizer")]
    made = tuple(_training_node(training, name, thumbnail) for training, name in parts if training is not None)
    return LineageNode("generation", generation.generation_id, facts, image, made)


def _training_node(training: Training, name: str, thumbnail: Thumbnail) -> LineageNode:
    checkpoint = training.checkpoint
    facts = (Fact("what", name), Fact("steps", str(checkpoint["step"])), Fact("folder", checkpoint["uri"]))
    runs = tuple(LineageNode("run", run["run_id"], (Fact("status", run["status"]),)) for run in training.runs)
    sets = tuple(
        LineageNode(
            "sequence set", row["name"], (Fact("id", row["seqset_id"]), Fact("sequences", str(row["num_sequences"])))
        )
        for row in training.sequence_sets
    ) + tuple(
        LineageNode("curated set", row["name"], (Fact("clips", str(row["num_clips"])),))
        for row in training.curated_sets
    )
    captioners = tuple(_captioner_node(captioner, training.data, thumbnail) for captioner in training.captioners)
    media = tuple(_media_nodes(training.data, thumbnail))
    data = LineageNode("data", checkpoint["data_id"], _counts(training.data), None, (*sets, *captioners, *media))
    start = () if training.start is None else (_training_node(training.start, "what it began with", thumbnail),)
    return LineageNode("checkpoint", checkpoint["checkpoint_id"], facts, None, (*runs, data, *start))


def _captioner_node(captioner: Captioner, data: Data, thumbnail: Thumbnail) -> LineageNode:
    """Whose captions were learnt: an example with its frames, the prompt, and what taught the captioner."""
    row = captioner.captioner
    captions = [caption for caption in data.captions if caption["captioner_id"] == row["captioner_id"]]
    facts = [Fact("captions", str(len(captions))), Fact("model", row["model"])]
    if row["prompt_id"]:
        facts += [Fact("prompt", row["prompt_id"]), Fact("asked", row["prompt"]["video"].strip())]
    if captions:
        facts.append(Fact("such as", captions[0]["text"]))
        if "frame_ms" in captions[0]:
            facts.append(Fact("shown frames at", ", ".join(f"{at / 1000:g}" for at in captions[0]["frame_ms"]) + " s"))
    taught = () if captioner.training is None else (_training_node(captioner.training, "captioner", thumbnail),)
    return LineageNode("captioner", row["captioner_id"], tuple(facts), None, taught)


def _counts(data: Data) -> tuple[Fact, ...]:
    return (
        Fact("clips", str(len(data.clips))),
        Fact("media", str(len(data.media))),
        Fact("texts", str(len(data.texts))),
        Fact("shown", "the first few; outback show lineage lists all"),
    )


def _media_nodes(data: Data, thumbnail: Thumbnail, most: int = 4) -> Iterator[LineageNode]:
    for medium in data.media[:most]:
        places = tuple(Fact("at", place["uri"]) for place in medium["locations"])
        clips = [clip for clip in data.clips if clip["media_id"] == medium["media_id"]]
        names = Fact("clips", ", ".join(clip["clip_id"] for clip in clips[:3]))
        picture = thumbnail(clips[0], medium["locations"][0]["uri"])
        yield LineageNode("medium", medium["media_id"], (Fact("kind", medium["kind"]), names, *places), picture)
