"""Captions from an OpenAI-compatible endpoint, such as a running `vllm serve`.

What may pass is tried again with growing, random pauses; what may not is a RowError with the status. An endpoint that
cannot be reached at all fails no item: the client waits for it, and stops the job when it has waited long enough.
"""

import asyncio
import json
import os
import time
from dataclasses import dataclass
from typing import Any, Literal

import httpx
from pydantic import Field
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from pipeline.caption_engine import Answer, EventLoop, Question, Sampling, message_parts, png_url
from pipeline.list_sources import readable_text
from schemas.errors import ConfigError, RowError, TransientError
from schemas.recipe import Config

WORTH_RETRYING = frozenset({408, 409, 425, 429})  # and whatever is the server's own fault
FOR_GOOD = frozenset({400, 413, 422})  # the question's own fault
SHOWN_CHARS = 300
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
MAX_BODY = 1 << 20  # of an answer: some hundred thousand words
MAX_TOKENS = 1 << 30  # of an answer: a row sums those of two
LIST_TIMEOUT_S = 30.0


class EndpointConfig(Config):
    """Where the endpoint is and how hard it may be asked."""

    url: str = "http://localhost:8000/v1"
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key, if the endpoint wants one. Keys never stand in recipes."""
    concurrency: int = Field(default=32, ge=1)
    timeout_s: float = Field(default=300.0, gt=0)
    max_tries: int = Field(default=5, ge=1)
    patience_s: float = Field(default=300.0, ge=0)
    """How long an endpoint that cannot be reached is waited for."""
    video_as: Literal["video", "images"] = "video"
    """`video`: one part of frames, as vLLM takes them; `images`: one part per frame, for endpoints that know images only."""


# What reading JSON of another shape than expected raises.
_NO_ANSWER = (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError)


class _RetryableError(Exception):
    """An answer that another try may better: what to say if none does, and when the endpoint asks to come back."""

    def __init__(self, reason: str, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(reason, message)
        self.reason, self.message, self.retry_after_s = reason, message, retry_after_s


class EndpointEngine:
    """Our own client of an OpenAI-compatible endpoint: bounded concurrency, retries with jitter, checked answers."""

    name = "endpoint"

    def __init__(self, model: str, config: EndpointConfig, is_vllm: bool) -> None:
        self._model, self._config, self._is_vllm = model, config, is_vllm
        self._loop = EventLoop("caption-endpoint")
        self._client, self._slots = self._loop.run(self._opened())
        self._unreachable_since: float | None = None

    async def _opened(self) -> tuple[httpx.AsyncClient, asyncio.Semaphore]:
        limits = httpx.Limits(max_connections=self._config.concurrency, max_keepalive_connections=None)
        # Shorter to connect than in all: a machine that is off is not reached, and no answer is late.
        timeout = httpx.Timeout(self._config.timeout_s, connect=min(10.0, self._config.timeout_s / 2))
        client = httpx.AsyncClient(headers=_headers(self._config), limits=limits, timeout=timeout, trust_env=False)
        return client, asyncio.Semaphore(self._config.concurrency)

    def answer(self, question: Question, sampling: Sampling) -> Answer:
        """One caption. See `Engine.answer`."""
        urls = [png_url(frame) for frame in question.frames]  # in the caller's thread: the loop only waits
        messages = message_parts(question, urls, self._config.video_as)
        body = {"model": self._model, "messages": messages, **_sampling_keys(sampling, self._is_vllm)}
        return self._loop.run(self._answered(json.dumps(body).encode()))

    async def _answered(self, body: bytes) -> Answer:
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_RetryableError),
            stop=stop_after_attempt(self._config.max_tries),
            wait=_pause,
            reraise=True,
        )
        async with self._slots:
            try:
                return await retrying(self._reached, body)
            except _RetryableError as error:
                tries = f"after {self._config.max_tries} tries"
                raise RowError(error.reason, f"{self._config.url}: {error.message}, {tries}", terminal=False) from None

    async def _reached(self, body: bytes) -> Answer:
        """One try, which waits while nobody listens at the address: that is no item's fault."""
        while True:
            try:
                # A limit over the whole exchange: an endpoint that sends a byte now and then hangs too.
                async with asyncio.timeout(self._config.timeout_s):
                    response = await self._exchanged(body)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                await self._wait_for_endpoint(error)
                continue
            except (TimeoutError, httpx.TimeoutException):
                limit = f"{self._config.timeout_s:g} s"
                raise _RetryableError("EndpointTimeout", f"no answer within {limit}") from None
            except httpx.HTTPError as error:
                raise _RetryableError("EndpointFailed", f"{type(error).__name__}: {error}") from None
            self._unreachable_since = None
            return _checked(response)

    async def _exchanged(self, body: bytes) -> httpx.Response:
        headers = {"content-type": "application/json", "accept-encoding": "identity"}
        url = f"{self._config.url}/chat/completions"
        async with self._client.stream("POST", url, content=body, headers=headers) as response:
            return httpx.Response(response.status_code, headers=_plain(response), content=await _bounded(response))

    async def _wait_for_endpoint(self, error: Exception) -> None:
        now = time.monotonic()
        self._unreachable_since = self._unreachable_since or now
        if now - self._unreachable_since >= self._config.patience_s:
            raise TransientError(
                f"{self._config.url} has not been reachable for {self._config.patience_s:g} s ({error}); start it and "
                "run the same command again: what is captioned is kept"
            )
        await asyncio.sleep(FIRST_PAUSE_S)

    def close(self) -> None:
        """Closes connections."""
        self._loop.run(self._client.aclose())
        self._loop.close()


