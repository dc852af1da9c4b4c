"""The forms that published checkpoints come in, and ours: config keys and tensor names, there and back.

Two forms exist. The official one names vision tokenizer layers as this code does. The transformers one renames them,
turns 1x1 attention convolutions into linear layers, and may hold both networks in one composite file under prefixes.
The language model's tensors have the same names in both. Our own folders are the official form for the vision tokenizer
and the transformers form for the language model, so either loads there without conversion.
"""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from model.transformer import INIT_STD, TransformerConfig
from model.vision_tokenizer.config import VisionTokenizerConfig
from schemas.errors import ConfigError
from schemas.vocabulary import Vocabulary

Values = Mapping[str, Any]

LANGUAGE_MODEL_TYPES = ("emu3_text_model", "Emu3")  # transformers, official; ours is written as the first
VISION_TOKENIZER_TYPES = ("Emu3VisionVQ", "emu3_vqgan")  # official, transformers; ours is written as the first
COMPOSITE_TYPE = "emu3"  # transformers: both networks in one folder
LLAMA_TYPE = "llama"
PLACEHOLDER_FOR = "<|extra_0|>"  # whose id transformers gives to its placeholder for images

# Ours -> the key in both published forms.
_TRANSFORMER_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "rms_norm_eps": "rms_norm_eps",
    "dropout": "attention_dropout",
    "max_position_embeddings": "max_position_embeddings",
}
# Official (and ours) -> transformers, where they differ.
_VISION_KEYS = {
    "z_channels": "latent_channels",
    "double_z": "double_latent",
    "ch": "base_channels",
    "ch_mult": "channel_multiplier",
}
_ATTENTION_NAMES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "proj_out": "out_proj"}
_BLOCK_NAMES = {"down": "down_block.down", "up": "up_block.up"}


def transformer_config(values: Values, source: str) -> TransformerConfig:
    """A published or own `config.json` -> the language model's config. `source` names it in errors.

    Raises: ConfigError if it describes something else, or a variant that this code does not compute.
    """
    if values.get("model_type") == COMPOSITE_TYPE:
        values = {"model_type": LANGUAGE_MODEL_TYPES[0], **dict(values.get("text_config") or {})}
    _check_type(values, LANGUAGE_MODEL_TYPES, source)
    fixed = {"hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False}
    for key, expected in fixed.items():
        if values.get(key, expected) != expected:
            raise ConfigError(f"{source} has {key} {values[key]!r}, expected {expected!r}")
    rope = values.get("rope_parameters") or {}
    if values.get("rope_scaling") or rope.get("rope_type", "default") != "default":
        raise ConfigError(f"{source} scales its rotary positions, expected none")
    ours = {name: values[key] for name, key in _TRANSFORMER_KEYS.items() if key in values}
    theta = rope.get("rope_theta", values.get("rope_theta"))
    if theta is not None:
        ours["rope_theta"] = theta
    if "head_dim" in values:
        ours["head_dim"] = values["head_dim"]
    elif "hidden_size" in ours and "num_heads" in ours:
        ours["head_dim"] = ours["hidden_size"] // ours["num_heads"]
    try:
        return TransformerConfig.model_validate(ours)
    except ValidationError as error:
        raise ConfigError(f"the checkpoint config {source} is wrong: {error}") from error


def transformer_values(config: TransformerConfig, *, pad: int, bos: int, eos: int) -> dict[str, Any]:
    """A language model's config -> `config.json` in the transformers form."""
    return {
        "architectures": ["Emu3ForCausalLM"],
        "model_type": LANGUAGE_MODEL_TYPES[0],
        **{key: getattr(config, name) for name, key in _TRANSFORMER_KEYS.items()},
        "head_dim": config.head_dim,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "pad_token_id": pad,
        "bos_token_id": bos,
        "eos_token_id": eos,
    }


def official_transformer_values(config: TransformerConfig, vocabulary: Vocabulary) -> dict[str, Any]:
    """A language model's config -> `config.json` in the official form."""
    ids = {name: getattr(vocabulary, name) for name in ("pad", "bos", "eos", "img", "boi", "eoi", "eol", "eof")}
    return {
        "architectures": ["Emu3ForCausalLM"],
        "model_type": LANGUAGE_MODEL_TYPES[1],
        **{key: getattr(config, name) for name, key in _TRANSFORMER_KEYS.items()},
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "hidden_act": "silu",
        "initializer_range": INIT_STD,
        "tie_word_embeddings": False,
        **{f"{name}_token_id": value for name, value in ids.items()},
    }


def llama_values(config: TransformerConfig, *, pad: int, bos: int, eos: int) -> dict[str, Any]:
    """A language model's config -> `config.json` of the Llama that computes the same, dropout in training aside."""
    values = transformer_values(config, pad=pad, bos=bos, eos=eos)
    del values["attention_dropout"]
    return values | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": LLAMA_TYPE,
        "rope_theta": config.rope_theta,
        "attention_bias": False,
        "mlp_bias": False,
    }


def composite_values(
    language: TransformerConfig, vision: VisionTokenizerConfig, vocabulary: Vocabulary
) -> dict[str, Any]:
    """Both configs -> `config.json` of transformers' composite. Its placeholder for images takes the id of `<|extra_0|>`."""
    strings = vocabulary.special_strings()
    tokens = {string: token for token, string in strings.items() if string != PLACEHOLDER_FOR}
    placeholder = next(token for token, string in strings.items() if string == PLACEHOLDER_FOR)
    codes = {vocabulary.vision_string(code): vocabulary.vision_offset + code for code in range(vocabulary.num_codes)}
    return {
        "architectures": ["Emu3ForConditionalGeneration"],
        "model_type": COMPOSITE_TYPE,
        "text_config": transformer_values(language, pad=vocabulary.pad, bos=vocabulary.bos, eos=vocabulary.eos),
        "vq_config": transformers_vision_values(vision),
        "vocabulary_map": {"<image>": placeholder, **tokens, **codes},
        "image_token_id": placeholder,
    }


