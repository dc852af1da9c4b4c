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

from model.captioner import CHAT_TEMPLATE, SPECIAL, CaptionerSize, write_captioner


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


def make_qwen3_checkpoint(folder: Path, qwen25: Path) -> Path:
    """A Qwen3-VL of random weights with the tokenizer and chat template of a small Qwen2.5-VL."""
    import torch
    from transformers import (
        AutoTokenizer,
        GenerationConfig,
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    tokenizer = AutoTokenizer.from_pretrained(qwen25)
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.2}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    vision = {"depth": 2, "num_heads": 2, "patch_size": 8, "temporal_patch_size": 2, "spatial_merge_size": 2}
    config = Qwen3VLConfig(
        text_config={
            **sizes, **heads, "vocab_size": -(-len(tokenizer) // 64) * 64, "rope_parameters": rope,
            "max_position_embeddings": 2048, "eos_token_id": ids["<|im_end|>"], "bos_token_id": None,
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            **sizes, **vision, "out_hidden_size": 64, "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    network = Qwen3VLForConditionalGeneration(config)
    with torch.no_grad():
        network.get_input_embeddings().weight[list(ids.values())] = 0.0
    network.generation_config = GenerationConfig(eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"])
    network.save_pretrained(folder)
    patches = {"patch_size": 8, "temporal_patch_size": 2, "merge_size": 2}
    area = {"shortest_edge": 64 * 64, "longest_edge": 64 * 64 * 12}
    same = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # as published: vLLM takes the images' for videos too
    Qwen3VLProcessor(
        Qwen2VLImageProcessor(**patches, **same, size={"shortest_edge": 64 * 64, "longest_edge": 64 * 64}),
        tokenizer,
        Qwen3VLVideoProcessor(**patches, size=area, do_sample_frames=False),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
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
    log = checkpoint.with_name("server.log")  # not in the folder: what is in it is the model
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
