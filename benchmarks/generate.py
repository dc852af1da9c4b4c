"""How fast images are decoded, beside transformers' generate, and how fast pixels and codes turn into one another.

Usage: python benchmarks/generate.py [decode | tokenizer]

`decode`: a model of about 100 million parameters with the published vocabulary of 184,622 ids and random weights draws an
image of 32 x 32 codes, with guidance and under the grammar, in float32. transformers gets the same weights, prompts, guidance
and constraint, as its documentation says; greedy tokens must be the same. Then each trick is left out in turn.

`tokenizer`: a vision tokenizer of the published shape and codebook, a quarter as wide, with random weights, beside
transformers' on the same pixels and codes, at 256 x 256; and the peak memory of each at 512 x 512, in a process of its own.
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
from model.transformer import Transformer, TransformerConfig
from model.vision_tokenizer.config import VisionTokenizerConfig
from model.vision_tokenizer.tokenizer import VisionTokenizer
from model.weights import LanguageModel
from schemas.document import prompt_tokens
from schemas.vocabulary import EMU3

SIDE = 32
GRID = (1, SIDE, SIDE)
GUIDANCE = 3.0
ROUNDS = 3
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


def by_transformers(folder: Path, *, greedy: bool) -> tuple[list[int], float]:
    """Tokens after IMG, and seconds."""
    from transformers import Emu3ForCausalLM

    network: Any = Emu3ForCausalLM.from_pretrained(folder).eval()
    codec = TinyBpe.train([], 256)
    prompt, negative = (
        torch.tensor([prompt_tokens(text, "image", GRID, None, EMU3, codec).tolist()]) for text in (PROMPT, "")
    )
    vision_tokens = list(range(EMU3.vision_offset, EMU3.size))

    def allowed(_: int, tokens: Tensor) -> list[int]:
        offset = len(tokens) - int(torch.nonzero(tokens == EMU3.img)[0])
        if offset % (SIDE + 1) == 0:
            return [EMU3.eol]
        ends = {SIDE * (SIDE + 1) + 1: EMU3.eof, SIDE * (SIDE + 1) + 2: EMU3.eoi, SIDE * (SIDE + 1) + 3: EMU3.eos}
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
        max_new_tokens=SIDE * (SIDE + 1) + 3,
        **how,
    )
    return found[0, prompt.shape[1] :].tolist(), time.perf_counter() - started


def by_us(*, greedy: bool, lookahead: int = 0, whole_head: bool = False) -> tuple[list[int], float]:
    """Tokens after IMG, and seconds. `whole_head` scores all ids, as one that knows no grammar must."""
    lm = make_model()
    if whole_head:
        score = lm.transformer.logits
        lm.transformer.logits = lambda hidden, rows=None: score(hidden)[..., rows]  # type: ignore[method-assign]
    sampling = SamplingConfig(temperature=0.0 if greedy else 1.0, guidance=GUIDANCE)
    length = len(prompt_tokens(PROMPT, "image", GRID, None, EMU3, lm.text))
    started = time.perf_counter()
    (found,) = generate_vision(lm, [REQUEST], sampling, lookahead=lookahead)
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
            if tokens["here, sampled"] != tokens["here, sampled, 8 codes ahead"]:
                raise RuntimeError("looking ahead changed the tokens")
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
        for what, num_frames in (("image", 1), ("clip of 8 frames", 8)):
            ratios: list[tuple[float, float]] = []
            for _ in range(ROUNDS):
                theirs, _ = alone(tokenize, {"folder": hub, "side": 256, "num_frames": num_frames, "repeats": 3})
                ours, _ = alone(tokenize, {"folder": None, "side": 256, "num_frames": num_frames, "repeats": 3})
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


# --- both ---


def alone(function: Callable[..., Any], options: dict[str, Any]) -> tuple[Any, float]:
    """A call in a process of its own -> its result, and the process's peak memory in MB."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (function, options))


def _measured(function: Callable[..., Any], options: dict[str, Any]) -> tuple[Any, float]:
    found = function(**options)
    return found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["decode", "tokenizer"], help="one of the two alone")
    part = parser.parse_args().part
    for measure in (decode, tokenizer):
        if part in (None, measure.__name__):
            measure()
