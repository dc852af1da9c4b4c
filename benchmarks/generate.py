"""How fast images are decoded, beside transformers' generate, and how fast pixels and codes turn into one another.

Usage: python benchmarks/generate.py [decode | tokenizer | gpu] [--size 8b] [--device cuda] [--side 90] [--compiled]

`decode`: a model of about 100 million parameters with the published vocabulary of 184,622 ids and random weights draws an
image of 32 x 32 codes, with guidance and under the grammar, in float32. transformers gets the same weights, prompts, guidance
and constraint, as its documentation says; greedy tokens must be the same. Then each trick is left out in turn.

`tokenizer`: a vision tokenizer of the published shape and codebook, a quarter as wide, with random weights, beside
transformers' on the same pixels and codes, at 256 x 256; and the peak memory of each at 512 x 512, in a process of its own.

`gpu`, where there is one: the published size with random weights in bf16 draws 90 x 90 codes (720 x 720 pixels) with guidance,
for one request and for 16 at once. The limit is the time to read from memory what each pass needs: the layers' weights, the
head's rows that are scored, and the keys and values of all rows. Published for such a picture: 260 s as released, 68 s at best
since.
"""

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.export import export_language_model, export_vision_tokenizer
from model.generate import VisionRequest, generate_vision
from model.sampling import SamplingConfig
from model.text_tokenizer import TinyBpe
from model.transformer import TRANSFORMER_SIZES, Transformer, TransformerConfig, transformer_size
from model.vision_tokenizer.config import VisionTokenizerConfig
from model.vision_tokenizer.tokenizer import VisionTokenizer
from model.weights import LanguageModel
from schemas.document import prompt_tokens
from schemas.vocabulary import EMU3

SIDE = 32
GRID = (1, SIDE, SIDE)
GUIDANCE = 3.0
ROUNDS = 3
BYTES = 2  # of bf16
SMALL_SIDE = 24
PROMPT = "a red bird on a branch"
CONFIG = TransformerConfig(
    vocab_size=EMU3.size, hidden_size=256, intermediate_size=768, num_layers=2, num_heads=4, num_kv_heads=1, head_dim=64
)
VISION_CONFIG = VisionTokenizerConfig(ch=64)
REQUEST = VisionRequest(PROMPT, "image", GRID, seed=0)


# --- decoding ---


def make_model() -> LanguageModel:
    """Random weights, wide enough that its choices are no ties."""
    torch.manual_seed(0)
    transformer = Transformer(CONFIG).eval()
    transformer.lm_head.weight.data.normal_(std=0.2)
    return LanguageModel(transformer, EMU3, TinyBpe.train([], 256))


def by_transformers(folder: Path, *, greedy: bool, side: int = SIDE, device: str = "cpu") -> tuple[list[int], float]:
    """Tokens after IMG, and seconds."""
    from transformers import Emu3ForCausalLM

    network: Any = Emu3ForCausalLM.from_pretrained(folder).eval().to(device)
    codec = TinyBpe.train([], 256)
    prompt, negative = (
        torch.tensor([prompt_tokens(text, "image", (1, side, side), None, EMU3, codec).tolist()], device=device)
        for text in (PROMPT, "")
    )
    vision_tokens = list(range(EMU3.vision_offset, EMU3.size))

    def allowed(_: int, tokens: Tensor) -> list[int]:
        offset = len(tokens) - int(torch.nonzero(tokens == EMU3.img)[0])
        if offset % (side + 1) == 0:
            return [EMU3.eol]
        ends = {side * (side + 1) + 1: EMU3.eof, side * (side + 1) + 2: EMU3.eoi, side * (side + 1) + 3: EMU3.eos}
        return [ends[offset]] if offset in ends else vision_tokens

    how: dict[str, Any] = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 2048, "temperature": 1.0}
    started = time.perf_counter()
    found = network.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        negative_prompt_ids=negative,
        negative_prompt_attention_mask=torch.ones_like(negative),
        guidance_scale=GUIDANCE,
        prefix_allowed_tokens_fn=allowed,
        max_new_tokens=side * (side + 1) + 3,
        **how,
    )
    return found[0, prompt.shape[1] :].tolist(), time.perf_counter() - started


def by_us(
    *, greedy: bool, lookahead: int = 0, whole_head: bool = False, compiled: bool = False
) -> tuple[list[int], float]:
    """Tokens after IMG, and seconds. `whole_head` scores all ids, as one that knows no grammar must. What is `compiled` was
    so before the clock starts.
    """
    lm = make_model()
    if whole_head:
        score = lm.transformer.logits
        lm.transformer.logits = lambda hidden, rows=None: score(hidden)[..., rows]  # type: ignore[method-assign]
    sampling = SamplingConfig(temperature=0.0 if greedy else 1.0, guidance=GUIDANCE)
    length = len(prompt_tokens(PROMPT, "image", GRID, None, EMU3, lm.text))
    if compiled:
        generate_vision(lm, [REQUEST], sampling, lookahead=lookahead, compiled=True)
    started = time.perf_counter()
    (found,) = generate_vision(lm, [REQUEST], sampling, lookahead=lookahead, compiled=compiled)
    return found[length:].tolist(), time.perf_counter() - started


