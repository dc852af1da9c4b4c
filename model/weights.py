"""Networks as folders: `model.safetensors`, `config.json`, and a language model's vocabulary and text tokenizer.

Loading is strict: a missing, extra or misshapen tensor is an error that names it. The same weights give the same bytes.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model.published import (
    transformer_config,
    transformer_tensors,
    transformer_values,
    vision_tokenizer_config,
    vision_tokenizer_tensors,
    vision_tokenizer_values,
)
from model.text_tokenizer import TextTokenizer, load_text_tokenizer
from model.transformer import Transformer, TransformerConfig
from model.vision_tokenizer.tokenizer import VisionTokenizer
from schemas.errors import ConfigError
from schemas.vocabulary import EMU3, Vocabulary

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
VOCABULARY_FILE = "vocabulary.json"
NAMED_MISMATCHES = 5


@dataclass(frozen=True)
class LanguageModel:
    """A transformer with the id space and the text tokenizer that it was trained on."""

    transformer: Transformer
    vocabulary: Vocabulary
    text: TextTokenizer

    def __post_init__(self) -> None:
        size = self.transformer.config.vocab_size
        if size != self.vocabulary.size:
            raise ConfigError(
                f"found a transformer of {size} ids, expected {self.vocabulary.size} for {self.vocabulary}"
            )
        if self.text.num_text > self.vocabulary.num_text:
            found = f"{self.text.num_text} text ids in the text tokenizer"
            raise ConfigError(f"found {found}, expected at most {self.vocabulary.num_text}, as the vocabulary holds")


def save_language_model(
    folder: Path,
    transformer: Transformer,
    vocabulary: Vocabulary,
    text_tokenizer: TextTokenizer,
    write_more: Callable[[Path], None] | None = None,
) -> str:
    """Write a language model as a folder, replacing one that is there; the digest of the weights. `write_more` puts into the
    folder what else belongs there.

    Raises: ConfigError if the three do not belong together.
    """
    LanguageModel(transformer, vocabulary, text_tokenizer)
    values = transformer_values(transformer.config, pad=vocabulary.pad, bos=vocabulary.bos, eos=vocabulary.eos)

    def write(draft: Path) -> None:
        write_network(draft, transformer.state_dict(), values)
        (draft / VOCABULARY_FILE).write_text(vocabulary.to_json() + "\n", encoding="utf-8")
        text_tokenizer.save(draft)
        if write_more is not None:
            write_more(draft)

    write_folder(folder, write)
    return digest(folder)


def load_language_model(
    folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> LanguageModel:
    """A folder of ours, or a published checkpoint -> the language model, in eval mode.

    A published folder needs the text tokenizer's `emu3.tiktoken` beside its weights. `dtype` converts while reading.

    Raises: ConfigError naming what is missing or does not fit.
    """
    config, vocabulary, text = describe_language_model(folder)
    with torch.device("meta"):
        transformer = Transformer(config)
    load_transformer(transformer, folder, device=device, dtype=dtype)
    return LanguageModel(transformer.eval(), vocabulary, text)


def describe_language_model(folder: Path) -> tuple[TransformerConfig, Vocabulary, TextTokenizer]:
    """A folder as `load_language_model` takes it -> everything but the weights.

    Raises: ConfigError naming what is missing.
    """
    config = transformer_config(_read_config(folder), str(folder / CONFIG_FILE))
    return config, _read_vocabulary(folder, config), load_text_tokenizer(folder)


def load_transformer(
    transformer: Transformer, folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> None:
    """Give a transformer the weights of a folder as `load_language_model` takes it.

    Raises: ConfigError naming what does not fit.
    """
    load_tensors(transformer, transformer_tensors(_read_tensors(folder, device, dtype)), str(folder))


def read_transformer(
    transformer: Transformer, folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Mapping[str, Tensor]:
    """The weights of a folder as `load_language_model` takes it, by the transformer's own names.

    Raises: ConfigError naming what does not fit the transformer.
    """
    tensors = transformer_tensors(_read_tensors(folder, device, dtype))
    _check_tensors(transformer, tensors, str(folder))
    return tensors


def save_vision_tokenizer(folder: Path, tokenizer: VisionTokenizer) -> str:
    """Write a vision tokenizer as a folder, replacing one that is there; the digest of the weights."""
    write_folder(
        folder, lambda draft: write_network(draft, tokenizer.state_dict(), vision_tokenizer_values(tokenizer.config))
    )
    return digest(folder)


def load_vision_tokenizer(
    folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> VisionTokenizer:
    """A folder of ours, or a published checkpoint -> the vision tokenizer, in eval mode.

    Raises: ConfigError naming what is missing or does not fit.
    """
    config = vision_tokenizer_config(_read_config(folder), str(folder / CONFIG_FILE))
    with torch.device("meta"):
        tokenizer = VisionTokenizer(config)
    load_tensors(tokenizer, vision_tokenizer_tensors(_read_tensors(folder, device, dtype)), str(folder))
    return tokenizer.eval()


def digest(source: Path | nn.Module) -> str:
    """A checkpoint folder or a network -> SHA-256 over its tensors' names, types, shapes and bytes, in hex.

    The folder and the network loaded from it have the same digest, on every machine.
    """
    tensors = source.state_dict() if isinstance(source, nn.Module) else _read_tensors(source, "cpu")
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def load_tensors(network: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Give a network (on the meta device, or not) these tensors as its own, without copying.

    Raises: ConfigError naming the tensors that are missing, extra or misshapen.
    """
    _check_tensors(network, tensors, source)
    network.load_state_dict(dict(tensors), strict=True, assign=True)


