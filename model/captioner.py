"""A small Qwen2.5-VL from scratch, in the layout that transformers and vLLM load: for captioners that a laptop can train.

Only sizes differ from the published model. All frames of a video may share one temporal patch, so that a motion is seen by
the first layer; weights start wider than transformers' 0.02, at which so narrow a network does not get going.
"""

import tempfile
from collections.abc import Callable, Sequence
from functools import wraps
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from schemas.recipe import Config

if TYPE_CHECKING:
    from torch import Tensor, nn

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
# Qwen's own format, without its default system prompt.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] in ('video', 'video_url') %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEAD_DIM = 32  # the smallest that vLLM's CPU attention has


class CaptionerSize(Config):
    """Sizes of a small captioner."""

    hidden_size: int = Field(default=64, ge=HEAD_DIM, multiple_of=HEAD_DIM)
    num_layers: int = Field(default=2, ge=1)
    vision_hidden_size: int = Field(default=64, ge=HEAD_DIM, multiple_of=HEAD_DIM)
    vision_depth: int = Field(default=2, ge=1)
    patch_size: int = Field(default=8, ge=2)
    temporal_patch_size: int = Field(default=12, ge=1)
    side_px: int = Field(default=64, ge=8)
    """Pictures are scaled to about this side squared."""
    num_text: int = Field(default=512, ge=256 + len(SPECIAL))
    max_position_embeddings: int = Field(default=2048, ge=64)
    initializer_range: float = Field(default=0.08, gt=0)


def write_captioner(folder: Path, size: CaptionerSize, texts: Sequence[str], seed: int) -> None:
    """Write a captioner with fresh weights, a byte-level BPE trained on `texts`, a processor and a chat template."""
    import torch
    from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

    processor = _processor(size, texts)
    ids = {text: processor.tokenizer.convert_tokens_to_ids(text) for text in SPECIAL}
    torch.manual_seed(seed)
    network = Qwen2_5_VLForConditionalGeneration(_config(size, len(processor.tokenizer), ids))
    network.generation_config = GenerationConfig(eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"])
    network.save_pretrained(folder)
    processor.save_pretrained(folder)


def load_captioner(folder: str) -> "nn.Module":
    """A folder or a hub name -> transformers' image-text-to-text model, in float32, with positions as vLLM counts them."""
    import torch
    from transformers import AutoModelForImageTextToText

    network: nn.Module = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    for module in network.modules():
        if hasattr(module, "get_rope_index"):
            module.get_rope_index = _counting_past_pictures(module.get_rope_index)  # type: ignore[assignment, arg-type]
    return network


def _counting_past_pictures(rope_index: Callable[..., Any]) -> Callable[..., Any]:
    """Positions (3, B, L) of time, height and width in which what follows a video comes after all of it.

    So Qwen's models were trained and so vLLM runs them. transformers 5 counts on from the height or width of the picture,
    so that the words after a video share positions with its later frames (huggingface/transformers#45381): a captioner
    trained that way is another one when it is served.
    """

    @wraps(rope_index)
    def counted(input_ids: "Tensor", **inputs: Any) -> "tuple[Tensor, Tensor]":
        positions, deltas = rope_index(input_ids, **inputs)
        mask = inputs.get("attention_mask")
        for row, kinds in enumerate(inputs["mm_token_type_ids"].tolist()):
            start, shift = 0, 0
            for kind, group in groupby(kinds):
                end = start + len(list(group))
                positions[:, row, start:end] += shift
                if kind and end < len(kinds):
                    last, following = int(positions[:, row, start:end].max()), int(positions[0, row, end])
                    shift = max(shift, last + 1 - following)
                start = end
            written = positions[:, row] if mask is None else positions[:, row, mask[row].bool()]
            deltas[row] = written.max() + 1 - written.shape[1]
        return positions, deltas

    return counted


def _processor(size: CaptionerSize, texts: Sequence[str]) -> Any:
    from transformers import (
        Qwen2_5_VLProcessor,
        Qwen2TokenizerFast,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        _train_bpe(texts, size.num_text).save(str(path))
        tokenizer = Qwen2TokenizerFast(
            tokenizer_file=str(path), eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None, bos_token=None
        )
    area = {"shortest_edge": size.side_px**2, "longest_edge": size.side_px**2}
    patches = {"patch_size": size.patch_size, "temporal_patch_size": size.temporal_patch_size, "merge_size": 2}
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**patches, size=area),
        tokenizer,
        Qwen2VLVideoProcessor(**patches, size=area, do_sample_frames=False),
        chat_template=CHAT_TEMPLATE,
    )


def _train_bpe(texts: Sequence[str], num_text: int) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_text - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return tokenizer


def _config(size: CaptionerSize, num_tokens: int, ids: dict[str, int]) -> Any:
    from transformers import Qwen2_5_VLConfig

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    text = {
        "vocab_size": -(-num_tokens // 64) * 64,
        "hidden_size": size.hidden_size,
        "intermediate_size": 2 * size.hidden_size,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.hidden_size // HEAD_DIM,
        "num_key_value_heads": size.hidden_size // HEAD_DIM,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": size.max_position_embeddings,
        "rope_parameters": rope,
        "tie_word_embeddings": True,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "bos_token_id": None,
        "initializer_range": size.initializer_range,
    }
    vision = {
        "depth": size.vision_depth,
        "hidden_size": size.vision_hidden_size,
        "intermediate_size": 2 * size.vision_hidden_size,
        "num_heads": size.vision_hidden_size // HEAD_DIM,
        "patch_size": size.patch_size,
        "spatial_merge_size": 2,
        "temporal_patch_size": size.temporal_patch_size,
        "fullatt_block_indexes": list(range(size.vision_depth)),
        "out_hidden_size": size.hidden_size,
        "initializer_range": size.initializer_range,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        initializer_range=size.initializer_range,
    )
