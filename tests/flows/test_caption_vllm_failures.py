"""Captions by real vLLM through the stage: what dies and what is poisoned costs nothing but itself."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from jobs.curate import curate
from jobs.ingest import IngestConfig, ingest
from jobs.scan import scan
from pipeline.rules import CurateRecipe
from pipeline.scan_medium import ScanConfig
from schemas.captions import CAPTIONERS, CAPTIONS
from schemas.catalog import Lake
from schemas.runs import ATTEMPTS
from tests.flows.test_caption_failures import Gate, wait_for, workers_of
from tests.flows.test_scan_failures import ROOT, finish
from tests.pipeline import stub_endpoint
from tests.pipeline.small_vllm import engines_of, make_checkpoint, serving
from tests.pipeline.stub_endpoint import Reply

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
pytest.importorskip("vllm")

NUM_IMAGES = 40
# A worker's block is 16 windows, and as many as six others may be answered before its last one.
NUM_ANSWERED = 24
# Every window is one request, whatever random weights say, and all of them take long enough to be interrupted.
RECIPE = """
engine = "{engine}"
model = "{model}"
prompt = "{prompt}"
readers = 1
[sampling]
max_tokens = 240
[checks]
language = "any"
min_chars = 1
may_be_truncated = true
max_repetition = 1.0
[vllm]
max_num_seqs = 2
max_model_len = 512
cpu_kv_cache_gb = 1
dtype = "float32"
enforce_eager = true
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("captioner"))


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """Forty good pictures, one too thin for the model, one larger than its context, and one that will be gone."""
    import ray

    folder = tmp_path_factory.mktemp("media")
    rng = np.random.default_rng(0)
    sizes = {f"good{index:02}": (64, 64) for index in range(NUM_IMAGES)} | {"thin": (2, 900), "gone": (64, 64)}
    for name, (height, width) in sizes.items():
        Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(folder / f"{name}.png")
    made = Lake.open(tmp_path_factory.mktemp("lake") / "lake")
    ingest(made, [str(folder)], options=IngestConfig())
    scan(made, ScanConfig())
    curate(made, CurateRecipe(), "all")
    ray.shutdown()
    (folder / "gone.png").unlink()
    return made


