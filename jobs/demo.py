"""Demo: the whole road on a corpus made on the spot, and one page that shows what happened.

Every step is the step a user would take, found finished when it is. Killed anywhere and run again, it ends with the same
tables as if it had not been.
"""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from jobs.ask import AskRecipe, ask
from jobs.caption import caption
from jobs.curate import curate, load_curate_recipe, print_curate
from jobs.demo_corpus import CONVERSATIONS, CorpusConfig, load_truth, make_corpus
from jobs.demo_report import DemoFigures, Road, measure, stage_times, write_demo_report
from jobs.demo_unseen import continuations, questions, unseen_clips
from jobs.generate import Ask, GenerateRecipe, generate
from jobs.ingest import IngestConfig, ingest, print_ingest
from jobs.learning import learn
from jobs.learning_report import milestones, write_learning_report
from jobs.pack import PackRecipe, pack_sets
from jobs.progress import progress
from jobs.scan import scan
from jobs.shapes import all_facts, write_caption
from jobs.shipped import load_named
from jobs.tokenize_clips import TokenizeRecipe, tokenize
from jobs.train import TrainRecipe, load_training_recipe, train
from pipeline.caption_clips import CaptionRecipe
from pipeline.scan_medium import ScanConfig
from schemas.catalog import Lake
from schemas.errors import ConfigError

SET = "demo"
MOVING = "moving"
WORLD = "world"
ALL = "all"
RECIPE = "offline"
NUM_PROMPTS = 40
NUM_VIDEOS = 8
FIRST_SEED = 1_000_000  # far from every seed that the corpus was drawn with


@dataclass(frozen=True)
class DemoSize:
    """How much of everything: the corpus, and how long the trainings run."""

    corpus: CorpusConfig
    overrides: Mapping[str, tuple[str, ...]]


SIZES = {
    "full": DemoSize(CorpusConfig(), {}),
    "smoke": DemoSize(
        CorpusConfig(num_shape_images=24, num_shape_videos=8, num_named_clips=16, num_unnamed_clips=4,
                     num_unseen_clips=4, num_pans=1, num_zooms=1, num_cut_videos=1, num_fade_videos=1, pan_frames=60,
                     num_texts=12),
        {"demo_captioner": ("steps=20",), "demo_tokenizer": ("steps=20", "free_steps=5"),
         "demo_pretrain": ("steps=20",), "small_tokenizer": ("steps=20", "free_steps=5", "execution.evaluate_every=10"),
         **{f"small_{name}": ("steps=10", "execution.evaluate_every=5")
            for name in ("pretrain_1", "pretrain_2", "quality", "instruct_1", "instruct_2", "dpo")}},
    ),
}  # fmt: skip


def demo(folder: Path, seed: int, size: str, *, full: bool = False) -> Path:
    """Walk the road under `folder`, and with `full` the learning line after it; returns the path of the last report.

    Raises: ConfigError for an unknown size, or a folder that holds a demo of another seed or size.
    """
    if size not in SIZES:
        raise ConfigError(f"no demo size {size!r}; there are {sorted(SIZES)}")
    started = time.monotonic()
    folder = folder.resolve()
    lake = Lake.open(folder / "lake")
    _say("corpus", "raw photographs, moving shapes, slides, and files that are wrong on purpose")
    corpus = SIZES[size].corpus
    truth = make_corpus(folder / "corpus", seed, corpus)
    _say("ingest", "every file becomes a medium, a text, or a row that says why not")
    with progress("ingest") as advance:
        sources = [str(truth.parent / source) for source in load_truth(truth).sources]
        print_ingest(ingest(lake, sources, options=IngestConfig(), on_progress=advance), False)
    _say("scan", "one decode per medium: cuts, motion, text, quality")
    scanned = scan(lake, load_named(ScanConfig, "scan"))
    _tell(f"{scanned.outcome.num_done} scanned, {scanned.outcome.num_failed} failed" if scanned.outcome else None)
    _say("curate", "thresholds choose clips; nothing is decoded")
    print_curate(curate(lake, load_curate_recipe(RECIPE), SET), False)
    _say("caption", "what came with the media")
    curate(lake, load_curate_recipe("demo_moving"), MOVING)
    # The unseen clips are the smallest, so no set that is trained on holds them.
    for name, smallest_px in ((WORLD, corpus.clip_size_px), (ALL, corpus.unseen_size_px)):
        curate(lake, load_curate_recipe(RECIPE, [f"resolution.low={smallest_px}"]), name)
    provided = [caption(lake, name).num_new for name in (SET, MOVING)]
    _tell(f"{sum(provided)} captions" if any(provided) else None)
    _say("train", "a captioner, on the moving shapes that came with captions")
    captioner = train(lake, _training("demo_captioner", size), MOVING)
    _tell(None if captioner.already_there else f"checkpoint {captioner.checkpoint_id} after {captioner.step} steps")
    _say("caption", "the moving shapes that came without, by the captioner under vLLM")
    recipe = load_named(CaptionRecipe, "demo_caption").model_copy(update={"model": captioner.checkpoint_id})
    captioned = caption(lake, MOVING, recipe)
    _tell(f"{captioned.num_new} captions" if captioned.num_new else None)
    _say("train", "a vision tokenizer, by reconstruction")
    tokenizer = train(lake, _training("demo_tokenizer", size), WORLD)
    _tell(None if tokenizer.already_there else f"checkpoint {tokenizer.checkpoint_id} after {tokenizer.step} steps")
    _say("tokenize", "clips become codes")
    tokens = tokenize(lake, ALL, tokenizer.checkpoint_id, load_named(TokenizeRecipe, "demo_tokenize"))
    _tell(f"{tokens.outcome.num_done} clips encoded" if tokens.outcome else None)
    _say("pack", "documents become sequences, and so do questions and answers")
    said = [truth.parent / CONVERSATIONS]
    packed = pack_sets(lake, [WORLD], load_named(PackRecipe, "demo_pack"), SET, tokens.tokenizer_id, said)
    _tell(None if packed.already_there else f"{packed.num_sequences} sequences, {packed.fill_ratio:.1%} full")
    _say("train", "a language model, by next-token prediction")
    model = train(lake, _training("demo_pretrain", size), SET)
    _tell(None if model.already_there else f"checkpoint {model.checkpoint_id} after {model.step} steps")
    _say("generate", "images and videos from words, and what unseen clips become")
    drawn = generate(lake, _asks(), model.checkpoint_id, load_named(GenerateRecipe, "demo_generate"))
    unseen = unseen_clips(lake, truth)
    further = continuations(unseen, FIRST_SEED)
    continued = generate(lake, further, model.checkpoint_id, load_named(GenerateRecipe, "demo_continue"))
    _say("ask", "questions about unseen clips")
    replies = ask(lake, questions(unseen), model.checkpoint_id, load_named(AskRecipe, "demo_ask"))
    report = folder / "report.html"
    _say("report", str(report))
    road = Road(
        lake, truth, SET, RECIPE, captioner, captioned.captioner_id, tokenizer, model, tokens.tokenizer_id, drawn,
        unseen, continued, replies,
    )  # fmt: skip
    figures = measure(road)
    write_demo_report(report, road, figures)
    _print_figures(figures, len(drawn) + len(continued))
    print(f"done in {time.monotonic() - started:.0f} s: open {report}")
    print(f'next: OUTBACK_LAKE={lake.folder} outback sql "select kind, count(*) as clips from clips group by kind"')
    return _learn(folder, lake, truth, size, started) if full else report


