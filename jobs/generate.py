"""Generate: images and short videos from text, and continuations of clips; each one a row, and a file that says the same."""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from jobs.models import Models, clip_blocks, first_of_each, load_models
from jobs.progress import progress
from jobs.run import recorded
from model.export import export_language_model
from model.generate import OnRow, Progress, VisionRequest, Window, generate_vision
from model.pictures import Frames, decode_codes, write_png
from model.sampling import SamplingConfig
from model.vision_tokenizer.tokenizer import VisionTokenizer
from schemas.catalog import Lake
from schemas.document import DocumentError, Tokens, VisionBlock, VisionDocument, parse_document, text_tokens
from schemas.errors import ConfigError
from schemas.generations import GENERATIONS
from schemas.recipe import Config, canonical_json, short_hash

Draw = Callable[[Sequence[VisionRequest], Progress, OnRow | None], list[Tokens]]
PREVIEW_S = 1.0


class VllmEngineConfig(Config):
    """How large vLLM's engine is. `max_pairs` drawings are made at once, each as two sequences when there is guidance."""

    max_pairs: int = Field(default=8, ge=1)
    dtype: str = "auto"
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    enforce_eager: bool = False
    cpu_kv_cache_gb: int = Field(default=4, ge=1)


class GenerateRecipe(Config):
    """Size of what is drawn, in codes, and how tokens are sampled."""

    h: int = Field(default=64, gt=0)
    w: int = Field(default=64, gt=0)
    video_t: int = Field(default=4, gt=0)
    fps: float = Field(default=24.0, gt=0)
    batch_size: int = Field(default=8, gt=0)
    lookahead: int = Field(default=8, ge=0)
    """Codes guessed and checked in each pass: the same codes in fewer passes."""
    compiled: bool = False
    """Steps of fixed shapes, compiled at the start: worth it for many drawings of one size."""
    window_t: int | None = Field(default=None, ge=2)
    """Latent frames of a clip that are drawn in one document; unset, as many as the model's context holds."""
    keep_t: int = Field(default=12, ge=1)
    """With how many of its last latent frames a clip goes on in a new document."""
    sampling: SamplingConfig = SamplingConfig()
    engine: Literal["outback", "vllm"] = "outback"
    """vLLM draws the exported checkpoint. Its seeds give other drawings; it guesses nothing ahead and has no windows."""
    vllm: VllmEngineConfig = VllmEngineConfig()

    @model_validator(mode="after")
    def _check_engine(self) -> Self:
        ours = ("lookahead", "compiled", "window_t", "keep_t")
        changed = [name for name in ours if getattr(self, name) != type(self).model_fields[name].default]
        if self.engine == "vllm" and changed:
            raise ValueError(f"found {', '.join(changed)} with engine 'vllm', which has none of it: leave it out")
        return self


@dataclass(frozen=True)
class Ask:
    """One thing to draw. With `continued_clip_id`, its first `context_t` latent frames are given and the rest is drawn."""

    prompt: str
    kind: Literal["image", "video"]
    seed: int
    continued_clip_id: str | None = None
    context_t: int = 0


@dataclass(frozen=True, eq=False)
class Generation:
    """One drawn image or video: its id, its file, its frames (T, H, W, 3) uint8 RGB and their rate, None for an image."""

    generation_id: str
    ask: Ask
    path: Path
    frames: Frames
    fps: float | None