def _check_tensors(network: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = [f"{name}: missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"{name}: not in this architecture" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{name}: shape {found[name]}, expected {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:NAMED_MISMATCHES])
        rest = len(problems) - NAMED_MISMATCHES
        raise ConfigError(
            f"the weights of {source} do not fit:\n{shown}" + (f"\n  and {rest} more" if rest > 0 else "")
        )


def write_network(folder: Path, tensors: Mapping[str, Tensor], values: Mapping[str, object]) -> None:
    """Tensors and a config -> `model.safetensors` and `config.json` in the folder."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / WEIGHTS_FILE).chmod(0o644)  # safetensors makes it private
    (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Write into a temporary sibling and rename it, so that nobody ever sees half a checkpoint."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        draft.chmod(0o755)  # mkdtemp makes it private
        write(draft)
        if folder.exists():
            old = draft.with_name(draft.name + ".old")
            folder.rename(old)
            draft.rename(folder)
            shutil.rmtree(old)
        else:
            draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file} holds a {type(values).__name__}, expected a JSON object")
    return values


def _read_config(folder: Path) -> dict[str, Any]:
    return _read_json(folder / CONFIG_FILE)


def _read_vocabulary(folder: Path, config: TransformerConfig) -> Vocabulary:
    file = folder / VOCABULARY_FILE
    if not file.exists() and config.vocab_size == EMU3.size:
        return EMU3  # a published checkpoint, which has no such file
    try:
        return Vocabulary.from_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"the vocabulary {file} cannot be read: {error}") from error


def _read_tensors(folder: Path, device: torch.device | str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """All tensors of a folder, from one file or from the shards that its index names."""
    names = [WEIGHTS_FILE]
    if (folder / INDEX_FILE).exists():
        names = sorted(set(_read_json(folder / INDEX_FILE).get("weight_map", {}).values()))
    tensors = {}
    for name in names:
        try:
            with safe_open(folder / name, framework="pt", device=str(device)) as handle:
                for key in handle.keys():  # noqa: SIM118 (no mapping)
                    tensor = handle.get_tensor(key)
                    tensors[key] = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"the weights {folder / name} cannot be read: {error}") from error
    return tensors
