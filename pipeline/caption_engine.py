"""What every captioning engine is asked, and what it answers.

An engine is shared by the threads of one worker: each thread asks for one caption and waits, and the engine batches whatever
is waiting. Engines of other kinds (a checkpoint of our own in its understanding mode) need `answer` and `close`, no more.
"""

import asyncio
import threading
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import Field

from schemas.recipe import Config

T = TypeVar("T")


class Sampling(Config):
    """How tokens are drawn. Temperature 0 takes the likeliest."""

    temperature: float = Field(default=0.0, ge=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    repetition_penalty: float = Field(default=1.0, gt=0.0)
    max_tokens: int = Field(default=512, ge=1)
    seed: int | None = None


@dataclass(frozen=True)
class Question:
    """Pictures and words: uint8 RGB frames (T, H, W, 3), T = 1 for an image, and what is asked about them."""

    kind: Literal["image", "video"]
    frames: npt.NDArray[np.uint8]
    prompt: str
    system: str = ""


@dataclass(frozen=True)
class Answer:
    """A caption as it came, before any check. `finish_reason` is `stop`, `length` or the engine's own word."""

    text: str
    finish_reason: str
    prompt_tokens: int
    output_tokens: int


class Engine(Protocol):
    """Answers questions from many threads at once."""

    name: str

    def answer(self, question: Question, sampling: Sampling) -> Answer:
        """Blocks until there is an answer.

        Raises: RowError if this question cannot be answered; TransientError if none can.
        """
        ...

    def close(self) -> None:
        """Ends what the engine has started."""
        ...


class EventLoop:
    """An event loop in a thread of its own, for engines that are asynchronous inside."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the loop and waits for its result in the calling thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def close(self) -> None:
        """Stops the loop; what still runs on it is dropped."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def message_parts(
    question: Question, picture_urls: list[str], video_as: Literal["video", "images"]
) -> list[dict[str, Any]]:
    """One user message of the OpenAI chat format. A video is one part (frames joined by commas, as vLLM reads them) or an
    image part per frame, for endpoints that know images only.
    """
    if question.kind == "video" and video_as == "video":
        frames = ",".join(url.partition(",")[2] for url in picture_urls)
        pictures = [{"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{frames}"}}]
    else:
        pictures = [{"type": "image_url", "image_url": {"url": url}} for url in picture_urls]
    messages: list[dict[str, Any]] = [{"role": "system", "content": question.system}] if question.system else []
    return [*messages, {"role": "user", "content": [*pictures, {"type": "text", "text": question.prompt}]}]


def png_url(frame: npt.NDArray[np.uint8]) -> str:
    """One uint8 RGB frame -> a data URL. PNG keeps every pixel, so that engines in and out of process see the same."""
    import base64

    import cv2

    ok, encoded = cv2.imencode(".png", frame[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])
    if not ok:
        raise ValueError(f"a frame of shape {frame.shape} cannot be a PNG")
    return f"data:image/png;base64,{base64.b64encode(encoded.tobytes()).decode()}"