def generate(
    lake: Lake, asks: Sequence[Ask], checkpoint: str, recipe: GenerateRecipe, *, preview: Path | None = None
) -> list[Generation]:
    """Draw what was asked, in order. What was drawn before with the same checkpoint and options is not drawn again.

    preview: folder for a PNG of each drawing under its id, renewed while it comes: the rows of an image that are there, and
        the newest frame of a clip.

    Raises: ConfigError for an unknown checkpoint or clip, or a size the model has no room for.
    """
    if preview is not None and recipe.engine == "vllm":
        raise ConfigError(
            "found a folder for previews with engine 'vllm', which shows nothing before the end: leave it out"
        )
    models = load_models(lake, checkpoint)
    try:
        for ask in asks:  # before ids are made of them
            text_tokens(ask.prompt, models.lm.vocabulary, models.lm.text)
    except DocumentError as error:
        raise ConfigError(str(error)) from error
    continued = {ask.continued_clip_id for ask in asks if ask.continued_clip_id is not None}
    blocks = clip_blocks(lake, models.tokenizer_id, continued)
    requests = [_request(ask, recipe, blocks) for ask in asks]
    checkpoint_id = models.checkpoint["checkpoint_id"]
    made: dict[str, Generation] = {}
    ids = [_generation_id(a, r, recipe, checkpoint_id) for a, r in zip(asks, requests, strict=True)]
    tokens = _stored(lake, ids)
    todo = first_of_each(ids, tokens)
    if todo:
        inputs = {"checkpoint": checkpoint_id, "asks": len(asks), "todo": len(todo)}
        with (
            recorded(lake, "generate", recipe, inputs) as run,
            progress("generate") as advance,
            _drawing(lake, models, recipe) as draw,
        ):
            run.outcome["generations"] = 0
            for start in range(0, len(todo), recipe.batch_size):
                part = todo[start : start + recipe.batch_size]
                asked = [requests[index] for index in part]

                def on_codes(done: int, total: int, start: int = start) -> None:
                    advance(start, len(todo), f"{done} of {total} codes")

                names = [ids[index] for index in part]
                coming = None if preview is None else _Preview(preview, models.vision, names, asked)
                try:
                    drawn = draw(asked, on_codes, coming)
                except DocumentError as error:  # a rate that no document can hold
                    raise ConfigError(str(error)) from error
                rows = []
                for index, document in zip(part, drawn, strict=True):
                    made[ids[index]] = _generation(lake, models, ids[index], asks[index], document)
                    rows.append(_row(made[ids[index]], requests[index], recipe, models, document))
                run.outcome["generations"] += lake.append(GENERATIONS, rows, run.run_id)  # what is drawn is kept
                advance(start + len(part), len(todo), "")
    return [
        replace(made[i], ask=ask) if i in made else _generation(lake, models, i, ask, tokens[i])
        for i, ask in zip(ids, asks, strict=True)
    ]


@contextmanager
def _drawing(lake: Lake, models: Models, recipe: GenerateRecipe) -> Iterator[Draw]:
    """The engine of the recipe."""
    if recipe.engine == "outback":
        yield lambda requests, on_progress, on_row: generate_vision(
            models.lm,
            requests,
            recipe.sampling,
            on_progress,
            lookahead=recipe.lookahead,
            window=Window(recipe.window_t, recipe.keep_t),
            on_row=on_row,
            compiled=recipe.compiled,
        )
        return
    from model.vllm_images import VllmImages

    folder = lake.folder / "cache" / f"llama-{models.checkpoint['checkpoint_id']}"
    if not folder.exists():
        export_language_model(folder, models.lm, "llama")
    context_len = models.lm.transformer.config.max_position_embeddings
    options = recipe.vllm.model_dump()
    engine = VllmImages(folder, models.lm.vocabulary, models.lm.text, context_len=context_len, **options)
    try:
        yield lambda requests, *_: engine.generate(requests, recipe.sampling)
    finally:
        engine.close()


