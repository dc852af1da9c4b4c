"""Facts, pictures, curves and answers as reports show them, made from a lake's clips, drawings and trainings."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from jobs.ask import Reply
from jobs.demo_truth import ShownClip, clip_places
from jobs.demo_unseen import replies_by_clip
from jobs.generate import Generation
from jobs.report import (
    Answer,
    AnsweredClip,
    Curve,
    Fact,
    GeneratedImage,
    LossChart,
    PromptImages,
    Reconstruction,
)
from jobs.run import code_version, environment
from jobs.shapes import QUESTIONS, judge_shape, parse_caption
from model.pictures import decode_codes
from model.weights import load_language_model, load_vision_tokenizer
from pipeline.read_frames import read_frames
from pipeline.sandbox import Sandbox
from pipeline.tokenize_vision import Preparation, clip_frames
from schemas.catalog import Lake
from schemas.document import DocumentError, parse_document
from schemas.errors import RowError
from schemas.generations import GENERATIONS
from schemas.vision_tokens import TOKENIZERS, VISION_TOKENS

Pixels = npt.NDArray[np.uint8]
T = TypeVar("T")

NUM_RECONSTRUCTIONS = 8
NUM_CLIPS = 12
SHOWN_PX = 64


def where_made(lake: Lake) -> Iterator[Fact]:
    """The lake, and the code and the machine that worked on it."""
    yield Fact("lake", str(lake.folder))
    yield Fact("code", code_version())
    yield from (Fact(name, value) for name, value in environment().items() if name != "host")


def reconstructions(lake: Lake, tokenizer_id: str, sandbox: Sandbox) -> Iterator[Reconstruction]:
    """Clips with tokens through encoder and decoder: photographs first, because shapes are easy."""
    tokenizer = lake.read_where(TOKENIZERS, "tokenizer_id", [tokenizer_id]).to_pylist()[0]
    vision = load_vision_tokenizer(Path(tokenizer["uri"]))
    preparation = Preparation.model_validate_json(tokenizer["preparation"])
    clips = clip_places(lake)
    rows = lake.read_where(VISION_TOKENS, "tokenizer_id", [tokenizer_id]).to_pylist()
    rows.sort(key=lambda row: ("shapes" in clips[row["clip_id"]]["uri"], row["clip_id"]))
    half = NUM_RECONSTRUCTIONS // 2
    for row in rows[:half] + rows[-half:]:
        codes = np.frombuffer(row["codes"], "<u2").reshape(row["t"], row["h"], row["w"])[:1]
        try:
            original = sandbox.run(clip_frames, clips[row["clip_id"]], preparation)[0]
        except RowError:
            continue
        drawn = decode_codes(vision, codes, row["kind"])[0]
        error = float(np.mean((original.astype(np.float64) - drawn) ** 2))
        name = Path(clips[row["clip_id"]]["uri"]).name
        yield Reconstruction(name, original, drawn, f"PSNR {10 * np.log10(255**2 / max(error, 1e-9)):.1f} dB")


def num_parsed(lake: Lake, folder: Path, drawn: Sequence[Generation]) -> int:
    """How many of some drawn documents, as stored, the parser of grammar accepts, in the ids of the model in `folder`."""
    lm = load_language_model(folder)
    ids = [one.generation_id for one in drawn]
    parsed = 0
    for row in lake.read_where(GENERATIONS, "generation_id", ids, ["tokens"]).to_pylist():
        try:
            parse_document(np.frombuffer(row["tokens"], "<u4"), lm.vocabulary, lm.text)
        except DocumentError:
            continue
        parsed += 1
    return parsed


def loss_chart(title: str, losses: Sequence[Mapping[str, float]], names: Sequence[str]) -> LossChart:
    """Some figures of a training, each over the steps that it was taken at; one that never was is left out."""
    curves = []
    for name in names:
        lines = [line for line in losses if name in line]
        steps = tuple(int(line["step"]) for line in lines)
        curves.append(Curve(name.replace("_", " "), steps, tuple(float(line[name]) for line in lines)))
    return LossChart(title, tuple(curve for curve in curves if curve.steps))


def drawn_images(drawn: Sequence[Generation]) -> Iterator[PromptImages]:
    """Drawn images by prompt, with the judge's verdicts."""
    by_prompt: dict[str, list[GeneratedImage]] = {}
    for g in drawn:
        if g.ask.kind == "image":
            colour, shape = judge_shape(g.frames[0])
            asked = parse_caption(g.ask.prompt)
            right = asked is not None and (colour, shape) == (asked.colour, asked.shape)
            image = GeneratedImage(g.frames[0], g.ask.seed, f"{colour or 'no'} {shape or 'shape'}", right)
            by_prompt.setdefault(g.ask.prompt, []).append(image)
    yield from (PromptImages(prompt, tuple(images)) for prompt, images in by_prompt.items())


def answered_clips(unseen: Sequence[ShownClip], replies: Sequence[Reply], sandbox: Sandbox) -> Iterator[AnsweredClip]:
    """Clips that were asked about, those with a wrong answer first."""
    answered = replies_by_clip(unseen, replies)
    rights = [
        {fact: said[fact] == getattr(clip.facts, fact) for fact in QUESTIONS}
        for clip, said in zip(unseen, answered, strict=True)
    ]
    for index in wrong_first([all(right.values()) for right in rights]):
        frames = frames_of(unseen[index], sandbox)
        if frames is not None:
            answers = tuple(
                Answer(question, answered[index][fact] or "(nothing)", rights[index][fact])
                for fact, question in QUESTIONS.items()
            )
            yield AnsweredClip(Path(unseen[index].place["uri"]).name, frames, answers)


def frames_of(clip: ShownClip, sandbox: Sandbox) -> Pixels | None:
    """Six small frames, None where the medium has moved since: the page then leaves it out."""
    try:
        return sandbox.run(_small_frames, clip.place["uri"], clip.place["start_ms"], clip.place["end_ms"])
    except RowError:
        return None


def _small_frames(uri: str, start_ms: int, end_ms: int) -> Pixels:
    return read_frames(Path(uri), start_ms, end_ms, num_frames=6, size=(SHOWN_PX, SHOWN_PX))


def wrong_first(rights: Sequence[bool]) -> list[int]:
    """Which clips to show: up to a third wrong ones, as they say more, then right ones from the whole list."""
    wrong = [index for index, is_right in enumerate(rights) if not is_right][: NUM_CLIPS // 3]
    return wrong + spread([index for index, is_right in enumerate(rights) if is_right], NUM_CLIPS - len(wrong))


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most so many, evenly from the whole, since neighbours show much the same."""
    if not items:
        return []
    return [items[at] for at in np.unique(np.linspace(0, len(items) - 1, min(most, len(items))).astype(int))]
