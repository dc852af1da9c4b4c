"""The published configs, as they stand on the hub, against the named sizes."""

from typing import Any

import pytest

from model.published import (
    transformer_config,
    transformer_values,
    vision_tokenizer_config,
    vision_tokenizer_values,
)
from model.transformer import TRANSFORMER_SIZES
from model.vision_tokenizer.config import VISION_TOKENIZER_SIZES
from schemas.errors import ConfigError

OFFICIAL_CHAT: dict[str, Any] = {
    "architectures": ["Emu3ForCausalLM"],
    "model_type": "Emu3",
    "attention_dropout": 0.1,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "image_area": 262144,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": 184622,
}
OFFICIAL_VISION: dict[str, Any] = {
    "architectures": ["Emu3VisionVQModel"],
    "model_type": "Emu3VisionVQ",
    "attn_resolutions": [3],
    "ch": 256,
    "ch_mult": [1, 2, 2, 4],
    "codebook_size": 32768,
    "double_z": False,
    "dropout": 0.0,
    "embed_dim": 4,
    "in_channels": 3,
    "num_res_blocks": 2,
    "out_channels": 3,
    "temporal_downsample_factor": 4,
    "torch_dtype": "float32",
    "z_channels": 4,
}


def test_official_configs_are_the_named_sizes() -> None:
    assert transformer_config(OFFICIAL_CHAT, "chat") == TRANSFORMER_SIZES["8b"]
    assert vision_tokenizer_config(OFFICIAL_VISION, "vision") == VISION_TOKENIZER_SIZES["emu3"]


def test_configs_of_transformers_are_the_named_sizes() -> None:
    emu3 = pytest.importorskip("transformers.models.emu3.configuration_emu3")
    both = emu3.Emu3Config(vocabulary_map={"<image>": 151646}).to_dict()
    published = TRANSFORMER_SIZES["8b"].model_copy(update={"max_position_embeddings": 9216})
    for values in (both, emu3.Emu3TextConfig().to_dict()):
        assert transformer_config(values, "text") == published
    for values in (both, emu3.Emu3VQVAEConfig().to_dict()):
        assert vision_tokenizer_config(values, "vision") == VISION_TOKENIZER_SIZES["emu3"]


@pytest.mark.parametrize("name", ["8b", "tiny"])
def test_own_language_configs_read_back(name: str) -> None:
    config = TRANSFORMER_SIZES[name]
    assert transformer_config(transformer_values(config, pad=0, bos=1, eos=2), "own") == config


@pytest.mark.parametrize("name", ["emu3", "tiny"])
def test_own_vision_configs_read_back(name: str) -> None:
    config = VISION_TOKENIZER_SIZES[name]
    assert vision_tokenizer_config(vision_tokenizer_values(config), "own") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"type": "linear"}}, "rotary"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rotary"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"model_type": "llama"}, "'llama'"),
        ({"num_hidden_layers": 0}, "num_layers"),
    ],
)
def test_variants_that_are_not_computed_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        transformer_config({**OFFICIAL_CHAT, **change}, "chat")


def test_a_missing_number_is_named() -> None:
    values = {key: value for key, value in OFFICIAL_CHAT.items() if key != "intermediate_size"}
    with pytest.raises(ConfigError, match="intermediate_size"):
        transformer_config(values, "chat")
    with pytest.raises(ConfigError, match="double_z"):
        vision_tokenizer_config({**OFFICIAL_VISION, "double_z": True}, "vision")
