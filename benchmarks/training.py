"""What training costs beside transformers' Emu3: memory and time of a step; the plan of the sequences, and their loader.

Usage: python benchmarks/training.py [memory | plan | loader | throughput | stalls | gpu]

`memory`: forward and backward of 5,120 tokens at the published vocabulary of 184,622 ids, in float32, each in a process
of its own: the most memory it had, less what it had before the step. transformers gets the same weights' shapes, the tokens
and labels; ours the same tokens, by each way to work out the head's loss.

`plan`: ten million documents, 30 % of them images of about 64 x 64 codes in seven shapes and the others texts, into rows of
5,120 tokens; and 300,000 clips of up to 30,000 tokens with as many texts, into rows of 131,072.

`loader`: batches of eight rows of 5,120 tokens, drawn at random from a file, laid out with labels, weights and positions.

`throughput`: steps of a model of 200 million weights, vocabulary 184,622 and hidden size 512, in float32: our loop on packed
rows, transformers' Trainer on the same rows (without their documents apart), and on the documents as batches padded to the
longest. In turns, each in a process of its own; tokens are those of documents, padding is none. Optimizer, clipping and
logging included.

`stalls`: a training of 100 million weights under Ray, a checkpoint of 1.2 GB each 100 steps: the share of time in which steps
wait for it, and how much slower steps are while it is written.

`gpu`, on a CUDA GPU of 80 GB and only by name: four layers of the published width over the published vocabulary, in bfloat16
with float32 weights and AdamW, rows of 5,120 and of 32,768 tokens: tokens a second, MFU (forward and backward without
recomputation, attention by half of its square, of the 989 dense bfloat16 TFLOP/s of an H100) and peak memory; here, compiled,
and by transformers under autocast with its own loss.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from model.published import transformer_values
from model.text_tokenizer import TinyBpe
from model.transformer import TRANSFORMER_SIZES, Transformer, TransformerConfig
from pipeline.pack_sequences import PackedDocument, pack, plan_rows
from schemas.document import TokenWeights
from schemas.vocabulary import EMU3
from train.batches import SequenceData, SequenceFile, batch_indices, token_batch, write_sequence_file
from train.head_loss import HeadLossConfig
from train.launch import training_identity
from train.loop import return_freed_memory, run_loop
from train.losses import next_token_loss
from train.meter import transformer_flops
from train.pretrain import PretrainConfig, PretrainObjective, pretrain

LENGTH = 5120
ROW, STEPS, ROUNDS = 2048, 5, 3
KIB = 1024.0
PEAK_FLOPS = 989e12  # of an H100, dense, in bfloat16


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
    """MiB that a step takes, in a process that is set up as the loop does it."""
    return_freed_memory()
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


def documents(seed: int, num_rows: int) -> list[list[np.ndarray]]:
    """Rows of images of 24 x 24 codes and of texts, packed."""
    rng = np.random.default_rng(seed)
    made = []
    for index in range(8 * num_rows):
        length = 640 if index % 2 else int(np.clip(rng.lognormal(5.3, 0.7), 20, 900))
        made.append(
            PackedDocument("image" if index % 2 else "text", f"{index:05d}", rng.integers(0, EMU3.num_text, length))
        )
    rows = pack(made, ROW, seed, split_texts=True)
    return [[document.tokens.astype(np.uint32) for document in row.documents] for row in rows[:num_rows]]


def sequences(folder: Path, rows: list[list[np.ndarray]], context_len: int) -> SequenceData:
    """Rows of documents as what a training reads."""
    segments = []
    for row in rows:
        ends = np.cumsum([len(tokens) for tokens in row]).tolist()
        segments.append(
            [
                {"kind": "text", "item_id": f"{end}", "offset": end - len(tokens), "length": len(tokens)}
                for end, tokens in zip(ends, row, strict=True)
            ]
        )
    path = folder / "rows.arrow"
    write_sequence_file(path, [np.concatenate(row) for row in rows], segments)
    return SequenceData(path, "bench", "bench", EMU3, TinyBpe.train(["a"], 256), context_len)


def loader() -> None:
    """Print how many tokens a second are ready for the network."""
    rng = np.random.default_rng(0)
    rows = [[rng.integers(0, EMU3.size, LENGTH // 4).astype(np.uint32) for _ in range(4)] for _ in range(512)]
    with tempfile.TemporaryDirectory() as name:
        data = sequences(Path(name), rows, LENGTH)
        file = SequenceFile(data.path)
        best = 0.0
        for _ in range(5):
            began = time.perf_counter()
            for step in range(64):
                token_batch(file, batch_indices(0, step, 8, len(rows)), data, TokenWeights())
            best = max(best, 64 * 8 * LENGTH / (time.perf_counter() - began))
    print(f"{best / 1e6:.0f} million tokens a second, best of five rounds of 64 batches")


def speed_of_ours(steps: int) -> float:
    """Tokens of documents a second, of our loop."""
    with tempfile.TemporaryDirectory() as name:
        data = sequences(Path(name), documents(0, steps), ROW)
        model = config_of(512).model_dump(exclude={"vocab_size", "max_position_embeddings"})
        execution = {"log_every": 1, "num_threads": 2, "loggers": ()}
        config = PretrainConfig.model_validate(
            {"size": "tiny", "model": model, "steps": steps, "batch_size": 1, "execution": execution}
        )
        objective = PretrainObjective(config, data)
        run_loop(objective, training_identity("bench", config, "bench", "bench"), Path(name) / "run")
        lines = [json.loads(line) for line in (Path(name) / "run" / "progress.jsonl").read_text().splitlines()]
    return median([line["speed"]["tokens_per_s"] for line in lines[1:]])


def speed_of_transformers(steps: int, is_packed: bool) -> float:
    """Tokens of documents a second, of transformers' Trainer, on packed rows or padded documents."""
    from transformers import Emu3ForCausalLM, Emu3TextConfig, Trainer, TrainerCallback, TrainingArguments

    rows = documents(0, steps)
    batches = [[np.concatenate(row)] if is_packed else row for row in rows]
    flat = [tokens for batch in batches for tokens in batch]
    size = max(len(batch) for batch in batches)
    counts = [sum(len(tokens) for tokens in flat[start : start + size]) for start in range(0, len(flat), size)]
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(-time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times[-1] += time.perf_counter()

    def collate(examples: list[Any]) -> dict[str, torch.Tensor]:
        longest = max(len(one) for one in examples)
        ids = torch.full((len(examples), longest), EMU3.pad)
        for row, one in enumerate(examples):
            ids[row, : len(one)] = torch.from_numpy(one.astype(np.int64))
        mask = torch.arange(longest) < torch.tensor([len(one) for one in examples])[:, None]
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.where(mask, -100)}

    values = transformer_values(config_of(512), pad=EMU3.pad, bos=EMU3.bos, eos=EMU3.eos)
    network: Any = Emu3ForCausalLM(Emu3TextConfig.from_dict({**values, "use_cache": False}))
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as name:
        options = TrainingArguments(
            name, max_steps=len(counts), per_device_train_batch_size=size, use_cpu=True, report_to=[], save_strategy="no",
            logging_strategy="no", learning_rate=5e-5, max_grad_norm=5.0, optim="adamw_torch_fused", disable_tqdm=True,
            remove_unused_columns=False,
        )  # fmt: skip

        class InOrder(Trainer):
            def _get_train_sampler(self, *_: Any) -> Any:
                return torch.utils.data.SequentialSampler(flat)

        InOrder(network, options, data_collator=collate, train_dataset=flat, callbacks=[Clock()]).train()  # type: ignore[arg-type]
    return median([count / taken for count, taken in zip(counts[1:], times[1:], strict=True)])


