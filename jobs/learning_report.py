"""Gathers what the learning line's page shows: a figure before and after each training, its curves, and what models made."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from jobs.demo_unseen import score_answers
from jobs.generate import Generation
from jobs.learning import Line
from jobs.report import Fact, LossChart, Milestone, PromptImages, ReportData, StageTime, write_report
from jobs.report_pictures import (
    answered_clips,
    drawn_images,
    loss_chart,
    num_parsed,
    reconstructions,
    spread,
    where_made,
)
from jobs.shapes import QUESTIONS, score_height, score_images
from pipeline.sandbox import Sandbox

MIN_PSNR_DB = 28.0
MIN_CODES_USED = 0.8
MIN_ANSWERS_RIGHT = 0.8
MIN_PREFERRED_GAIN = 0.2
MAX_LOSS_RISE = 0.05
HIGH = 0.56  # shapes stand at 3, 4 or 5 eighths of the height: this keeps the highest of them
NUM_SHOWN = 4  # prompts of which drawings are shown

FIGURES = {
    "vision tokenizer": ("psnr", "held_out_psnr"),
    "preferences": ("loss", "accuracy", "margin", "held_out_loss"),
    "captions": ("text",),
    "answers": ("text",),
}
OTHER_FIGURES = ("text", "held_out_text", "vision", "held_out_vision")


def milestones(line: Line) -> list[Milestone]:
    """What each training was to bring, in order."""
    return [
        *_tokenizer(line),
        *_first_stage(line),
        *_falls(line, "stage 1", "stage 2"),
        *_quality(line),
        *_answers(line),
        *_preferences(line),
    ]


def write_learning_report(path: Path, line: Line, found: Sequence[Milestone], times: Sequence[StageTime]) -> None:
    """The page, whole or not at all."""
    with Sandbox(60.0, 4096) as sandbox:
        data = ReportData(
            title="Outback: what each training brings",
            summary="One curated set, a tenth of its media held out, and every training of Emu3 on the rest of it, one "
            "after the other, at a size for two cores.",
            facts=tuple(_facts(line)),
            milestones=tuple(found),
            stages=tuple(times),
            reconstructions=tuple(reconstructions(line.lake, line.tokenizer_id, sandbox)),
            losses=tuple(_charts(line)),
            images=tuple(_images(line)),
            answers=tuple(answered_clips(line.unseen, line.replies, sandbox)),
        )
    write_report(path, data)


def _facts(line: Line) -> Iterator[Fact]:
    yield from where_made(line.lake)
    yield from (
        Fact(name, f"{training.checkpoint_id}, {training.step} steps") for name, training in line.trainings.items()
    )


def _tokenizer(line: Line) -> Iterator[Milestone]:
    psnr, used = line.trainings["vision tokenizer"].losses[-1]["held_out_psnr"], line.codes_used
    what = "PSNR of unseen clips"
    yield Milestone("vision tokenizer", what, "", f"{psnr:.1f} dB", f"at least {MIN_PSNR_DB:g} dB", psnr >= MIN_PSNR_DB)
    goal = f"at least {MIN_CODES_USED:.0%}"
    yield Milestone(
        "vision tokenizer", "codes in use on held-out media", "", f"{used:.0%}", goal, used >= MIN_CODES_USED
    )


def _first_stage(line: Line) -> Iterator[Milestone]:
    lines = [figures for figures in line.trainings["stage 1"].losses if "held_out_text" in figures]
    for kind, name in (("text", "held_out_text"), ("image", "held_out_vision")):
        before = f"{lines[0][name]:.3f} after {lines[0]['step']:g} steps"
        yield _fall("stage 1", kind, before, lines[0][name], lines[-1][name])


def _falls(line: Line, before: str, after: str) -> Iterator[Milestone]:
    for kind, loss in line.held_out[before].items():
        yield _fall(after, kind, f"{loss:.3f}", loss, line.held_out[after][kind])


def _fall(training: str, kind: str, said: str, before: float, after: float) -> Milestone:
    return Milestone(training, f"loss of {kind}, nats a token", said, f"{after:.3f}", "falls", after < before)


def _quality(line: Line) -> Iterator[Milestone]:
    scores = {
        name: score_images([(one.ask.prompt, one.frames[0]) for one in drawn]) for name, drawn in line.drawn.items()
    }
    before, after = scores["stage 2"], scores["quality tuning"]
    what = f"of {after.num_judged} drawings show the colour and the shape that was asked for"
    yield Milestone(
        "quality tuning", what, f"{before.exact:.0%}", f"{after.exact:.0%}", "more", after.exact > before.exact
    )


def _answers(line: Line) -> Iterator[Milestone]:
    goal = f"at least {MIN_ANSWERS_RIGHT:.0%}"
    for fact, share in score_answers(line.unseen, line.replies).items():
        what = f"of {len(line.unseen)} unseen clips: {QUESTIONS[fact]}"
        yield Milestone("answers", what, "", f"{share.right:.0%}", goal, share.right >= MIN_ANSWERS_RIGHT)


def _preferences(line: Line) -> Iterator[Milestone]:
    training, reference, preferred = "preferences", "quality tuning", line.preferred["preferences"]
    before, after = (share_high(line.preferred[name]) for name in (reference, training))
    what = f"of {len(preferred)} drawings of prompts without a pair the shape stands high"
    goal = f"{100 * MIN_PREFERRED_GAIN:.0f} points more"
    yield Milestone(training, what, f"{before:.0%}", f"{after:.0%}", goal, after - before >= MIN_PREFERRED_GAIN)
    drawn = list({one.generation_id: one for one in (*preferred, *line.drawn[training])}.values())
    parsed = num_parsed(line.lake, line.trainings[training].folder, drawn) / len(drawn)
    yield Milestone(training, f"of {len(drawn)} drawn documents parse", "", f"{parsed:.0%}", "all", parsed == 1.0)
    before, after = (line.held_out[name]["image"] for name in (reference, training))
    goal = f"rises by less than {MAX_LOSS_RISE:.0%}"
    is_reached = after < before * (1 + MAX_LOSS_RISE)
    yield Milestone(training, "loss of image, nats a token", f"{before:.3f}", f"{after:.3f}", goal, is_reached)


def share_high(drawn: Sequence[Generation]) -> float:
    """The share of drawings whose shape stands high; one without a shape does not."""
    return float(np.mean([_height(one) > HIGH for one in drawn]))


def _height(drawn: Generation) -> float:
    try:
        return score_height(drawn.ask.prompt, drawn.frames)
    except ValueError:
        return 0.0


def _charts(line: Line) -> Iterator[LossChart]:
    for name, training in line.trainings.items():
        yield loss_chart(name, training.losses, FIGURES.get(name, OTHER_FIGURES))


def _images(line: Line) -> Iterator[PromptImages]:
    """The same prompts and seeds by one model after the other, then what preferences changed."""
    for name, drawn in line.drawn.items():
        groups = spread(list(drawn_images(drawn)), NUM_SHOWN)
        yield from (PromptImages(f"{group.prompt}, after {name}", group.images) for group in groups)
