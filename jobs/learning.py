"""The learning line: every training of Emu3, one after the other, on one curated set of the demo, and what each brought.

Vision tokenizer, pre-training on texts and images, then with clips, quality tuning and preferences for drawing, captions and
then questions for understanding. A tenth of the media is held out from all of them, and so are the demo's unseen clips.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jobs.ask import AskRecipe, Reply, ask
from jobs.curate import curate, load_curate_recipe, read_set
from jobs.demo_corpus import CONVERSATIONS, CorpusConfig
from jobs.demo_truth import ShownClip
from jobs.demo_unseen import questions, unseen_clips
from jobs.evaluate import EvaluateRecipe, evaluate
from jobs.generate import Ask, GenerateRecipe, Generation, generate
from jobs.models import clip_blocks
from jobs.pack import PackRecipe, pack_sets
from jobs.prefer import PreferRecipe, prefer
from jobs.shapes import all_facts, write_caption
from jobs.shipped import load_named
from jobs.tokenize_clips import TokenizeRecipe, tokenize
from jobs.train import TrainRecipe, TrainReport, train
from schemas.catalog import Lake

LEARN, KEPT, UNSEEN, ALL = "learn", "kept", "unseen", "all"
IMAGES, VIDEOS = "images", "videos"
PAIRS = "stands_high"
SPLIT = 0.1  # of the media are held out
SCORER = "jobs.shapes:score_height"
NUM_EACH = 10  # drawings of each prompt that are judged
NUM_JUDGED_BY_HEIGHT = 60
NUM_FOR_PAIRS = 160
STEP_UNSEEN = 3  # each third prompt has no part in the preferences
FIRST_SEED = 2_000_000  # far from every seed that the corpus and the demo draw with

RecipeOf = Callable[[str], TrainRecipe]


@dataclass(frozen=True)
class Line:
    """Every training in order, by its name, and what the models made of what is held out."""

    lake: Lake
    tokenizer_id: str
    codes_used: float
    """Share of the codebook that held-out media are told with."""
    trainings: Mapping[str, TrainReport]
    held_out: Mapping[str, Mapping[str, float]]
    """Training -> loss in nats a token of `text`, `image` and `video` on what is held out."""
    drawn: Mapping[str, Sequence[Generation]]
    """Training -> drawings of the same prompts and seeds."""
    preferred: Mapping[str, Sequence[Generation]]
    """Training -> drawings of prompts that the preferences have no pair of."""
    unseen: Sequence[ShownClip]
    replies: Sequence[Reply]


def learn(lake: Lake, truth: Path, corpus: CorpusConfig, recipe_of: RecipeOf) -> Line:
    """Walk the line in a lake that the demo has filled, each training by the recipe of its name. What is finished is found."""
    _curate(lake, corpus)
    trainings = {"vision tokenizer": _train(lake, "small_tokenizer", LEARN, recipe_of, held_out=UNSEEN)}
    codes = trainings["vision tokenizer"].checkpoint_id
    tokenizer_id = tokenize(lake, ALL, codes, load_named(TokenizeRecipe, "demo_tokenize")).tokenizer_id
    _pack(lake, tokenizer_id, truth.parent / CONVERSATIONS)
    first = _train(lake, "small_pretrain_1", "stage_1", recipe_of, held_out="kept_images")
    second = _train(lake, "small_pretrain_2", "stage_2", recipe_of, first, held_out="kept_all")
    quality = _train(lake, "small_quality", "best", recipe_of, second, held_out="kept_images")
    pairs = _prefer(lake, quality)
    preferred = _train(lake, "small_dpo", pairs, recipe_of, quality, held_out="kept_images")
    described = _train(lake, "small_instruct_1", "described", recipe_of, second)
    answering = _train(lake, "small_instruct_2", "asked", recipe_of, described)
    trainings |= {
        "stage 1": first, "stage 2": second, "quality tuning": quality, "preferences": preferred,
        "captions": described, "answers": answering,
    }  # fmt: skip
    drawing = ("stage 2", "quality tuning", "preferences")
    unseen = unseen_clips(lake, truth)
    return Line(
        lake=lake,
        tokenizer_id=tokenizer_id,
        codes_used=_codes_used(lake, tokenizer_id),
        trainings=trainings,
        held_out={name: _held_out(lake, trainings[name]) for name in ("stage 1", *drawing)},
        drawn={name: _draw(lake, trainings[name], _prompts(), NUM_EACH) for name in drawing},
        preferred={
            name: _draw(lake, trainings[name], _prompts()[::STEP_UNSEEN], NUM_JUDGED_BY_HEIGHT) for name in drawing[1:]
        },
        unseen=unseen,
        replies=ask(lake, questions(unseen), answering.checkpoint_id, load_named(AskRecipe, "demo_ask")),
    )


def _curate(lake: Lake, corpus: CorpusConfig) -> None:
    """One set of all that is worth learning, split by medium, and the parts of it that trainings read."""
    learnt = (f"resolution.low={corpus.clip_size_px}", f"split.low={SPLIT}")
    held_out = (f"resolution.low={corpus.clip_size_px}", f"split.high={SPLIT}")
    stills, clips = 'kinds=["image"]', 'kinds=["video"]'
    unseen = (f"resolution.low={corpus.unseen_size_px}", f"resolution.high={corpus.unseen_size_px}")
    sets = {
        LEARN: learnt, KEPT: held_out, UNSEEN: unseen, f"{LEARN}_{IMAGES}": (*learnt, stills),
        f"{KEPT}_{IMAGES}": (*held_out, stills), f"{KEPT}_{VIDEOS}": (*held_out, clips),
        "best": (f"resolution.low={corpus.shape_size_px}", f"split.low={SPLIT}", stills),
    }  # fmt: skip
    for name, changes in sets.items():
        curate(lake, load_curate_recipe("offline", changes), name)


def _pack(lake: Lake, tokenizer_id: str, conversations: Path) -> None:
    """The rows of each training, and of what is held out, all in the ids of the first."""

    def pack(name: str, set_name: str, *changes: str, said: Sequence[Path] = (), like: str | None = "stage_1") -> None:
        pack_sets(lake, [set_name], load_named(PackRecipe, "small_pack", changes), name, tokenizer_id, said, like)

    long, no_texts = "context_len=448", "include_texts=false"
    described = (no_texts, "null_prompt_ratio=0.0")
    pack("stage_1", f"{LEARN}_{IMAGES}", like=None)
    pack("stage_2", LEARN, long, "understanding.video=0.25")
    pack("best", "best", no_texts)
    pack("described", LEARN, long, *described, "understanding.image=1.0", "understanding.video=1.0")
    pack("asked", LEARN, long, *described, f"mixture.{LEARN}=0.0", said=[conversations])
    pack(f"{KEPT}_{IMAGES}", f"{KEPT}_{IMAGES}", *described)
    pack(f"{KEPT}_{VIDEOS}", f"{KEPT}_{VIDEOS}", long, *described)
    pack(f"{KEPT}_{ALL}", KEPT, long, *described)


def _train(
    lake: Lake,
    recipe: str,
    data: str,
    recipe_of: RecipeOf,
    start: TrainReport | None = None,
    held_out: str | None = None,
) -> TrainReport:
    begin = start.checkpoint_id if start is not None else None
    return train(lake, recipe_of(recipe), data, begin, held_out)


def _prefer(lake: Lake, model: TrainReport) -> str:
    """Pairs of drawings of the model, of which higher shapes are preferred, for most of the prompts; the name of the set."""
    seen = [prompt for index, prompt in enumerate(_prompts()) if index % STEP_UNSEEN]
    drawn = {one.generation_id for one in _draw(lake, model, seen, NUM_FOR_PAIRS)}
    return prefer(lake, PAIRS, load_named(PreferRecipe, "small_prefer"), scorer=SCORER, generations=drawn).name


def _prompts() -> list[str]:
    return [write_caption(facts) for facts in all_facts(moving=False)]


def _draw(lake: Lake, model: TrainReport, prompts: Sequence[str], num_each: int) -> list[Generation]:
    """Drawings by the model's own odds, which is where trainings differ: at low temperatures all draw much alike."""
    asks = [
        Ask(prompt, "image", FIRST_SEED + 1000 * index + number)
        for index, prompt in enumerate(prompts)
        for number in range(num_each)
    ]
    return generate(lake, asks, model.checkpoint_id, load_named(GenerateRecipe, "small_generate"))


def _codes_used(lake: Lake, tokenizer_id: str) -> float:
    blocks = clip_blocks(lake, tokenizer_id, read_set(lake, KEPT)["clip_id"].to_pylist())
    used = {int(code) for block in blocks.values() for code in np.unique(block.codes)}
    return len(used) / load_named(PackRecipe, "small_pack").num_codes


def _held_out(lake: Lake, training: TrainReport) -> dict[str, float]:
    """Loss on held-out images and clips, and on what is written of them."""
    images, videos, everything = (
        evaluate(lake, training.checkpoint_id, f"{KEPT}_{part}", EvaluateRecipe()).figures
        for part in (IMAGES, VIDEOS, ALL)
    )
    return {"text": everything["text"], "image": images["vision"], "video": videos["vision"]}
