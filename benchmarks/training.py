"""What training costs: memory of a step beside transformers' Emu3, and the plan of the sequences.

Usage: python benchmarks/training.py [memory | plan]

`memory`: forward and backward of 5,120 tokens at the published vocabulary of 184,622 ids, in float32, each in a process
of its own: the most memory it had, less what it had before the step. transformers gets the same weights' shapes, the tokens
and labels; ours the same tokens, by each way to work out the head's loss.

`plan`: ten million documents, 30 % of them images of about 64 x 64 codes in seven shapes and the others texts, into rows of
5,120 tokens; and 300,000 clips of up to 30,000 tokens with as many texts, into rows of 131,072.
"""

import argparse
import resource
import time
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch

from model.published import transformer_values
from model.transformer import Transformer, TransformerConfig
from pipeline.pack_sequences import plan_rows
from schemas.vocabulary import EMU3
from train.head_loss import HeadLossConfig
from train.losses import next_token_loss

LENGTH = 5120
KIB = 1024.0


def config_of(hidden_size: int) -> TransformerConfig:
    """Four layers of a width, and the published vocabulary."""
    return TransformerConfig(
        vocab_size=EMU3.size,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_layers=4,
        num_heads=hidden_size // 64,
        num_kv_heads=hidden_size // 128,
        head_dim=64,
        dropout=0.0,
        max_position_embeddings=LENGTH,
    )


def batch() -> torch.Tensor:
    """The tokens that both are given."""
    return torch.randint(0, EMU3.size, (1, LENGTH), generator=torch.Generator().manual_seed(0))


def step_of_transformers(hidden_size: int) -> float:
    """MiB that a step takes."""
    from transformers import Emu3ForCausalLM, Emu3TextConfig

    values = transformer_values(config_of(hidden_size), pad=EMU3.pad, bos=EMU3.bos, eos=EMU3.eos)
    network: Any = Emu3ForCausalLM(Emu3TextConfig.from_dict(values)).train()
    tokens = batch()
    before = rss_mib()
    network(tokens, labels=tokens, use_cache=False).loss.backward()
    return peak_mib() - before


def step_of_ours(hidden_size: int, how: HeadLossConfig) -> float:
    """MiB that a step takes."""
    model = Transformer(config_of(hidden_size)).train()
    tokens = batch()
    before = rss_mib()
    weights = torch.ones(tokens.shape)
    weights[:, -1] = 0.0
    hidden = model.hidden(tokens)
    terms = next_token_loss(hidden, model.lm_head.weight, tokens.roll(-1, 1), weights, EMU3.vision_offset, how)
    terms["loss"].mean.backward()
    return peak_mib() - before


def memory() -> None:
    """Print MiB of a step and how many times less than transformers'."""
    ways = {
        "here, chunked": HeadLossConfig(),
        "here, chunked by 64": HeadLossConfig(chunk_tokens=64),
        "here, torch's linear_cross_entropy": HeadLossConfig(kind="torch"),
        "here, all logits at once": HeadLossConfig(kind="whole"),
    }
    for hidden_size in (256, 512):
        theirs = alone(step_of_transformers, hidden_size)
        print(f"hidden size {hidden_size}: transformers, {theirs:.0f} MiB for a step")
        for name, how in ways.items():
            ours = alone(step_of_ours, hidden_size, how)
            print(f"  {name}: {ours:.0f} MiB, 1/{theirs / ours:.1f} of that")


def plan_of(num_pictures: int, num_texts: int, context_len: int) -> tuple[float, float, int, int]:
    """Seconds, how full the rows are, how many documents were split, and MiB that the plan took."""
    rng = np.random.default_rng(0)
    if context_len == LENGTH:
        sides = np.array([(64, 64), (56, 73), (73, 56), (52, 79), (79, 52), (48, 85), (85, 48)])
        height, width = sides[rng.integers(0, len(sides), num_pictures)].T
        pictures = height * (width + 1) + rng.integers(20, 120, num_pictures)
    else:
        pictures = rng.integers(1_000, 30_000, num_pictures)
    texts = np.clip(np.exp(rng.normal(6.2, 1.1, num_texts)), 8, 20_000).astype(np.int64)
    lengths = np.concatenate([pictures, texts]).astype(np.int64)
    may_split = np.arange(len(lengths)) >= num_pictures
    before = rss_mib()
    started = time.perf_counter()
    row_of, pieces, num_rows = plan_rows(lengths, may_split, context_len)
    seconds = time.perf_counter() - started
    assert (row_of[:num_pictures] >= 0).all(), "a picture was split"
    split = sum(piece.end - piece.start < lengths[piece.index] for piece in pieces if piece.start == 0)
    return seconds, float(lengths.sum()) / (num_rows * context_len), split, round(peak_mib() - before)


def plan() -> None:
    """Print what plans cost and how full their rows are."""
    for pictures, texts, context_len in ((3_000_000, 7_000_000, LENGTH), (300_000, 300_000, 131_072)):
        seconds, fill, split, mib = alone(plan_of, pictures, texts, context_len)
        print(f"{pictures + texts:,} documents into rows of {context_len:,}: {seconds:.0f} s, {mib} MiB,")
        print(f"  {fill:.2%} full, {split:,} texts split, no picture")


def rss_mib() -> float:
    """Memory of this process now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / KIB / KIB


def peak_mib() -> float:
    """The most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / KIB


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """A call in a process of its own, so that its peak is its own."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["memory", "plan"], help="one of them alone")
    what = parser.parse_args().what
    if what != "plan":
        memory()
    if what != "memory":
        plan()
