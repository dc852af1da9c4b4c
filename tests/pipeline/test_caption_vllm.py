"""Real vLLM on a checkpoint made here: in process and behind its server, with pictures and with video."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from model.captioner import load_captioner
from pipeline.caption_endpoint import EndpointConfig, EndpointEngine, served_model
from pipeline.caption_engine import Answer, Question, Sampling
from pipeline.caption_vllm import VllmConfig, VllmEngine
from schemas.errors import ConfigError, RowError
from tests.conftest import CHECKOUT
from tests.pipeline.small_vllm import engines_of, make_checkpoint, make_qwen3_checkpoint, serving
from train.captioner import CaptionExample, pictures_as_captioned

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
pytest.importorskip("vllm")
from vllm.v1.engine.exceptions import EngineDeadError  # noqa: E402  # only where vllm is

GREEDY = Sampling(max_tokens=24)
CONFIG = VllmConfig(max_num_seqs=8, max_model_len=512, cpu_kv_cache_gb=1, dtype="float32", enforce_eager=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("captioner"))


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[VllmEngine]:
    engine = VllmEngine(str(checkpoint), None, CONFIG)
    yield engine
    engine.close()


def question(seed: int, kind: str) -> Question:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (12 if kind == "video" else 1, 64, 64, 3), dtype=np.uint8)
    return Question(kind, small, "Say what this is.")


QUESTIONS = [question(seed, kind) for seed in range(6) for kind in ("image", "video")]


def test_engine_and_server_say_the_same(checkpoint: Path, engine: VllmEngine) -> None:
    with ThreadPoolExecutor(len(QUESTIONS)) as threads:
        inside = list(threads.map(lambda asked: engine.answer(asked, GREEDY), QUESTIONS))
    with serving(checkpoint) as url:
        config = EndpointConfig(url=url, timeout_s=60)
        served = served_model(config, str(checkpoint))
        assert served.is_vllm
        client = EndpointEngine(str(checkpoint), config, served.is_vllm)
        with ThreadPoolExecutor(len(QUESTIONS)) as threads:
            outside = list(threads.map(lambda asked: client.answer(asked, GREEDY), QUESTIONS))
        client.close()
    assert outside == inside
    assert len({answer.text for answer in inside}) > len(QUESTIONS) / 2  # they say what they see, not one thing of all
    assert all(answer.output_tokens == 24 and answer.finish_reason == "length" for answer in inside)


def test_the_engine_says_what_transformers_says(checkpoint: Path, engine: VllmEngine) -> None:
    """Of the checkpoint as it is trained: a captioner must be the same when it is served."""
    assert said_by(engine) == said_by_transformers(checkpoint)


def test_qwen3_vl_says_what_transformers_says(checkpoint: Path, tmp_path: Path) -> None:
    folder = make_qwen3_checkpoint(tmp_path, checkpoint)
    engine = VllmEngine(str(folder), None, CONFIG)
    try:
        said = said_by(engine)
    finally:
        engine.close()
    assert said == said_by_transformers(folder)
    assert len(set(said)) > len(QUESTIONS) / 2


def said_by(engine: VllmEngine) -> list[str]:
    with ThreadPoolExecutor(len(QUESTIONS)) as threads:
        answers = list(threads.map(lambda asked: engine.answer(asked, GREEDY), QUESTIONS))
    return [_whole(answer.text) for answer in answers]


def said_by_transformers(folder: Path) -> list[str]:
    from transformers import AutoProcessor

    processor, network = AutoProcessor.from_pretrained(folder), load_captioner(str(folder)).eval()
    said = []
    for asked in QUESTIONS:
        content = [{"type": asked.kind}, {"type": "text", "text": asked.prompt}]
        messages = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        example = CaptionExample(asked.kind, asked.frames, "")
        inputs = processor(text=[text], return_tensors="pt", **pictures_as_captioned(example))
        written = network.generate(**inputs, max_new_tokens=GREEDY.max_tokens, do_sample=False)  # type: ignore[operator]
        said.append(
            _whole(processor.tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        )
    return said


def _whole(text: str) -> str:
    """Without the end that is no whole character: vLLM waits for the rest of it, transformers does not."""
    return text.rstrip("\ufffd")


def test_what_the_model_cannot_take_is_refused_and_harms_nobody(engine: VllmEngine) -> None:
    good = QUESTIONS[0]
    long = Question("image", good.frames, "word " * 4000)
    thin = Question("image", np.zeros((1, 2, 900, 3), np.uint8), "Say what this is.")
    with ThreadPoolExecutor(3) as threads:
        answers = [threads.submit(engine.answer, asked, GREEDY) for asked in (long, thin, good)]
    assert answers[2].result().text
    for refused in answers[:2]:
        error = refused.exception()
        assert isinstance(error, RowError)
        assert (error.reason, error.terminal) == ("EngineRefused", True)
        assert len(error.message) > 20


def test_an_engine_that_is_killed_is_replaced_and_everybody_gets_an_answer(engine: VllmEngine) -> None:
    long = Sampling(max_tokens=300)
    with ThreadPoolExecutor(6) as threads:
        answers = [threads.submit(engine.answer, asked, long) for asked in QUESTIONS[:6]]
        time.sleep(0.2)
        assert not any(answer.done() for answer in answers)
        killed = engines_of(os.getpid())
        assert killed
        for process in killed:
            process.kill()
        assert [answer.result().output_tokens for answer in answers] == [300] * 6
    assert engines_of(os.getpid())
    assert not set(engines_of(os.getpid())) & set(killed)


class FakeEngine(VllmEngine):
    """The engine's own handling of deaths, over an engine that dies of some questions and starts so many times."""

    def __init__(self, deadly: set[str], starts: int) -> None:
        self.deadly, self.starts, self.started = deadly, starts, 0
        super().__init__("fake", None, CONFIG)

    async def _started(self) -> Any:
        self.started += 1
        if self.started > self.starts:
            raise ConfigError("no memory left")
        return FakeCore()

    async def _answered(self, question: Question, sampling: Sampling) -> Answer:
        core = self._engine
        core.most_at_once = max(core.most_at_once, core.at_once + 1)
        core.at_once += 1
        try:
            for _ in range(3):
                await asyncio.sleep(0.002)
                core.is_dead = core.is_dead or question.prompt in self.deadly
                if core.is_dead:
                    raise EngineDeadError
        finally:
            core.at_once -= 1
        return Answer(question.prompt, "stop", 1, 1)


