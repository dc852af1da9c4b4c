"""What a training step costs, beside transformers' Emu3.

Usage: python benchmarks/training.py [memory]

`memory`: forward and backward of 5,120 tokens at the published vocabulary of 184,622 ids, in float32, each in a process
of its own: the most memory it had, less what it had before the step. transformers gets the same weights' shapes, the tokens
and labels; ours the same tokens, by each way to work out the head's loss.
"""

import argparse
import resource
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import torch

from model.transformer import Transformer, TransformerConfig
from schemas.vocabulary import EMU3
from train.head_loss import HeadLossConfig
from train.losses import next_token_loss

ROWS, LENGTH = 1, 5120
MIB = 1024.0


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


def tokens_of(vocab_size: int) -> torch.Tensor:
    """The batch that both are given."""
    return torch.randint(0, vocab_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


def step_of_transformers(hidden_size: int) -> tuple[float, float]:
    """The loss, and MiB that a step takes."""
    from transformers import Emu3ForCausalLM, Emu3TextConfig

    config = config_of(hidden_size)
    network: Any = Emu3ForCausalLM(
        Emu3TextConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            max_position_embeddings=LENGTH,
            attention_dropout=0.0,
            use_cache=False,
        )
    ).train()
    tokens = tokens_of(config.vocab_size)
    before = rss_mib()
    loss = network(tokens, labels=tokens).loss
    loss.backward()
    return float(loss.detach()), peak_mib() - before


def step_of_ours(hidden_size: int, how: HeadLossConfig) -> tuple[float, float]:
    """The loss, and MiB that a step takes."""
    config = config_of(hidden_size)
    model = Transformer(config).train()
    tokens = tokens_of(config.vocab_size)
    before = rss_mib()
    weights = torch.ones(ROWS, LENGTH)
    weights[:, -1] = 0.0
    hidden = model.hidden(tokens)
    terms = next_token_loss(hidden, model.lm_head.weight, tokens.roll(-1, 1), weights, EMU3.vision_offset, how)
    terms["loss"].mean.backward()
    return float(terms["loss"].mean.detach()), peak_mib() - before


def memory() -> None:
    """Print MiB of a step and how many times less than transformers'."""
    ways = {
        "here, chunked": HeadLossConfig(),
        "here, chunked by 64": HeadLossConfig(chunk_tokens=64),
        "here, torch's linear_cross_entropy": HeadLossConfig(kind="torch"),
        "here, all logits at once": HeadLossConfig(kind="whole"),
    }
    for hidden_size in (256, 512):
        _, theirs = alone(step_of_transformers, hidden_size)
        print(f"hidden size {hidden_size}: transformers, {theirs:.0f} MiB for a step")
        for name, how in ways.items():
            _, ours = alone(step_of_ours, hidden_size, how)
            print(f"  {name}: {ours:.0f} MiB, 1/{theirs / ours:.1f} of that")


def rss_mib() -> float:
    """Memory of this process now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / MIB / MIB


def peak_mib() -> float:
    """The most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """A call in a process of its own, so that its peak is its own."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="memory", choices=["memory"])
    parser.parse_args()
    memory()
