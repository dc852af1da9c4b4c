"""Checkpoints in the forms that other programs load: transformers, vLLM, and the official code.

Tensors keep their bytes in every form; only names, shapes of 1x1 convolutions and `config.json` differ (model.published).
"""

import json
from pathlib import Path
from typing import Any, Literal

from model.published import (
    composite_tensors,
    composite_values,
    llama_values,
    official_transformer_values,
    transformer_values,
    transformers_vision_tensors,
    transformers_vision_values,
    vision_tokenizer_values,
)
from model.text_tokenizer import hub_tokenizer
from model.vision_tokenizer.tokenizer import VisionTokenizer
from model.weights import LanguageModel, write_folder, write_network

LanguageForm = Literal["transformers", "official", "llama"]
VisionForm = Literal["transformers", "official"]


def export_language_model(folder: Path, lm: LanguageModel, form: LanguageForm) -> None:
    """A language model -> a folder in another form, replacing one that is there.

    `llama` is a plain Llama, as which vLLM serves it: names and arithmetic are the same. The tokenizer beside it writes BOS
    first and recognises no control token inside a text.
    """
    config, ids = lm.transformer.config, lm.vocabulary
    values = {
        "transformers": lambda: transformer_values(config, pad=ids.pad, bos=ids.bos, eos=ids.eos),
        "official": lambda: official_transformer_values(config, ids),
        "llama": lambda: llama_values(config, pad=ids.pad, bos=ids.bos, eos=ids.eos),
    }[form]()

    def write(draft: Path) -> None:
        write_network(draft, lm.transformer.state_dict(), values)
        if form == "official":
            lm.text.save(draft)
        else:
            _write_tokenizer(draft, lm)

    write_folder(folder, write)


def export_vision_tokenizer(folder: Path, tokenizer: VisionTokenizer, form: VisionForm) -> None:
    """A vision tokenizer -> a folder in another form, replacing one that is there."""
    tensors = tokenizer.state_dict()
    if form == "official":
        values = vision_tokenizer_values(tokenizer.config)
    else:
        tensors, values = transformers_vision_tensors(tensors), transformers_vision_values(tokenizer.config)
    write_folder(folder, lambda draft: write_network(draft, tensors, values))


def export_composite(folder: Path, lm: LanguageModel, tokenizer: VisionTokenizer) -> None:
    """Both networks -> one folder that transformers loads as Emu3ForConditionalGeneration, replacing one that is there."""

    def write(draft: Path) -> None:
        tensors = composite_tensors(lm.transformer.state_dict(), tokenizer.state_dict())
        write_network(draft, tensors, composite_values(lm.transformer.config, tokenizer.config, lm.vocabulary))
        _write_tokenizer(draft, lm)

    write_folder(folder, write)


def _write_tokenizer(folder: Path, lm: LanguageModel) -> None:
    (folder / "tokenizer.json").write_text(hub_tokenizer(lm.text, lm.vocabulary), encoding="utf-8")
    # Naming BOS or EOS here would make them recognised wherever a text holds their strings.
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings["model_max_length"] = lm.transformer.config.max_position_embeddings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    ends = {"bos_token_id": lm.vocabulary.bos, "eos_token_id": lm.vocabulary.eos, "pad_token_id": lm.vocabulary.pad}
    (folder / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n", encoding="utf-8")