def branch_by_branch() -> tuple[list[int], float]:
    """What both guidance branches would take one after the other: twice a run without guidance."""
    lm = make_model()
    started = time.perf_counter()
    generate_vision(lm, [REQUEST], SamplingConfig(guidance=1.0))
    return [], 2 * (time.perf_counter() - started)


def decode() -> None:
    """Print tokens per second, ratios and peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        export_language_model(Path(folder) / "hub", make_model(), "transformers")
        ways: dict[str, tuple[Callable[..., tuple[list[int], float]], dict[str, Any]]] = {
            "transformers, greedy": (by_transformers, {"folder": Path(folder) / "hub", "greedy": True}),
            "here, greedy": (by_us, {"greedy": True}),
            "transformers, sampled": (by_transformers, {"folder": Path(folder) / "hub", "greedy": False}),
            "here, sampled": (by_us, {"greedy": False}),
            "here, sampled, scoring all ids": (by_us, {"greedy": False, "whole_head": True}),
            "here, sampled, one branch after the other": (branch_by_branch, {}),
            "here, sampled, compiled": (by_us, {"greedy": False, "compiled": True}),
            "here, sampled, 8 codes ahead": (by_us, {"greedy": False, "lookahead": 8}),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        memory: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            tokens = {}
            for name, (way, options) in ways.items():
                (tokens[name], took), peak_mb = alone(way, options)
                seconds[name].append(took)
                memory[name].append(peak_mb)
            if tokens["transformers, greedy"] != tokens["here, greedy"]:
                raise RuntimeError("transformers chose other tokens")
            for name in ("here, sampled, 8 codes ahead", "here, sampled, compiled", "here, sampled, scoring all ids"):
                if tokens["here, sampled"] != tokens[name]:
                    raise RuntimeError(f"{name}: other tokens")
        count = SIDE * (SIDE + 1) + 3
        for name in ways:
            kind = "greedy" if "greedy" in name else "sampled"
            ratios = [a / b for a, b in zip(seconds[f"transformers, {kind}"], seconds[name], strict=True)]
            print(
                f"{name}: {count / statistics.median(seconds[name]):.1f} tokens/s, {statistics.median(ratios):.2f} times "
                f"transformers ({min(ratios):.2f} to {max(ratios):.2f}), peak {statistics.median(memory[name]):.0f} MB"
            )


# --- vision tokenizer ---


def make_vision() -> VisionTokenizer:
    """Random weights."""
    torch.manual_seed(0)
    vision = VisionTokenizer(VISION_CONFIG).eval()
    vision.quantize.embedding.weight.data.normal_()
    return vision


def pixels(side: int, num_frames: int) -> Tensor:
    """An image (1, 3, H, W) for one frame, a clip (1, T, 3, H, W) for more."""
    found = torch.rand((1, num_frames, 3, side, side), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return found[:, 0] if num_frames == 1 else found


@torch.no_grad()
def tokenize(folder: Path | None, side: int, num_frames: int, repeats: int) -> tuple[float, float, Tensor]:
    """Seconds to encode, seconds to decode, and the codes: transformers' network with a folder, ours without."""
    given = pixels(side, num_frames)
    if folder is None:
        ours = make_vision()
        encode: Callable[[Tensor], Tensor] = ours.encode
        decode: Callable[[Tensor], Tensor] = ours.decode
    else:
        from transformers.models.emu3.modeling_emu3 import Emu3VQVAE

        theirs: Any = Emu3VQVAE.from_pretrained(folder).eval()
        sizes = torch.tensor([[side, side]])
        encode = lambda given: torch.stack(list(theirs.encode(given, image_sizes=sizes).image_tokens))  # noqa: E731
        decode = theirs.decode
    codes = encode(given)  # the first call of each is not timed
    decode(codes)
    encoding = _seconds(lambda: encode(given), repeats)
    return encoding, _seconds(lambda: decode(codes), repeats), codes


def _seconds(call: Callable[[], Tensor], repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started) / max(1, repeats)


