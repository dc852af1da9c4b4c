"""Trainings small enough to run in seconds: random documents, random frames, and networks of a few thousand weights."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from model.text_tokenizer import TinyBpe
from model.transformer import Transformer
from model.weights import save_language_model
from schemas.document import TextDocument, VisionBlock, VisionDocument, write_document
from schemas.vocabulary import Vocabulary
from train.batches import FrameData, SequenceData, write_frame_file, write_sequence_file
from train.language import Start
from train.mesh import LayoutConfig, Mesh
from train.preference import DpoConfig
from train.pretrain import PretrainConfig, PretrainObjective
from train.vision_tokenizer import TokenizerTrainingConfig

VOCABULARY = Vocabulary(num_text=256, num_codes=16)
CONTEXT_LEN = 64
ALONE = Mesh(LayoutConfig(), torch.device("cpu"))
TINY_MODEL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 16,
}
TINY_TOKENIZER: dict[str, Any] = {"codebook_size": 8, "ch_mult": [1, 1], "attn_resolutions": [1]}
DISCRIMINATOR: dict[str, Any] = {"channels": 4, "num_layers": 1, "norm_groups": 2}


def text_tokenizer() -> TinyBpe:
    return TinyBpe.train(["a red circle"], 256)


def documents(seed: int, count: int) -> list[npt.NDArray[np.uint32]]:
    rng = np.random.default_rng(seed)
    text = text_tokenizer()
    made = []
    for index in range(count):
        codes = rng.integers(0, VOCABULARY.num_codes, (1, 2, 3))
        document = (
            TextDocument("ab" * (1 + index % 5))
            if index % 3 == 0
            else VisionDocument(VisionBlock("image", codes), "red")
        )
        made.append(write_document(document, VOCABULARY, text))
    return made


def sequence_data(folder: Path, num_rows: int = 12, seed: int = 0, items: str = "") -> SequenceData:
    """Rows of two documents each; `items` begins their ids."""
    rng = np.random.default_rng([seed, 1])
    pool = documents(seed, 24)
    rows, segments = [], []
    for _ in range(num_rows):
        picked = [pool[index] for index in rng.permutation(len(pool))[:2]]
        ends = np.cumsum([len(document) for document in picked])
        rows.append(np.concatenate(picked))
        segments.append(
            [
                {
                    "kind": "image",
                    "item_id": f"{items}{place}",
                    "offset": int(end) - len(document),
                    "length": len(document),
                }
                for place, (end, document) in enumerate(zip(ends, picked, strict=True))
            ]
        )
    path = folder / f"sequences-{seed}.arrow"
    write_sequence_file(path, rows, segments)
    return SequenceData(path, f"set-{seed}", f"sha-{seed}", VOCABULARY, text_tokenizer(), CONTEXT_LEN)


def picture(caption: str, codes: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.uint32]:
    """A caption and codes (h, w) as a document."""
    block = VisionBlock("image", np.asarray(codes, np.int64)[None])
    return write_document(VisionDocument(block, caption), VOCABULARY, text_tokenizer())


def write_pairs(folder: Path, pairs: list[tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]]) -> SequenceData:
    """Chosen and rejected documents -> what a preference training reads; what comes after IMG was drawn."""
    segments, answers = [], []
    for pair in pairs:
        ends = np.cumsum([len(document) for document in pair]).tolist()
        starts = [0, ends[0]]
        drawn = [int(np.flatnonzero(document == VOCABULARY.img)[0]) + 1 for document in pair]
        lengths = [len(document) for document in pair]
        segments.append(
            [{"kind": "image", "item_id": "x", "offset": o, "length": n} for o, n in zip(starts, lengths, strict=True)]
        )
        answers.append([{"offset": o + d, "length": n - d} for o, d, n in zip(starts, drawn, lengths, strict=True)])
    path = folder / "pairs.arrow"
    write_sequence_file(path, [np.concatenate(pair) for pair in pairs], segments, answers)
    longest = max((sum(map(len, pair)) for pair in pairs), default=1)
    return SequenceData(path, "pairs", "sha-pairs", VOCABULARY, text_tokenizer(), longest)


def pair_data(folder: Path, num_pairs: int = 10) -> SequenceData:
    """Pairs of random pictures, of other sizes and captions from pair to pair."""
    rng = np.random.default_rng(5)
    pairs = []
    for index in range(num_pairs):
        caption, grid = "red" * (index % 3), (1 + index % 2, 2 + index % 3)
        codes = rng.integers(0, VOCABULARY.num_codes, (2, *grid))
        pairs.append((picture(caption, codes[0]), picture(caption, codes[1])))
    return write_pairs(folder, pairs)


def start_weights(folder: Path, **model: Any) -> Start:
    """Random weights as a folder, with dropout, as of a training before."""
    data = SequenceData(folder, "none", "none", VOCABULARY, text_tokenizer(), CONTEXT_LEN)
    torch.manual_seed(4)
    transformer = PretrainObjective(pretrain_config(model={"dropout": 0.1, **model}), data).build_model(ALONE)
    with torch.no_grad():
        for tensor in transformer.parameters():
            if tensor.ndim > 1:
                tensor.normal_(std=0.2)  # far from uniform
    assert isinstance(transformer, Transformer)
    return Start(folder / "start", save_language_model(folder / "start", transformer, VOCABULARY, data.text))


def dpo_config(**changes: Any) -> DpoConfig:
    execution = {"num_threads": 1, "checkpoint_every": 3, "log_every": 2, **changes.pop("execution", {})}
    values = {"steps": 8, "batch_size": 4, "optim": {"learning_rate": 0.002, "warmup_steps": 2}, **changes}
    return DpoConfig.model_validate({"execution": execution, **values})


def frame_data(folder: Path, num_chunks: int = 6, size_px: int = 12) -> FrameData:
    rng = np.random.default_rng(0)
    chunks = rng.integers(0, 256, (num_chunks, 4, size_px, size_px, 3), np.uint8)
    path = folder / "frames.npy"
    write_frame_file(path, chunks, num_chunks, (size_px, size_px))
    return FrameData(path, "frames", "sha-frames")


def pretrain_config(**changes: Any) -> PretrainConfig:
    execution = {"num_threads": 1, "checkpoint_every": 3, "log_every": 2, **changes.pop("execution", {})}
    model = {**TINY_MODEL, **changes.pop("model", {})}
    values = {"steps": 8, "batch_size": 4, "optim": {"learning_rate": 0.01, "warmup_steps": 2}, **changes}
    return PretrainConfig.model_validate({"size": "tiny", "model": model, "execution": execution, **values})


def tokenizer_config(**changes: Any) -> TokenizerTrainingConfig:
    execution = {"num_threads": 1, "checkpoint_every": 3, "log_every": 2, **changes.pop("execution", {})}
    # Biases of attention keys and before norms have no gradient but rounding, which Adam blows up if eps is small.
    optim = {"learning_rate": 0.001, "betas": (0.9, 0.95), "weight_decay": 0.0, "eps": 1e-4}
    values = {"steps": 8, "batch_size": 4, "optim": optim, "reset_every": 2, "latent_batch": 4, "crop_px": 8, **changes}
    return TokenizerTrainingConfig.model_validate(
        {"size": "tiny", "model": TINY_TOKENIZER, "execution": execution, **values}
    )