class Captioning:
    """One captioner, by a prompt of its own, and what became of its windows."""

    def __init__(self, lake: Lake, folder: Path, engine: str, model: Path, *options: str) -> None:
        self.lake, self.options = lake, options
        self.name = f"{engine}-{folder.name}"
        prompt = folder / f"{self.name}.toml"
        prompt.write_text(f'image = "What is it, {self.name}?"\nvideo = "What moves?"\n')
        self.recipe = folder / "recipe.toml"
        self.recipe.write_text(RECIPE.format(engine=engine, model=model, prompt=prompt))

    def start(self, *hold: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "tests.flows.caption_driver", str(self.lake.folder), "all", str(self.recipe)]
        return subprocess.Popen(
            [*command, *self.options, *hold],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @contextlib.contextmanager
    def interrupted(self) -> Iterator[tuple["subprocess.Popen[str]", list[psutil.Process]]]:
        """A captioning after its first commit, and its engine, which stands still inside."""
        marker = self.recipe.with_name("committed")
        process = self.start("--hold", str(marker))
        wait_for(lambda: marker.exists() or process.poll() is not None, 600)
        assert process.poll() is None, process.communicate()[1]
        engines = engines_of(process.pid)
        try:
            assert len(engines) == 1
            assert 0 < len(self.captions()) < NUM_IMAGES
            yield process, engines
        finally:
            for engine in engines:
                with contextlib.suppress(psutil.NoSuchProcess):
                    engine.resume()

    def captions(self) -> list[dict[str, Any]]:
        return self._rows(CAPTIONS, "captioner_id")

    def failures(self) -> list[dict[str, Any]]:
        return self._rows(ATTEMPTS, "stage_id")

    def _rows(self, table: Any, column: str) -> list[dict[str, Any]]:
        mine = [r for r in self.lake.read(CAPTIONERS).to_pylist() if r["prompt_id"].startswith(self.name)]
        return self.lake.read_where(table, column, [row["captioner_id"] for row in mine]).to_pylist() if mine else []

    def assert_complete(self) -> None:
        """Every window has one caption, or one reason why not."""
        assert len(self.captions()) == len({row["clip_id"] for row in self.captions()}) == NUM_IMAGES
        reasons = {Path(row["uri"]).stem: row["error_class"] for row in self.failures()}
        assert reasons == {"thin": "EngineRefused", "gone": "FileNotFoundError"}


def test_driver_killed(lake: Lake, checkpoint: Path, tmp_path: Path) -> None:
    captioning = Captioning(lake, tmp_path, "vllm", checkpoint)
    with captioning.interrupted() as (process, engines):
        process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    first = {row["clip_id"]: row["run_id"] for row in captioning.captions()}
    assert 0 < len(first) < NUM_IMAGES
    assert not psutil.wait_procs(engines, timeout=60)[1], "an engine outlived its driver"
    finish(captioning.start())
    captioning.assert_complete()
    runs = {row["clip_id"]: row["run_id"] for row in captioning.captions()}
    assert {clip: runs[clip] for clip in first} == first  # what was there was not asked for again


@pytest.mark.parametrize("victim", ["worker", "engine"])
def test_worker_or_engine_killed(lake: Lake, checkpoint: Path, tmp_path: Path, victim: str) -> None:
    captioning = Captioning(lake, tmp_path, "vllm", checkpoint)
    with captioning.interrupted() as (process, engines):
        victims = workers_of(process.pid) if victim == "worker" else [engine.pid for engine in engines]
        assert len(victims) == 1
        os.kill(victims[0], signal.SIGKILL)
    finish(process)
    assert not psutil.wait_procs(engines, timeout=60)[1], "the first engine is still there"
    captioning.assert_complete()


def test_server_killed(lake: Lake, checkpoint: Path, tmp_path: Path) -> None:
    with contextlib.ExitStack() as server:
        url = server.enter_context(serving(checkpoint))

        def forward(request: dict[str, Any], _: int) -> Reply:
            response = httpx.post(f"{url}/chat/completions", json=request, timeout=600)
            return Reply(response.status_code, response.content)

        # The gate lies at the server's address: more windows than fill a block are answered, and some wait, however fast it is.
        gate = Gate(NUM_ANSWERED, forward)
        gated = server.enter_context(stub_endpoint.serving(gate, models=httpx.get(f"{url}/models").content))
        options = (
            f"endpoint.url={gated.url}",
            "endpoint.concurrency=2",
            "endpoint.patience_s=2",
            "endpoint.timeout_s=600",
        )
        captioning = Captioning(lake, tmp_path, "endpoint", checkpoint, *options)
        process = captioning.start()
        wait_for(lambda: len(captioning.captions()) > 0 or process.poll() is not None, 600)
        server.close()
    _, said = process.communicate(timeout=240)
    assert process.returncode == 1
    assert "run the same command again" in said
    done = len(captioning.captions())
    assert 0 < done < NUM_IMAGES
    assert all(Path(row["uri"]).stem in ("thin", "gone") for row in captioning.failures())
    was_refused = any(Path(row["uri"]).stem == "thin" for row in captioning.failures())
    port = int(gated.url.split(":")[2].split("/")[0])
    with serving(checkpoint, port):
        finish(captioning.start())
        asked = successes(port)
    reasons = {Path(row["uri"]).stem: row["error_class"] for row in captioning.failures()}
    assert reasons == {"thin": "Http400", "gone": "FileNotFoundError"}
    assert len(captioning.captions()) == len({row["clip_id"] for row in captioning.captions()}) == NUM_IMAGES
    assert asked == NUM_IMAGES - done, f"{asked} answers for {NUM_IMAGES - done} windows, {was_refused=}"


def successes(port: int) -> int:
    """Requests that vLLM's server says it has finished."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        lines = httpx.get(f"http://127.0.0.1:{port}/metrics").text.splitlines()
        counts = [float(line.rpartition(" ")[2]) for line in lines if line.startswith("vllm:request_success_total{")]
        if counts:
            return int(sum(counts))
        time.sleep(0.5)
    raise AssertionError("the server counts no requests")