def _learn(folder: Path, lake: Lake, truth: Path, size: str, started: float) -> Path:
    """Walk the learning line; returns the path of its report."""
    _say("learn", "every training of the published model, one after the other, on one set")
    line = learn(lake, truth, SIZES[size].corpus, partial(_training, size=size))
    found = milestones(line)
    report = folder / "learning.html"
    write_learning_report(report, line, found, list(stage_times(lake)))
    for one in found:
        before = f"{one.before} -> " if one.before else ""
        print(f"{'ok  ' if one.is_reached else 'NOT '} {one.training}: {one.what}: {before}{one.after} ({one.goal})")
    print(f"done in {time.monotonic() - started:.0f} s: open {report}")
    return report


def _training(name: str, size: str) -> TrainRecipe:
    """A shipped training recipe with the changes of a size."""
    section = load_training_recipe(name).objective
    return load_training_recipe(name, [f"{section}.{change}" for change in SIZES[size].overrides.get(name, ())])


def _asks() -> list[Ask]:
    """Forty images and some videos, all from seeds nothing was trained with."""
    still, moving = all_facts(moving=False), all_facts(moving=True)
    asks = [_ask(write_caption(still[i % len(still)]), "image", i) for i in range(NUM_PROMPTS)]
    step = max(1, len(moving) // NUM_VIDEOS)
    return asks + [_ask(write_caption(facts), "video", i) for i, facts in enumerate(moving[::step][:NUM_VIDEOS])]


def _ask(prompt: str, kind: Literal["image", "video"], index: int) -> Ask:
    return Ask(prompt, kind, FIRST_SEED + index)


def _print_figures(figures: DemoFigures, num_drawn: int) -> None:
    images, true = figures.images, figures.true_images
    captions = figures.captions
    print(
        f"of {captions.num_judged} clips without a caption the captioner names {captions.colour:.1%} by colour, "
        f"{captions.shape:.1%} by shape, {captions.direction or 0:.1%} by direction"
    )
    print(f"{figures.num_parsed} of {num_drawn} generated documents parse")
    print(
        f"{len(figures.findings) - len(figures.wrong)} of {len(figures.findings)} planted cuts and defects as planted"
    )
    for finding in figures.wrong:
        print(f"  {finding.path}: expected {finding.expected}, found {finding.found}")
    print(
        f"of {images.num_judged} drawn images {images.colour:.1%} show the asked colour, {images.shape:.1%} the asked shape"
    )
    print(f"the judge on true renderings: {true.colour:.1%} colour, {true.shape:.1%} shape")
    unseen = figures.unseen
    print(
        f"of {unseen.num_clips} unseen clips {unseen.continued.right:.1%} go on in their direction "
        f"(by drawn frames alone {unseen.continued_alone.right:.1%})"
    )
    said = ", ".join(f"{share.right:.1%} for {fact}" for fact, share in unseen.answers.items())
    print(f"right answers about them: {said}")
    print(f"with shuffled prompts: {images.shuffled_colour:.1%} colour, {images.shuffled_shape:.1%} shape")


def _say(step: str, what: str) -> None:
    print(f"\n{step:>9}  {what}", file=sys.stderr, flush=True)


def _tell(done: str | None) -> None:
    print(f"{'':>9}  {done or 'nothing to do'}", file=sys.stderr, flush=True)