def throughput() -> None:
    """Print tokens a second, and ratios of the same round."""
    ways: dict[str, tuple[Callable[..., float], tuple[Any, ...]]] = {
        "here, packed": (speed_of_ours, (STEPS,)),
        "transformers, packed": (speed_of_transformers, (STEPS, True)),
        "transformers, padded": (speed_of_transformers, (STEPS, False)),
    }
    rounds = [{name: alone(function, *given) for name, (function, given) in ways.items()} for _ in range(ROUNDS)]
    for name in ways:
        print(f"{name}: {median([found[name] for found in rounds]):.0f} tokens/s")
    for name in [*ways][1:]:
        ratios = sorted(found["here, packed"] / found[name] for found in rounds)
        print(f"here beside {name}: {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f} in {ROUNDS} rounds)")


def stalls() -> None:
    """Print what checkpoints cost."""
    waited, slower = alone(run_with_checkpoints, 250, 100)
    print(
        f"waiting for checkpoints: {waited:.2%} of the time; the 20 steps beside their writing took {slower:.2f} times as long"
    )


def run_with_checkpoints(steps: int, every: int) -> tuple[float, float]:
    """The share of time that steps waited for checkpoints, and the time of a step beside their writing by that of others."""
    with tempfile.TemporaryDirectory() as name:
        data = sequences(Path(name), [[row[0][:128]] for row in documents(0, 40)], 128)
        model = config_of(256).model_dump(exclude={"vocab_size", "max_position_embeddings"})
        execution = {"log_every": 1, "num_threads": 2, "loggers": (), "checkpoint_every": every}
        values = {"size": "tiny", "model": model, "steps": steps, "batch_size": 1, "execution": execution}
        pretrain(PretrainConfig.model_validate(values), data, Path(name) / "run")
        lines = [json.loads(line) for line in (Path(name) / "run" / "progress.jsonl").read_text().splitlines()]
    ends = np.array([line["seconds"] for line in lines])
    took = dict(zip([line["step"] for line in lines[1:]], np.diff(ends), strict=True))
    waits = {line["step"]: line["speed"].get("checkpoint_wait", 0.0) * took.get(line["step"], 0.0) for line in lines}
    trained = {step: seconds - waits[step] for step, seconds in took.items()}
    beside = [seconds for step, seconds in trained.items() if 0 < step % every <= 20 and step > every]
    others = [seconds for step, seconds in trained.items() if step % every > 20 and step > every]
    return sum(waits.values()) / sum(took.values()), median(beside) / median(others)


