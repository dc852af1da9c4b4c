"""Low-rank adapters (LoRA): small matrices beside frozen linear layers, so that one GPU fine-tunes what eight trained.

All of it is PEFT's: layers, fresh weights, merging, and the folder that others load. Frozen weights are kept as they are
computed with; the adapter's are float32.

Papers: Hu et al. 2021 (LoRA); Kalajdzievski 2023 (rsLoRA, the scale by the square root of the rank).
"""

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import Field, field_validator
from safetensors.torch import save_file
from torch import Tensor

from model.text_tokenizer import TextTokenizer
from model.transformer import Transformer, TransformerConfig
from model.weights import load_transformer, save_language_model
from schemas.recipe import Config
from schemas.vocabulary import Vocabulary

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NAME = "default"  # PEFT's own, which it leaves out of the names in its files
PREFIX = "base_model.model."  # of the names in them
ADAPTER_FOLDER = "adapter"
ADAPTER_FILE = "adapter_model.safetensors"


class AdapterConfig(Config):
    """What is trained in place of a model's own weights. All values are ours: the Emu3 report trains none."""

    rank: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    """What the adapter adds is scaled by alpha / rank, or by alpha / sqrt(rank) with `rslora`."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of what goes into the adapter; the model's own dropout acts besides."""
    targets: tuple[Target, ...] = Field(default=get_args(Target), min_length=1)
    """The linear layers that have one, in every layer of the network."""
    rslora: bool = False

    @field_validator("targets")
    @classmethod
    def _in_order(cls, targets: tuple[Target, ...]) -> tuple[Target, ...]:
        """Each once, in the order of the network: the same choice is the same training."""
        return tuple(target for target in get_args(Target) if target in targets)

    def peft(self) -> Any:
        """The same as PEFT's config."""
        from peft import LoraConfig

        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=list(self.targets),
            use_rslora=self.rslora,
        )


def projection_sizes(architecture: TransformerConfig) -> dict[Target, tuple[int, int]]:
    """The linear layers of a layer -> their inputs and outputs."""
    a = architecture
    hidden, inner, heads, keys = (
        a.hidden_size,
        a.intermediate_size,
        a.num_heads * a.head_dim,
        a.num_kv_heads * a.head_dim,
    )
    return {
        "q_proj": (hidden, heads),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (heads, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }


def adapter_parameters(architecture: TransformerConfig, adapter: AdapterConfig) -> int:
    """Numbers that an adapter learns in one layer."""
    sizes = projection_sizes(architecture)
    return adapter.rank * sum(sum(sizes[target]) for target in adapter.targets)


def add_adapter(
    model: Transformer, config: AdapterConfig, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Put an adapter into a transformer on the meta device, whose own weights are frozen and of this dtype from then on.
    `weights` are its own; they come back under the names that they have now, and the adapter's fresh ones after them.
    """
    _inject(model, config.peft())
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    # Drawn now: a copy of a layer costs nothing while it has no numbers.
    fresh = [named for name, layer in _lora_layers(model) for named in _fresh(name, layer)]
    layers = {name for name, _ in _lora_layers(model)}
    return _chained(layers, weights, fresh)


def adapter_of(model: torch.nn.Module) -> Any | None:
    """PEFT's config of the adapter in a model, None if it has none."""
    found: dict[str, Any] = getattr(model, "peft_config", {})
    return found.get(NAME)


def like(model: Transformer) -> Transformer:
    """A transformer of the same layers, adapters included, on the meta device."""
    with torch.device("meta"):
        made = Transformer(model.config)
    config = adapter_of(model)
    if config is not None:
        _inject(made, config)
    return made


@contextlib.contextmanager
def adapter_off(model: torch.nn.Module) -> Iterator[None]:
    """In the block the model is what it was before its adapter was trained."""
    layers = [layer for _, layer in _lora_layers(model)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def save_trained(
    folder: Path, trained: Transformer, start: Path | None, vocabulary: Vocabulary, text_tokenizer: TextTokenizer
) -> None:
    """A trained transformer -> a language model as a folder. One with an adapter is merged, in float32, with the weights of
    `start`, where its training began, and beside them is `adapter/`, the adapter alone as PEFT loads it.
    """
    if adapter_of(trained) is None:
        save_language_model(folder, trained, vocabulary, text_tokenizer)
        return
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

    assert start is not None
    with torch.device("meta"):
        base = Transformer(trained.config)
    load_transformer(base, start, dtype=torch.float32)
    config: Any = copy.copy(adapter_of(trained))
    config.inference_mode, config.target_modules = True, sorted(config.target_modules)  # the same file each time
    adapted = PeftModel(base, config, NAME)
    found = get_peft_model_state_dict(trained, save_embedding_layers=False)
    expected = 2 * sum(1 for _ in _lora_layers(trained))
    if len(found) != expected:
        raise RuntimeError(f"found {len(found)} tensors of the adapter, expected {expected}")
    alone = {f"{PREFIX}{name}": tensor.detach().cpu().contiguous() for name, tensor in found.items()}
    result: Any = set_peft_model_state_dict(adapted, alone)
    assert not result.unexpected_keys  # PEFT leaves out what it does not know

    def write(draft: Path) -> None:
        (draft / ADAPTER_FOLDER).mkdir()
        _write_adapter(draft / ADAPTER_FOLDER, config, alone)

    # Layer by layer: PEFT merges models at once only if their config is transformers'.
    for _, layer in _lora_layers(adapted):
        layer.merge()
    save_language_model(folder, adapted.unload(), vocabulary, text_tokenizer, write)


def _write_adapter(folder: Path, config: Any, tensors: Mapping[str, Tensor]) -> None:
    config.save_pretrained(folder)
    save_file(dict(tensors), folder / ADAPTER_FILE, metadata={"format": "pt"})
    (folder / ADAPTER_FILE).chmod(0o644)  # safetensors makes it private


def _inject(model: Transformer, config: Any) -> None:
    from peft import inject_adapter_in_model

    with torch.device("meta"):
        inject_adapter_in_model(config, model, NAME)


def _lora_layers(model: torch.nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def _fresh(name: str, layer: Any) -> Iterator[tuple[str, Tensor]]:
    """Weights of a layer's adapter as PEFT begins with them, drawn from torch's generator on the CPU."""
    drawn = copy.deepcopy(layer)
    for part in (drawn.lora_A, drawn.lora_B):
        part.to_empty(device="cpu")
    drawn.reset_lora_parameters(NAME, True)
    for part, weights in (("lora_A", drawn.lora_A), ("lora_B", drawn.lora_B)):
        yield f"{name}.{part}.{NAME}.weight", weights[NAME].weight.detach()


def _chained(
    layers: set[str], weights: Iterable[tuple[str, Tensor]], fresh: list[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    for name, weight in weights:
        owner, _, last = name.rpartition(".")
        yield (f"{owner}.base_layer.{last}" if owner in layers else name), weight
    yield from fresh
