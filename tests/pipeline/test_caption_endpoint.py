"""What an endpoint does wrong becomes a reason, and what may pass is tried again."""

import gzip
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from pipeline import caption_endpoint
from pipeline.caption_endpoint import EndpointConfig, EndpointEngine, served_model
from pipeline.caption_engine import Answer, Question, Sampling
from schemas.errors import ConfigError, RowError, TransientError
from tests.pipeline.stub_endpoint import MODEL, Endpoint, Reply, caption_reply, frames_of, serving

RNG = np.random.default_rng(0)
VIDEO = Question("video", RNG.integers(0, 255, (12, 20, 28, 3), dtype=np.uint8), "What moves?", "Be brief.")
IMAGE = Question("image", RNG.integers(0, 255, (1, 20, 28, 3), dtype=np.uint8), "What is it?")


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_endpoint, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(caption_endpoint, "_JITTER", lambda _: 0.01)


def ask(endpoint: Endpoint, question: Question = IMAGE, *, is_vllm: bool = False, **options: object) -> Answer:
    config = EndpointConfig(**{"url": endpoint.url, "timeout_s": 5.0, "patience_s": 0.2, **options})
    engine = EndpointEngine(MODEL, config, is_vllm)
    try:
        return engine.answer(question, Sampling(max_tokens=9, seed=3, repetition_penalty=1.05))
    finally:
        engine.close()


def in_turn(*replies: Reply) -> Callable[[dict[str, Any], int], Reply]:
    return lambda _, index: replies[min(index, len(replies) - 1)]


def test_an_answer_has_text_tokens_and_reason() -> None:
    with serving(in_turn(caption_reply("A dog."))) as endpoint:
        assert ask(endpoint) == Answer("A dog.", "stop", 7, 5)
    (request,) = endpoint.requests
    assert (request["model"], request["temperature"], request["max_tokens"], request["seed"]) == (MODEL, 0.0, 9, 3)
    assert "repetition_penalty" not in request  # OpenAI's own API refuses keys it does not know


def test_vllm_is_told_everything_that_it_would_fill_from_the_models_own_file() -> None:
    with serving(in_turn(caption_reply("A dog."))) as endpoint:
        ask(endpoint, is_vllm=True)
    assert {"repetition_penalty": 1.05, "top_k": -1, "min_p": 0.0}.items() <= endpoint.requests[0].items()


@pytest.mark.parametrize(("question", "as_", "types"), [
    (IMAGE, "video", ["image_url", "text"]),
    (VIDEO, "video", ["video_url", "text"]),
    (VIDEO, "images", ["image_url"] * 12 + ["text"]),
])  # fmt: skip
def test_every_pixel_arrives(question: Question, as_: str, types: Sequence[str]) -> None:
    with serving(in_turn(caption_reply("A dog."))) as endpoint:
        ask(endpoint, question, video_as=as_)
    (request,) = endpoint.requests
    assert np.array_equal(np.stack(frames_of(request)), question.frames)
    assert [part["type"] for part in request["messages"][-1]["content"]] == types
    assert request["messages"][-1]["content"][-1]["text"] == question.prompt
    assert [message["role"] for message in request["messages"]] == (["system", "user"] if question.system else ["user"])


@pytest.mark.parametrize("status", [400, 413, 422])
def test_what_is_refused_is_asked_once(status: int) -> None:
    refusal = Reply(status, b'{"error": {"message": "too long"}}')
    with serving(in_turn(refusal)) as endpoint, pytest.raises(RowError, match="too long") as caught:
        ask(endpoint)
    assert (caught.value.reason, caught.value.terminal) == (f"Http{status}", True)
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize("bad", [
    Reply(429, b"slow down", {"retry-after": "0.05"}),
    Reply(500, b"<html>oops</html>"),
    Reply(503, b""),
    Reply(529, b"overloaded"),
    Reply(500, b"<html>oops</html>", {"content-type": "text/html; charset=hex"}),
    Reply(200, b"<html>oops</html>", {"content-type": "text/html; charset=rot13"}),
    Reply(200, b"<html><body>A proxy's page</body></html>"),
    Reply(200, b'{"choices": [{"mess'),
    Reply(200, b'{"choices": []}'),
    Reply(200, b"[]"),
    Reply(200, b"null"),
    caption_reply(None),
    Reply(200, b'{"choices": [{"message": {"content": "A dog."}}], "usage": {"prompt_tokens": -1}}'),
    Reply(200, b'{"choices": [{"message": {"content": "A dog."}}], "usage": {"prompt_tokens": 4294967296}}'),
    Reply(200, b"[" * 100_000),
    Reply(200, b" " * (9 << 20)),
    Reply(200, gzip.compress(b" " * (64 << 20)), {"content-encoding": "gzip"}),
], ids=lambda reply: f"{reply.status}-{reply.body[:12]!r}-{''.join(reply.headers.values())}")  # fmt: skip
def test_what_may_pass_is_tried_again_until_it_does_or_the_tries_end(bad: Reply) -> None:
    with serving(in_turn(bad, bad, caption_reply("A dog."))) as endpoint:
        assert ask(endpoint, max_tries=3).text == "A dog."
        assert len(endpoint.requests) == 3
    with serving(in_turn(bad)) as endpoint, pytest.raises(RowError, match="after 3 tries") as caught:
        ask(endpoint, max_tries=3)
    assert caught.value.reason == (f"Http{bad.status}" if bad.status != 200 else "MalformedAnswer")
    assert not caught.value.terminal
    assert len(endpoint.requests) == 3