def tokenizer() -> None:
    """Print throughput at 256 x 256 and peak memory at 512 x 512, beside transformers'."""
    with tempfile.TemporaryDirectory() as folder:
        hub = Path(folder) / "hub"
        export_vision_tokenizer(hub, make_vision(), "transformers")
        for what, num_frames, repeats in (("image", 1, 3), ("clip of four frames", 4, 1)):
            ratios: list[tuple[float, float]] = []
            for _ in range(ROUNDS):
                theirs, _ = alone(tokenize, {"folder": hub, "side": 256, "num_frames": num_frames, "repeats": repeats})
                ours, _ = alone(tokenize, {"folder": None, "side": 256, "num_frames": num_frames, "repeats": repeats})
                if not torch.equal(theirs[2], ours[2]):
                    raise RuntimeError("transformers found other codes")
                ratios.append((theirs[0] / ours[0], theirs[1] / ours[1]))
            encoding, decoding = (statistics.median(ratio[part] for ratio in ratios) for part in (0, 1))
            print(f"{what}, 256 x 256: encodes {encoding:.2f} times as fast, decodes {decoding:.2f} times")
            options = {"side": 512, "num_frames": num_frames, "repeats": 0}
            empty = alone(nothing, {})[1]
            theirs_mb, ours_mb = (alone(tokenize, {"folder": where, **options})[1] - empty for where in (hub, None))
            print(
                f"{what}, 512 x 512: peak {ours_mb:.0f} MB, {ours_mb / theirs_mb:.2f} of the {theirs_mb:.0f} MB there"
            )


def nothing() -> None:
    """Imports both libraries and rests."""
    from transformers.models.emu3 import modeling_emu3

    assert modeling_emu3


# --- a GPU ---


def make_large(size: str, device: str) -> LanguageModel:
    """Random weights of a named size in bf16, made on the device."""
    with torch.device(device):
        transformer = Transformer(transformer_size(size, EMU3.size)).to(torch.bfloat16)
    return LanguageModel(transformer.eval(), EMU3, TinyBpe.train([], 256))


def bytes_per_pass(config: TransformerConfig, num_rows: int, length: int) -> float:
    """What a pass reads at the least, with caches half full on average."""
    attention = config.hidden_size * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    layer = attention + 3 * config.hidden_size * config.intermediate_size
    weights = config.num_layers * layer + EMU3.num_codes * config.hidden_size
    cached = 2 * config.num_layers * config.num_kv_heads * config.head_dim * num_rows * length / 2
    return BYTES * (weights + cached)


def drawing_seconds(lm: LanguageModel, side: int, batch: int, compiled: bool) -> float:
    """To draw a batch of images. What is compiled was so before the clock starts."""
    requests = [VisionRequest(PROMPT, "image", (1, side, side), seed=seed) for seed in range(batch)]
    sampling = SamplingConfig(guidance=GUIDANCE)
    if compiled:
        generate_vision(lm, requests, sampling, compiled=True)
    started = time.perf_counter()
    generate_vision(lm, requests, sampling, compiled=compiled)  # tokens are on the CPU when it returns
    return time.perf_counter() - started


def gpu(size: str, device: str, side: int, bandwidth_gb_s: float, compiled: bool) -> None:
    """Print codes per second, the share of the limit, and a ratio to transformers on a smaller image."""
    lm = make_large(size, device)
    for batch in (1, 16):
        took = drawing_seconds(lm, side, batch, compiled)
        per_pass = took / side**2
        limit = bytes_per_pass(lm.transformer.config, 2 * batch, side * (side + 1)) / bandwidth_gb_s / 1e9
        print(
            f"batch {batch}: {batch / per_pass:.0f} codes/s, {took:.1f} s, {1e3 * per_pass:.2f} ms a pass; memory allows "
            f"{1e3 * limit:.2f} ms, {limit / per_pass:.0%} of the limit",
            flush=True,
        )
    with tempfile.TemporaryDirectory() as folder:
        export_language_model(Path(folder) / "hub", lm, "transformers")
        small = min(side, SMALL_SIDE)
        ours = drawing_seconds(lm, small, 1, compiled)
        del lm  # the GPU has room for one of them
        _, theirs = by_transformers(Path(folder) / "hub", greedy=False, side=small, device=device)
    print(f"{small} x {small} codes: {theirs:.1f} s by transformers, {ours:.1f} s here, {theirs / ours:.2f} times")


# --- all ---


def alone(function: Callable[..., Any], options: dict[str, Any]) -> tuple[Any, float]:
    """A call in a process of its own -> its result, and the process's peak memory in MB."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (function, options))


def _measured(function: Callable[..., Any], options: dict[str, Any]) -> tuple[Any, float]:
    found = function(**options)
    return found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["decode", "tokenizer", "gpu"], help="one of them alone")
    parser.add_argument("--size", choices=list(TRANSFORMER_SIZES), default="8b")
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="cpu, with a small size, tries the command"
    )
    parser.add_argument("--side", type=int, default=90, help="codes on an edge of the picture")
    parser.add_argument("--bandwidth-gb-s", type=float, default=3350.0, help="of the GPU's memory, as its maker says")
    parser.add_argument("--compiled", action="store_true", help="compile the step")
    given = parser.parse_args()
    if given.part in (None, "decode"):
        decode()
    if given.part in (None, "tokenizer"):
        tokenizer()
    if given.part == "gpu" or (given.part is None and torch.cuda.is_available()):
        gpu(given.size, given.device, given.side, given.bandwidth_gb_s, given.compiled)