def vision_tokenizer_config(values: Values, source: str) -> VisionTokenizerConfig:
    """A published or own `config.json` -> the vision tokenizer's config. `source` names it in errors.

    Raises: ConfigError if it describes something else.
    """
    if values.get("model_type") == COMPOSITE_TYPE:
        values = {"model_type": VISION_TOKENIZER_TYPES[1], **dict(values.get("vq_config") or {})}
    _check_type(values, VISION_TOKENIZER_TYPES, source)
    keys = {name: name for name in VisionTokenizerConfig.model_fields}
    if values["model_type"] != VISION_TOKENIZER_TYPES[0]:
        keys |= _VISION_KEYS
    try:
        return VisionTokenizerConfig.model_validate({name: values[key] for name, key in keys.items() if key in values})
    except ValidationError as error:
        raise ConfigError(f"the checkpoint config {source} is wrong: {error}") from error


def vision_tokenizer_values(config: VisionTokenizerConfig) -> dict[str, Any]:
    """A vision tokenizer's config -> `config.json` in the official form."""
    return {
        "architectures": ["Emu3VisionVQModel"],
        "model_type": VISION_TOKENIZER_TYPES[0],
        **config.model_dump(mode="json"),
    }


def transformers_vision_values(config: VisionTokenizerConfig) -> dict[str, Any]:
    """A vision tokenizer's config -> `config.json` in the transformers form.

    Raises: ConfigError if transformers has no such architecture.
    """
    width = config.ch * config.ch_mult[-1]
    if config.norm_groups != 32 or any(config.ch * config.ch_mult[level] != width for level in config.attn_resolutions):
        raise ConfigError(
            f"transformers has no vision tokenizer with {config.norm_groups} norm groups and attention at levels "
            f"{config.attn_resolutions} of widths {config.ch_mult} x {config.ch}, expected 32 groups and one width"
        )
    values = config.model_dump(mode="json", exclude={"norm_groups", "dropout"})
    return {
        "architectures": ["Emu3VQVAE"],
        "model_type": VISION_TOKENIZER_TYPES[1],
        **{_VISION_KEYS.get(name, name): value for name, value in values.items()},
        "hidden_size": width,
        "num_attention_heads": 1,
        "attention_dropout": 0.0,
    }


def composite_tensors(language: Mapping[str, Tensor], vision: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of both networks of ours -> those of transformers' composite."""
    found = {re.sub(r"^model\.", "model.text_model.", name): tensor for name, tensor in language.items()}
    renamed = transformers_vision_tensors(vision)
    return found | {f"model.vqmodel.{name}": tensor for name, tensor in renamed.items()}


def transformer_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a published language model, alone or composite -> the same under our names."""
    found = {}
    for name, tensor in tensors.items():
        if name.startswith(("model.vqmodel.", "vqmodel.")):
            continue
        ours = re.sub(r"^model\.text_model\.(?=embed_tokens|layers|norm)", "model.", name)
        found[ours.removeprefix("text_model.")] = tensor
    return found


def vision_tokenizer_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a published vision tokenizer, of either form, alone or composite -> the same under our names."""
    composite = [
        prefix for prefix in ("model.vqmodel.", "vqmodel.") if any(name.startswith(prefix) for name in tensors)
    ]
    prefix = composite[0] if composite else ""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            found.update([_vision_from_transformers(name.removeprefix(prefix), tensor)])
    return found


def transformers_vision_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of our vision tokenizer -> the same under the names and shapes of transformers."""
    found = {}
    for name, tensor in tensors.items():
        theirs = re.sub(r"^(encoder|decoder)\.mid\.", r"\1.middle_block.", name)
        theirs = re.sub(r"^(encoder|decoder)\.(down|up)\.", lambda m: f"{m[1]}.{_BLOCK_NAMES[m[2]]}.", theirs)
        theirs = re.sub(r"\.attn\.(\d+)\.norm\.", r".attn_norms.\1.", theirs)
        theirs = theirs.replace(".attn_1.norm.", ".attn_norm.")
        layer = re.search(r"\.(?:attn\.\d+|attn_1)\.(q|k|v|proj_out)\.", theirs)
        if layer is not None:
            theirs = theirs[: layer.start(1)] + _ATTENTION_NAMES[layer[1]] + theirs[layer.end(1) :]
            tensor = tensor.reshape(tensor.shape[:2])
        found[theirs] = tensor
    return found


def _vision_from_transformers(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    name = (
        name.replace(".middle_block.", ".mid.").replace(".down_block.down.", ".down.").replace(".up_block.up.", ".up.")
    )
    name = re.sub(r"\.attn_norms\.(\d+)\.", r".attn.\1.norm.", name).replace(".attn_norm.", ".attn_1.norm.")
    layer = re.search(r"\.(q_proj|k_proj|v_proj|out_proj)\.", name)
    if layer is not None:
        ours = next(short for short, long in _ATTENTION_NAMES.items() if long == layer[1])
        name = name[: layer.start(1)] + ours + name[layer.end(1) :]
        if tensor.ndim == 2:  # a linear layer's weight, as that of a 1x1 convolution
            tensor = tensor[:, :, None, None]
    return name, tensor


def _check_type(values: Values, expected: tuple[str, ...], source: str) -> None:
    if values.get("model_type") not in expected:
        raise ConfigError(f"{source} describes a {values.get('model_type')!r}, expected one of {', '.join(expected)}")
