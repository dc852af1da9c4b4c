"""Real vLLM on a checkpoint made here: in process and behind its server, with pictures and with video."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from model.captioner import SPECIAL, CaptionerSize, write_captioner
from pipeline.caption_endpoint import EndpointConfig, EndpointEngine, served_model
from pipeline.caption_engine import Question, Sampling
from pipeline.caption_vllm import VllmConfig, VllmEngine
from schemas.errors import ConfigError, RowError
from tests.conftest import CHECKOUT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
pytest.importorskip("vllm")

GREEDY = Sampling(max_tokens=24)
CONFIG = VllmConfig(max_num_seqs=8, max_model_len=512, cpu_kv_cache_gb=1, dtype="float32", enforce_eager=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights that say words: rows of special tokens are zero, so that no answer ends or hides what it says."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("captioner")
    write_captioner(folder, CaptionerSize(temporal_patch_size=2), ["a red circle moving left", "one blue square"], 0)
    weights = load_file(folder / "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    weights["model.embed_tokens.weight"][tokenizer.convert_tokens_to_ids(list(SPECIAL))] = 0.0
    weights = {name: tensor * 3 if name.startswith("visual.") else tensor for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


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


@contextlib.contextmanager
def serving(checkpoint: Path) -> Iterator[str]:
    """vLLM's server on localhost. The command `vllm serve` asks for a distribution named vllm, and the CPU build has another
    name; this module is what that command runs.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "512", "--max-num-seqs", "8"]
    options += ["--dtype", "float32", "--enforce-eager"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint), *options]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    log = checkpoint / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            deadline = time.monotonic() + 300
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200:
                        break
                assert server.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            for process in [*psutil.Process(server.pid).children(recursive=True), psutil.Process(server.pid)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            server.wait()


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
        for process in _engines_of(os.getpid()):
            process.kill()
        assert [answer.result().output_tokens for answer in answers] == [300] * 6


def _engines_of(pid: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(pid).children(recursive=True) if "EngineCore" in child.name()]


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
    engines = _engines_of(worker.pid)
    assert engines
    worker.kill()
    worker.communicate()
    gone, left = psutil.wait_procs(engines, timeout=20)
    assert gone
    assert not left


def test_a_folder_without_a_model_is_a_mistake_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vLLM cannot start"):
        VllmEngine(str(tmp_path), None, CONFIG)