class FakeCore:
    def __init__(self) -> None:
        self.is_dead, self.at_once, self.most_at_once = False, 0, 0

    def shutdown(self) -> None:
        self.is_dead = True


def ask_all(engine: VllmEngine, count: int) -> dict[str, str]:
    """Number of question -> the reason it failed for."""
    questions = [Question("image", QUESTIONS[0].frames, str(number)) for number in range(count)]
    with ThreadPoolExecutor(16) as threads:
        asked = [threads.submit(engine.answer, question, GREEDY) for question in questions]
    errors = {question.prompt: one.exception() for question, one in zip(questions, asked, strict=True)}
    return {prompt: getattr(error, "reason", str(error)) for prompt, error in errors.items() if error is not None}


def test_only_questions_that_kill_an_engine_fail() -> None:
    deadly = {"3", "30", "31", "60"}
    engine = FakeEngine(deadly, starts=100)
    assert ask_all(engine, 200) == dict.fromkeys(deadly, "EngineCrashed")
    assert engine._engine.most_at_once > 1
    engine.close()


def test_an_engine_that_does_not_start_again_is_started_once_for_all() -> None:
    engine = FakeEngine({"20"}, starts=1)
    failed = ask_all(engine, 200)
    assert len(failed) > 100
    assert set(failed.values()) == {"no memory left"}
    assert engine.started == 2
    engine._loop.close()
    engine._reaper.close()


def test_a_worker_that_is_killed_leaves_no_engine(checkpoint: Path) -> None:
    program = (
        "import sys\nfrom tests.pipeline.test_caption_vllm import CONFIG, VllmEngine\n"
        "if __name__ == '__main__':\n"
        "    engine = VllmEngine(sys.argv[1], None, CONFIG)\n    print('ready', flush=True)\n    sys.stdin.read()\n"
    )
    script = checkpoint / "worker.py"
    script.write_text(program)
    worker = subprocess.Popen(
        [sys.executable, str(script), str(checkpoint)],
        cwd=CHECKOUT,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert worker.stdout is not None
    assert "ready\n" in worker.stdout  # after what vLLM says
    engines = engines_of(worker.pid)
    assert engines
    worker.kill()
    worker.communicate()
    gone, left = psutil.wait_procs(engines, timeout=20)
    assert gone
    assert not left


def test_a_folder_without_a_model_is_a_mistake_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vLLM cannot start"):
        VllmEngine(str(tmp_path), None, CONFIG)
