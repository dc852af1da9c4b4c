"""A small checkpoint that real vLLM runs in seconds, its server, and its processes."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil

from model.captioner import SPECIAL, CaptionerSize, write_captioner


def make_checkpoint(folder: Path) -> Path:
    """Random weights that say words: rows of special tokens are zero, so that no answer ends or hides what it says."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    write_captioner(folder, CaptionerSize(temporal_patch_size=2), ["a red circle moving left", "one blue square"], 0)
    weights = load_file(folder / "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    weights["model.embed_tokens.weight"][tokenizer.convert_tokens_to_ids(list(SPECIAL))] = 0.0
    weights = {name: tensor * 3 if name.startswith("visual.") else tensor for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@contextlib.contextmanager
def serving(checkpoint: Path, port: int | None = None) -> Iterator[str]:
    """vLLM's server on localhost. The command `vllm serve` asks for a distribution named vllm, and the CPU build has another
    name; this module is what that command runs.
    """
    if port is None:
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


def engines_of(pid: int) -> list[psutil.Process]:
    """vLLM's scheduler processes below a process."""
    return [child for child in psutil.Process(pid).children(recursive=True) if "EngineCore" in child.name()]