@dataclass(frozen=True)
class ServedModel:
    """What an endpoint serves under a name: the folder or name behind it, and whether vLLM serves it."""

    root: str
    is_vllm: bool


def served_model(config: EndpointConfig, model: str) -> ServedModel:
    """Asks the endpoint what stands behind `model`.

    Raises: ConfigError if the endpoint cannot be reached, refuses the key, or serves something else.
    """
    try:
        response = asyncio.run(_listed(config))
        response.raise_for_status()
        served = {str(item["id"]): item for item in _json(response)["data"]}
    except (httpx.HTTPError, httpx.InvalidURL, _RetryableError, TimeoutError, *_NO_ANSWER) as error:
        said = error.message if isinstance(error, _RetryableError) else f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{config.url}/models gives no list of models ({said}); is an endpoint running there?"
        ) from None
    if model not in served:
        raise ConfigError(f"{config.url} does not serve {model!r}; it serves {sorted(served)}")
    return ServedModel(str(served[model].get("root") or model), served[model].get("owned_by") == "vllm")


async def _listed(config: EndpointConfig) -> httpx.Response:
    async with asyncio.timeout(LIST_TIMEOUT_S), httpx.AsyncClient(headers=_headers(config), trust_env=False) as client:
        headers = {"accept-encoding": "identity"}
        async with client.stream("GET", f"{config.url}/models", headers=headers) as response:
            content = await _bounded(response)
            return httpx.Response(
                response.status_code, headers=_plain(response), content=content, request=response.request
            )


def _headers(config: EndpointConfig) -> dict[str, str]:
    key = os.environ.get(config.key_variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{config.key_variable} holds characters that no key has")
    return {"authorization": f"Bearer {key}"} if key else {}


def _sampling_keys(sampling: Sampling, is_vllm: bool) -> dict[str, object]:
    """Sampling as the chat format says it. vLLM also takes keys that others refuse, and fills those that are absent from
    the model's own file, so all of them are sent to it.
    """
    keys: dict[str, object] = sampling.model_dump(include={"temperature", "top_p", "max_tokens"})
    if sampling.seed is not None:
        keys["seed"] = sampling.seed
    if is_vllm:
        keys |= {"repetition_penalty": sampling.repetition_penalty, "top_k": -1, "min_p": 0.0}
    return keys


async def _bounded(response: httpx.Response) -> bytes:
    """The body as it came, packed or not, of which no more is read than an answer can have."""
    parts, size = [], 0
    async for part in response.aiter_raw():
        parts.append(part)
        size += len(part)
        if size > MAX_BODY:
            raise _RetryableError("MalformedAnswer", f"an answer of more than {MAX_BODY} bytes")
    return b"".join(parts)


def _plain(response: httpx.Response) -> dict[str, str]:
    """What is read of the headers. Coding and character set are not: an answer is JSON, which is UTF-8."""
    return {name: value for name, value in response.headers.items() if name == "retry-after"}


def _json(response: httpx.Response) -> Any:
    return json.loads(response.content)


def _said(response: httpx.Response) -> str:
    return " ".join(response.content[: 16 * SHOWN_CHARS].decode("utf-8", "replace").split())[:SHOWN_CHARS]


def _num_tokens(count: object) -> int:
    found = int(str(count or 0))
    if not 0 <= found < MAX_TOKENS:
        raise ValueError(f"usage of {found} tokens")
    return found


def _checked(response: httpx.Response) -> Answer:
    """A response -> its caption, or the exception that says what is wrong with it."""
    if response.status_code != 200:
        message = f"status {response.status_code}: {_said(response)}"
        if response.status_code in WORTH_RETRYING or response.status_code >= 500:
            raise _RetryableError(f"Http{response.status_code}", message, _retry_after(response))
        raise RowError(f"Http{response.status_code}", message, terminal=response.status_code in FOR_GOOD)
    try:
        data = _json(response)
        choice, usage = data["choices"][0], data.get("usage") or {}
        text, reason = choice["message"]["content"], choice.get("finish_reason")
        if not isinstance(text, str):
            raise TypeError(f"content is {type(text).__name__}, not text")
        tokens = _num_tokens(usage.get("prompt_tokens")), _num_tokens(usage.get("completion_tokens"))
        return Answer(readable_text(text), readable_text(str(reason or "stop"))[:SHOWN_CHARS], *tokens)
    except _NO_ANSWER as error:
        said = f"{type(error).__name__}: {readable_text(str(error))} in {_said(response)!r}"
        raise _RetryableError("MalformedAnswer", said) from None


def _retry_after(response: httpx.Response) -> float:
    try:
        return max(0.0, min(LONGEST_PAUSE_S, float(response.headers.get("retry-after", 0))))
    except ValueError:
        return 0.0  # a date: our own pauses will do


_JITTER = wait_random_exponential(multiplier=FIRST_PAUSE_S, max=LONGEST_PAUSE_S)


def _pause(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after_s if isinstance(error, _RetryableError) else 0.0
    return max(asked, _JITTER(state))
