"""Tokenize: the clips of a set through a trained vision tokenizer, into `vision_tokens`."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
from pydantic import Field

from jobs.checkpoints import checkpoint_row
from jobs.clip_items import clip_items
from jobs.cluster import ensure_ray, num_cpus
from jobs.progress import progress
from jobs.run import recorded
from pipeline.failures import FailureBound
from pipeline.stage import Stage, StageOutcome, left_to_do, run_stage
from pipeline.tokenize_vision import Encode, Frames, Preparation, TokenizeWorker
from schemas.catalog import Lake
from schemas.recipe import Config, canonical_json, short_hash
from schemas.vision_tokens import TOKENIZERS, VISION_TOKENS


class TokenizeRecipe(Config):
    """How clips are prepared, on how many threads each worker encodes, and how many clips may fail."""

    preparation: Preparation = Preparation()
    num_threads: int = Field(default=1, ge=1)
    failures: FailureBound = FailureBound()


@dataclass(frozen=True)
class TokenizeReport:
    """What was tokenized. `outcome` is None when there was nothing to do; `num_given_up` clips failed before and were left."""

    tokenizer_id: str
    num_clips: int
    num_given_up: int
    outcome: StageOutcome | None


@dataclass(frozen=True)
class LoadEncoder:
    """Loads a checkpoint's encoder inside a worker. A class, so that it travels to workers by pickling."""

    folder: Path
    num_threads: int

    def __call__(self) -> Encode:
        """The encoder, on one device, in eval mode."""
        import torch

        from model.vision_tokenizer.pixels import pixels_from_rgb
        from model.weights import load_vision_tokenizer

        torch.set_num_threads(self.num_threads)
        tokenizer = load_vision_tokenizer(self.folder).eval()

        def encode(frames: Frames) -> npt.NDArray[np.int64]:
            pixels = pixels_from_rgb(frames)
            with torch.inference_mode():
                if len(frames) == 1:
                    return np.asarray(tokenizer.encode(pixels).numpy())
                return np.asarray(tokenizer.encode_chunks(pixels.unsqueeze(0))[0].numpy())

        return encode


def tokenize(
    lake: Lake, set_name: str, checkpoint: str, recipe: TokenizeRecipe, *, retry_failed: bool = False
) -> TokenizeReport:
    """Tokenize what is left of a set. Does not start Ray when nothing is."""
    weights = checkpoint_row(lake, checkpoint, "vision_tokenizer")
    preparation = recipe.preparation
    frames = preparation.model_dump(include={"area_px", "fps", "max_frames", "remainder"}, mode="json")
    tokenizer_id = short_hash({"checkpoint": weights["checkpoint_id"], "preparation": frames})
    stage = Stage(
        name="tokenize",
        # More than the tokenizer's id: what failed under one limit is worth another try under others.
        stage_id=short_hash({"tokenizer_id": tokenizer_id, **preparation.model_dump(mode="json")}),
        item_key="clip_id",
        tables=(VISION_TOKENS,),
        make_worker=partial(
            TokenizeWorker, LoadEncoder(Path(str(weights["uri"])), recipe.num_threads), tokenizer_id, preparation
        ),
        failures=recipe.failures,
    )
    clips = clip_items(lake, set_name)
    done = lake.read(VISION_TOKENS, ["clip_id", "tokenizer_id"])
    done = done.filter(pc.equal(done["tokenizer_id"], tokenizer_id))
    left = left_to_do(lake, stage, clips, done, retry_failed=retry_failed)
    todo = left.items
    if not len(todo):
        left.check(recipe.failures, "clips")
        return TokenizeReport(tokenizer_id, len(clips), left.num_given_up, None)
    inputs = {"set": set_name, "checkpoint": weights["checkpoint_id"], "tokenizer_id": tokenizer_id, "todo": len(todo)}
    with recorded(lake, "tokenize", recipe, inputs) as run, progress("tokenize") as advance:
        row = {
            "tokenizer_id": tokenizer_id,
            "checkpoint_id": weights["checkpoint_id"],
            "preparation": canonical_json(frames),
            "uri": weights["uri"],
        }
        lake.append(TOKENIZERS, [row], run.run_id)
        ensure_ray()
        outcome = run_stage(lake, stage, todo, run.run_id, num_cpus(), advance)
        run.outcome |= {"done": outcome.num_done, "failed": outcome.num_failed}
        left.check(recipe.failures, "clips", outcome)
    return TokenizeReport(tokenizer_id, len(clips), left.num_given_up, outcome)
