"""Captions of windows: frames read ahead by child processes, questions to an engine, and checks of what it says."""

import contextlib
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from pipeline.caption_checks import CaptionChecks, find_problem, language
from pipeline.caption_endpoint import EndpointConfig
from pipeline.caption_engine import Answer, Engine, Question, Sampling
from pipeline.caption_prompts import Prompt
from pipeline.caption_vllm import VllmConfig
from pipeline.caption_windows import WindowConfig, window_frames
from pipeline.failures import FailureBound
from pipeline.sandbox import SandboxPool
from pipeline.stage import Rows
from schemas.captions import CAPTIONS
from schemas.errors import RowError
from schemas.recipe import Config, canonical_json, short_hash

CHECKS_VERSION = 1


class CaptionRecipe(Config):
    """Who captions, what is asked, what is shown, and what a caption must pass."""

    engine: Literal["provided", "vllm", "endpoint"] = "provided"
    model: str | None = None
    """For `vllm` a folder, a captioner's checkpoint id (or `latest`) or a hub name; for `endpoint` the name it serves."""
    revision: str | None = None
    prompt: str = "dense.v1"
    """A shipped prompt or the path of one."""
    skip_captioned: bool = False
    """Leave out clips that another captioner has captioned without a problem, or that came with a caption."""
    windows: WindowConfig = WindowConfig()
    sampling: Sampling = Sampling()
    second_sampling: Sampling = Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.05, seed=0)
    """How a caption that failed its checks is tried again, once."""
    checks: CaptionChecks = CaptionChecks()
    vllm: VllmConfig = VllmConfig()
    endpoint: EndpointConfig = EndpointConfig()
    num_engines: int = Field(default=1, ge=1)
    """Engines, each in a worker of its own."""
    readers: int = Field(default=2, ge=1)
    """Processes that read frames for one engine."""
    failures: FailureBound = FailureBound()

    @model_validator(mode="after")
    def _is_read(self) -> Self:
        if self.engine == "provided" and (unread := sorted(self.model_fields_set - {"engine"})):
            raise ValueError(
                f"engine 'provided' reads no {', '.join(unread)}: start from caption_vllm or caption_endpoint"
            )
        return self

    @property
    def concurrency(self) -> int:
        """Windows under way in one worker: what the engine works on, and as many more as its readers hold ready."""
        return (self.vllm.max_num_seqs if self.engine == "vllm" else self.endpoint.concurrency) + 4 * self.readers


def captioner_row(
    recipe: CaptionRecipe, prompt_id: str, prompt: Prompt, model: str, model_digest: str
) -> dict[str, object]:
    """What a caption depends on -> the `captioners` row. Engine and limits are not in it: they change no word."""
    content = {
        "model_digest": model_digest,
        "prompt": prompt.canonical_json(),
        "sampling": canonical_json(
            [recipe.sampling.model_dump(mode="json"), recipe.second_sampling.model_dump(mode="json")]
        ),
        "windowing": canonical_json(recipe.windows.identity()),
        "checks": canonical_json({**recipe.checks.model_dump(mode="json"), "version": CHECKS_VERSION}),
    }
    if recipe.engine == "vllm" and recipe.vllm.dtype != "auto":
        content["sampling"] = canonical_json({"tries": json.loads(content["sampling"]), "dtype": recipe.vllm.dtype})
    if recipe.engine == "endpoint" and recipe.endpoint.video_as != "video":
        content["windowing"] = canonical_json({**recipe.windows.identity(), "video_as": recipe.endpoint.video_as})
    return {"captioner_id": short_hash(content), "model": model, "prompt_id": prompt_id, **content}


class CaptionWorker:
    """One engine and its readers. `process` is called from many threads; the engine batches what they ask."""

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        recipe: CaptionRecipe,
        captioner_id: str,
        prompt_id: str,
        prompt: Prompt,
    ) -> None:
        self.recipe, self.captioner_id, self.prompt_id, self.prompt = recipe, captioner_id, prompt_id, prompt
        self.readers = SandboxPool(recipe.readers, recipe.windows.timeout_s, recipe.windows.memory_mb)
        language("", 1.0)  # its tables load at the first call, which would keep the engine waiting
        self.engine = make_engine()

    def process(self, item: Mapping[str, Any]) -> Rows:
        """One window -> its `captions` row."""
        frames = self.readers.run(window_frames, dict(item), self.recipe.windows)
        question = Question(item["kind"], frames, self.prompt.asked(item["kind"]), self.prompt.system)
        return {
            CAPTIONS.name: [{**_window_columns(item), **self._caption(question), "captioner_id": self.captioner_id}]
        }

    def _caption(self, question: Question) -> dict[str, object]:
        first = self.engine.answer(question, self.recipe.sampling)
        problem = self._problem(first, question)
        tries = [(first, problem)]
        if problem is not None:
            with contextlib.suppress(
                RowError
            ):  # the first caption with its problem is better than an attempt without any
                second = self.engine.answer(question, self.recipe.second_sampling)
                tries.append((second, self._problem(second, question)))
        last, problem = tries[-1]
        text = last.text.strip()
        return {
            "text": text,
            "problem": problem,
            "language": language(text, self.recipe.checks.min_language_probability),
            "num_frames": len(question.frames),
            "prompt_id": self.prompt_id,
            "prompt_tokens": sum(answer.prompt_tokens for answer, _ in tries),
            "output_tokens": sum(answer.output_tokens for answer, _ in tries),
            "finish_reason": last.finish_reason,
            "tries": len(tries),
            "first_text": first.text.strip() if len(tries) > 1 else None,
            "first_problem": tries[0][1] if len(tries) > 1 else None,
            "engine": self.engine.name,
        }

    def _problem(self, answer: Answer, question: Question) -> str | None:
        return find_problem(answer.text, answer.finish_reason, question.prompt, self.recipe.checks)


def _window_columns(item: Mapping[str, Any]) -> dict[str, object]:
    return {name: item[name] for name in ("clip_id", "window", "window_start_ms", "window_end_ms")}