def test_an_answer_is_text_that_a_table_can_hold() -> None:
    body = b'{"choices": [{"message": {"content": "a \\ud800 dog\\u0000"}, "finish_reason": "\\udfff"}]}'
    with serving(in_turn(Reply(body=body))) as endpoint:
        answer = ask(endpoint)
    assert (answer.text, answer.finish_reason) == ("a \\ud800 dog\0", "\\udfff")


@pytest.mark.parametrize("status", [201, 307, 401, 404])
def test_what_another_setup_may_better_is_asked_once_and_not_given_up(status: int) -> None:
    reply = Reply(status, b'"\\ud800"', {"content-type": "text/html; charset=unicode_escape", "location": "/elsewhere"})
    with serving(in_turn(reply)) as endpoint, pytest.raises(RowError) as caught:
        ask(endpoint)
    assert (caught.value.reason, caught.value.terminal) == (f"Http{status}", False)
    assert caught.value.message.encode()  # a table can hold it
    assert len(endpoint.requests) == 1


def test_a_machine_that_is_off_stops_the_job_and_fails_no_item() -> None:
    """Its packets are lost, as those of a listener whose queue is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        address = listener.getsockname()
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(address)
        with pytest.raises(TransientError, match="has not been reachable"):
            ask(Endpoint(f"http://127.0.0.1:{address[1]}/v1"), timeout_s=1.0, patience_s=0.2)
        for one in waiting:
            one.close()


@pytest.mark.parametrize("url", ["http://HOST:PORT/v1", "localhost:8000", "http://[::1/v1", ""])
def test_an_address_that_is_none_is_a_mistake_of_the_caller(url: str) -> None:
    with pytest.raises(ConfigError, match="is an endpoint running there"):
        served_model(EndpointConfig(url=url), MODEL)


def test_a_key_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "secret\n")
    with serving(in_turn(Reply())) as endpoint:
        assert served_model(EndpointConfig(url=endpoint.url, key_variable="A_KEY"), MODEL).root == MODEL
        monkeypatch.setenv("A_KEY", "sec\x01ret")
        with pytest.raises(ConfigError) as caught:
            served_model(EndpointConfig(url=endpoint.url, key_variable="A_KEY"), MODEL)
    assert "ret" not in str(caught.value)


def test_the_endpoint_says_when_to_come_back() -> None:
    times: list[float] = []

    def answer(_: object, index: int) -> Reply:
        times.append(time.monotonic())
        return Reply(429, b"", {"retry-after": "0.6"}) if index == 0 else caption_reply("A dog.")

    with serving(answer) as endpoint:
        ask(endpoint)
    assert times[1] - times[0] >= 0.6


def test_an_endpoint_that_hangs_is_left() -> None:
    late = caption_reply("late", after_s=2.0)
    with serving(in_turn(late)) as endpoint, pytest.raises(RowError, match="no answer within") as caught:
        ask(endpoint, timeout_s=0.3, max_tries=2)
    assert (caught.value.reason, caught.value.terminal) == ("EndpointTimeout", False)


def test_an_endpoint_that_drips_is_left() -> None:
    """Bytes that keep coming reset a client's read timeout; the limit is over the whole exchange."""
    listener = socket.create_server(("127.0.0.1", 0))

    def drip() -> None:
        connection, _ = listener.accept()
        try:
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
            while True:
                connection.sendall(b" ")
                time.sleep(0.05)
        except OSError:
            connection.close()

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    started = time.monotonic()
    with pytest.raises(RowError, match="no answer within"):
        ask(Endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}/v1"), timeout_s=0.5, max_tries=1)
    assert time.monotonic() - started < 3.0
    thread.join(5)
    listener.close()


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    return port


def test_an_endpoint_that_comes_back_is_waited_for(free_port: int) -> None:
    address = Endpoint(f"http://127.0.0.1:{free_port}/v1")
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(ask, address, patience_s=30.0, max_tries=1)
        time.sleep(0.5)
        assert not waiting.done()
        with serving(in_turn(caption_reply("A dog.")), port=free_port):
            assert waiting.result(10).text == "A dog."


def test_an_endpoint_that_stays_away_stops_the_job_and_fails_no_item(free_port: int) -> None:
    with pytest.raises(TransientError, match="run the same command again"):
        ask(Endpoint(f"http://127.0.0.1:{free_port}/v1"))


def test_questions_at_once_are_bounded() -> None:
    with serving(in_turn(caption_reply("A dog.", after_s=0.1))) as endpoint:
        engine = EndpointEngine(MODEL, EndpointConfig(url=endpoint.url, concurrency=3), False)
        with ThreadPoolExecutor(12) as threads:
            answers = list(threads.map(lambda _: engine.answer(IMAGE, Sampling()), range(12)))
        engine.close()
    assert len(answers) == 12
    assert endpoint.most_at_once == 3


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "secret")
    with serving(in_turn(caption_reply("A dog."))) as endpoint:
        ask(endpoint, key_variable="A_KEY")
        ask(endpoint, key_variable="NO_SUCH_KEY")
    assert [headers.get("authorization") for headers in endpoint.headers] == ["Bearer secret", None]


def test_what_is_served_is_asked_first(free_port: int) -> None:
    with serving(in_turn(Reply()), owner="vllm") as endpoint:
        config = EndpointConfig(url=endpoint.url)
        assert served_model(config, MODEL).is_vllm
        with pytest.raises(ConfigError, match="does not serve 'other'; it serves"):
            served_model(config, "other")
    with pytest.raises(ConfigError, match="is an endpoint running there"):
        served_model(EndpointConfig(url=f"http://127.0.0.1:{free_port}/v1"), MODEL)