class _Preview:
    """Rows of codes as they come -> pictures of what is there, each renewed at most once in `PREVIEW_S` seconds."""

    def __init__(
        self, folder: Path, vision: VisionTokenizer, names: Sequence[str], requests: Sequence[VisionRequest]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._vision, self._names, self._requests = folder, vision, names, requests
        self._rows: list[list[npt.NDArray[Any]]] = [[] for _ in names]
        self._shown_s = [-PREVIEW_S] * len(names)

    def __call__(self, request: int, row: int, codes_W: npt.NDArray[Any]) -> None:
        h = self._requests[request].grid[1]
        if row % h == 0:
            self._rows[request].clear()
        self._rows[request].append(codes_W)
        rows, is_video = self._rows[request], self._requests[request].kind == "video"
        if time.monotonic() - self._shown_s[request] < PREVIEW_S or (is_video and len(rows) < h):
            return
        frame = decode_codes(self._vision, np.stack(rows)[None], "video" if is_video else "image")[-1]
        path = self._folder / f"{self._names[request]}.png"
        draft = path.with_name(f".{path.name}.{os.getpid()}.png")
        write_png(draft, frame, {})
        draft.replace(path)
        self._shown_s[request] = time.monotonic()


def _request(ask: Ask, recipe: GenerateRecipe, blocks: Mapping[str, VisionBlock]) -> VisionRequest:
    if ask.kind == "image":
        return VisionRequest(ask.prompt, "image", (1, recipe.h, recipe.w), None, ask.seed)
    if ask.continued_clip_id is None:
        return VisionRequest(ask.prompt, "video", (recipe.video_t, recipe.h, recipe.w), recipe.fps, ask.seed)
    block = blocks[ask.continued_clip_id]
    t, h, w = block.grid
    if block.kind != "video":
        raise ConfigError(f"clip {ask.continued_clip_id} is an image: only videos go on")
    if not 0 < ask.context_t <= t or ask.context_t >= recipe.video_t:
        raise ConfigError(
            f"context of {ask.context_t} latent frames: the clip has {t}, and {recipe.video_t} are to be made in all"
        )
    return VisionRequest(ask.prompt, "video", (recipe.video_t, h, w), block.fps, ask.seed, block.codes[: ask.context_t])


def _generation_id(ask: Ask, request: VisionRequest, recipe: GenerateRecipe, checkpoint_id: str) -> str:
    context = request.given_codes.astype("<u2").tobytes().hex()
    sampling = recipe.sampling.model_dump(mode="json")
    window: list[object] = [] if (recipe.window_t, recipe.keep_t) == (None, 12) else [recipe.window_t, recipe.keep_t]
    engine = ["vllm"] if recipe.engine == "vllm" and recipe.sampling.temperature > 0 else []
    return short_hash(
        [
            ask.prompt,
            ask.kind,
            ask.seed,
            list(request.grid),
            request.fps,
            context,
            sampling,
            checkpoint_id,
            *window,
            *engine,
        ]
    )


def _stored(lake: Lake, ids: Sequence[str]) -> dict[str, Tokens]:
    rows = lake.read_where(GENERATIONS, "generation_id", sorted(set(ids)), ["generation_id", "tokens"]).to_pylist()
    return {row["generation_id"]: np.frombuffer(row["tokens"], "<u4").astype(np.uint32) for row in rows}


def _generation(lake: Lake, models: Models, generation_id: str, ask: Ask, tokens: Tokens) -> Generation:
    """Tokens -> frames, and the file if it is not there: a killed run may have left the row without its file, or half."""
    document = parse_document(tokens, models.lm.vocabulary, models.lm.text)
    if not isinstance(document, VisionDocument):
        raise ConfigError(f"generation {generation_id} holds text, expected an image or a video")
    block = document.block
    frames = decode_codes(models.vision, block.codes, ask.kind)
    path = lake.folder / "generations" / f"{generation_id}.{'png' if ask.kind == 'image' else 'mp4'}"
    if not path.exists():
        facts = {"outback.generation": generation_id, "prompt": ask.prompt, "seed": str(ask.seed)}
        facts["outback.checkpoint"] = str(models.checkpoint["checkpoint_id"])
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
        if ask.kind == "image":
            write_png(draft, frames[0], facts)
        else:
            _write_mp4(draft, frames, block.fps or 8.0, facts)
        draft.replace(path)
    return Generation(generation_id, ask, path, frames, block.fps)


def _row(
    generation: Generation, request: VisionRequest, recipe: GenerateRecipe, models: Models, tokens: Tokens
) -> dict[str, object]:
    ask = generation.ask
    t, h, w = request.grid
    return {
        "generation_id": generation.generation_id,
        "kind": ask.kind,
        "prompt": ask.prompt,
        "seed": ask.seed,
        "sampling": canonical_json(recipe.sampling.model_dump(mode="json")),
        "checkpoint_id": models.checkpoint["checkpoint_id"],
        "tokenizer_id": models.tokenizer_id,
        "t": t,
        "h": h,
        "w": w,
        "fps": request.fps,
        "tokens": tokens.astype("<u4").tobytes(),
        "continued_clip_id": ask.continued_clip_id,
        "context_t": ask.context_t,
        "uri": str(generation.path),
    }


def _write_mp4(path: Path, frames: Frames, fps: float, facts: Mapping[str, str]) -> None:
    import av

    with av.open(str(path), "w") as container:
        container.metadata["comment"] = json.dumps(dict(facts), sort_keys=True)
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
