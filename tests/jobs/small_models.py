"""A lake with a language model and a vision tokenizer of random weights, as if they had been trained there."""

import json
from pathlib import Path

import numpy as np

from model.vision_tokenizer.config import VISION_TOKENIZER_SIZES
from model.vision_tokenizer.tokenizer import VisionTokenizer
from model.weights import save_language_model, save_vision_tokenizer
from schemas.catalog import Lake
from schemas.checkpoints import CHECKPOINTS
from schemas.recipe import canonical_json
from schemas.sequences import SEQUENCE_SETS
from schemas.vision_tokens import TOKENIZERS, VISION_TOKENS
from schemas.vocabulary import Vocabulary
from tests.model.small_lm import random_lm

VOCABULARY = Vocabulary(num_text=256, num_codes=24)
FPS = 8.0


def make_lake(folder: Path) -> Lake:
    """The lake, with tokens of a clip `moving` of 4 x 3 x 3 and an image `still` of 2 x 3."""
    lake = Lake.open(folder / "lake")
    # 32: the least of vLLM's attention on CPU.
    lm = random_lm(VOCABULARY, num_heads=1, num_kv_heads=1, head_dim=32, max_position_embeddings=512)
    save_language_model(folder / "lm", lm.transformer, lm.vocabulary, lm.text)
    vision = VISION_TOKENIZER_SIZES["tiny"].model_copy(update={"codebook_size": VOCABULARY.num_codes})
    save_vision_tokenizer(folder / "vision", VisionTokenizer(vision).eval())
    training = {"recipe": "{}", "data_id": "seqset", "data_sha256": "x", "step": 1, "losses": "[]"}
    rows = [
        {"checkpoint_id": name, "objective": objective, "training_id": name, "uri": str(folder / path), **training}
        for name, objective, path in (("seer", "vision_tokenizer", "vision"), ("talker", "pretrain", "lm"))
    ]
    lake.append(CHECKPOINTS, rows, "r")
    where = {"uri": str(folder / "vision")}
    lake.append(TOKENIZERS, [{"tokenizer_id": "tok", "checkpoint_id": "seer", "preparation": "{}", **where}], "r")
    text = canonical_json({"kind": "tiny_bpe", "serialised": json.loads(lm.text.to_json())})
    ids = {"vocabulary": VOCABULARY.to_json(), "text_tokenizer": text}
    packed = {"tokenizer_id": "tok", "recipe": "{}", **ids, "context_len": 512}
    counts = {"num_sequences": 0, "num_tokens": 0, "content_sha256": "x"}
    names = {"name": "set", "seqset_id": "seqset", "curated_ids": []}
    lake.append(SEQUENCE_SETS, [{**names, **packed, **counts}], "r")
    codes = np.random.default_rng(0).integers(0, 24, (4, 3, 3)).astype("<u2")
    for clip, kind, grid in (("moving", "video", (4, 3, 3)), ("still", "image", (1, 2, 3))):
        t, h, w = grid
        stored = codes.ravel()[: t * h * w].tobytes()
        row = {"clip_id": clip, "tokenizer_id": "tok", "kind": kind, "t": t, "h": h, "w": w, "crc32": 0}
        lake.append(VISION_TOKENS, [{**row, "fps": FPS if kind == "video" else None, "codes": stored}], "r")
    return lake