def gpu() -> None:
    """Print tokens a second, MFU and GiB of a slice of the published model."""
    if not torch.cuda.is_available():
        raise SystemExit("found no CUDA GPU here")
    for length in (LENGTH, 32_768):
        ways: dict[str, tuple[Callable[..., tuple[float, float]], tuple[Any, ...]]] = {
            "here": (slice_of_ours, (length, "off")),
            "here, float8": (slice_of_ours, (length, "tensorwise")),
            "transformers": (slice_of_transformers, (length,)),
        }
        for name, (measure, given) in ways.items():
            try:
                tokens_per_s, gib = alone(measure, *given)
            except torch.OutOfMemoryError as error:
                print(f"{length} tokens, {name}: {str(error).splitlines()[0]}")
                continue
            flops = transformer_flops(slice_config(), np.array([length])) / length
            print(
                f"{length} tokens, {name}: {tokens_per_s:,.0f} tokens/s, MFU {tokens_per_s * flops / PEAK_FLOPS:.1%}, "
                f"{gib:.1f} GiB at most"
            )


def slice_config() -> TransformerConfig:
    """Four layers of the published model."""
    return TRANSFORMER_SIZES["8b"].model_copy(
        update={"num_layers": 4, "dropout": 0.0, "max_position_embeddings": 32_768}
    )


def slice_of_ours(length: int, float8: str) -> tuple[float, float]:
    """Tokens a second and the most GiB, of our loop."""
    with tempfile.TemporaryDirectory() as name:
        rng = np.random.default_rng(0)
        rows = [[rng.integers(0, EMU3.size, length).astype(np.uint32)] for _ in range(8)]
        model = slice_config().model_dump(exclude={"vocab_size"})
        recompute = "nothing" if length == LENGTH else "full"
        layout = {"compute": "bfloat16", "float8": float8, "recompute": recompute, "compile": True}
        execution = {
            "log_every": 1, "use_gpu": True, "loggers": (), "layout": layout, "head_loss": {"chunk_tokens": 1024}
        }  # fmt: skip
        values = {"size": "8b", "model": model, "steps": 12, "batch_size": 1, "execution": execution}
        data, config = sequences(Path(name), rows, length), PretrainConfig.model_validate(values)
        dist.init_process_group(init_method=f"file://{name}/meet", rank=0, world_size=1)
        identity = training_identity("bench", config, "bench", "bench")
        run_loop(PretrainObjective(config, data), identity, Path(name) / "run")
        dist.destroy_process_group()
        lines = [json.loads(line) for line in (Path(name) / "run" / "progress.jsonl").read_text().splitlines()]
    return median([line["speed"]["tokens_per_s"] for line in lines[4:]]), lines[-1]["speed"]["memory_mib"] / KIB


def slice_of_transformers(length: int) -> tuple[float, float]:
    """Tokens a second and the most GiB, of transformers' network with its own loss."""
    from transformers import Emu3ForCausalLM, Emu3TextConfig

    values = transformer_values(slice_config(), pad=EMU3.pad, bos=EMU3.bos, eos=EMU3.eos)
    with torch.device("cuda"):
        network: Any = Emu3ForCausalLM(Emu3TextConfig.from_dict({**values, "use_cache": False})).train()
    if length != LENGTH:
        network.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-5, fused=True)
    tokens, times = torch.randint(0, EMU3.size, (1, length), device="cuda"), []
    for _ in range(12):
        began = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            network(tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return length / median(times[4:]), torch.cuda.max_memory_allocated() / 2**30


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
    parts = {"memory": memory, "plan": plan, "loader": loader, "throughput": throughput, "stalls": stalls}
    parser.add_argument("what", nargs="?", choices=[*parts, "gpu"], help="one of them alone")
    what = parser.parse_args().what
    for name, measure in {**parts, "gpu": gpu}.items():
        if what == name or (what is None and name in parts):
            measure()
