"""Checkpoint folders: exact, deterministic, strict, and readable by transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.published import transformers_vision_tensors
from model.text_tokenizer import TinyBpe
from model.transformer import Transformer, TransformerConfig
from model.vision_tokenizer.config import VisionTokenizerConfig
from model.vision_tokenizer.tokenizer import VisionTokenizer
from model.weights import (
    digest,
    load_language_model,
    load_vision_tokenizer,
    save_language_model,
    save_vision_tokenizer,
)
from schemas.errors import ConfigError
from schemas.vocabulary import Vocabulary

VOCABULARY = Vocabulary(num_text=256, num_codes=16)
TEXT = TinyBpe.train([], 256)
CONFIG = TransformerConfig(
    vocab_size=VOCABULARY.size,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=256,
)
VISION_CONFIG = VisionTokenizerConfig(codebook_size=16, ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(1,))
TOKENS = torch.tensor([[256 + 206, 3, 4, 5]])


def make_transformer(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(CONFIG).eval()


def make_tokenizer(seed: int = 0) -> VisionTokenizer:
    torch.manual_seed(seed)
    return VisionTokenizer(VISION_CONFIG).eval()


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_language_model_round_trips_exactly(tmp_path: Path) -> None:
    transformer = make_transformer()
    saved = save_language_model(tmp_path / "lm", transformer, VOCABULARY, TEXT)
    loaded = load_language_model(tmp_path / "lm")
    assert loaded.vocabulary == VOCABULARY
    assert loaded.transformer.config == CONFIG
    assert loaded.text.encode("abc") == TEXT.encode("abc")
    assert not loaded.transformer.training
    assert torch.equal(loaded.transformer(TOKENS), transformer(TOKENS))
    assert saved == digest(tmp_path / "lm") == digest(transformer) == digest(loaded.transformer)
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (tmp_path / "lm").iterdir())  # others may load it


def test_vision_tokenizer_round_trips_exactly(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    with torch.no_grad():
        tokenizer.train()(torch.rand(2, 4, 3, 8, 8))  # moves the running statistics
    tokenizer.eval()
    saved = save_vision_tokenizer(tmp_path / "vt", tokenizer)
    loaded = load_vision_tokenizer(tmp_path / "vt")
    assert loaded.config == VISION_CONFIG
    codes = torch.randint(0, 16, (1, 2, 2))
    assert torch.equal(loaded.decode(codes), tokenizer.decode(codes))
    assert saved == digest(loaded)
    assert digest(make_tokenizer()) != saved


def test_the_same_weights_give_the_same_bytes_and_replace_the_old(tmp_path: Path) -> None:
    save_language_model(tmp_path / "a", make_transformer(), VOCABULARY, TEXT)
    save_language_model(tmp_path / "b", make_transformer(1), VOCABULARY, TEXT)
    assert files_of(tmp_path / "a") != files_of(tmp_path / "b")
    (tmp_path / "b" / "left_over").write_text("x")
    save_language_model(tmp_path / "b", make_transformer(), VOCABULARY, TEXT)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_a_failed_save_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_language_model(tmp_path / "lm", make_transformer(), VOCABULARY, TEXT)
    before = files_of(tmp_path / "lm")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(TinyBpe, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_language_model(tmp_path / "lm", make_transformer(1), VOCABULARY, TEXT)
    assert files_of(tmp_path / "lm") == before
    assert [path.name for path in tmp_path.iterdir()] == ["lm"]


def test_digest_sees_names_shapes_and_bytes() -> None:
    base = torch.nn.Linear(2, 3)
    same = torch.nn.Linear(2, 3)
    same.load_state_dict(base.state_dict())
    assert digest(base) == digest(same)
    with torch.no_grad():
        same.weight[0, 0] += 1e-6
    assert digest(base) != digest(same)
    assert digest(base.to(torch.bfloat16)) != digest(same)
    assert digest(torch.nn.Sequential(base)) != digest(base)


def test_mismatches_are_named(tmp_path: Path) -> None:
    save_language_model(tmp_path / "lm", make_transformer(), VOCABULARY, TEXT)
    file = tmp_path / "lm" / "model.safetensors"
    tensors = load_file(file)
    tensors["extra.weight"] = torch.zeros(1)
    del tensors["model.norm.weight"]
    tensors["lm_head.weight"] = torch.zeros(3, 32)
    save_file(tensors, file)
    with pytest.raises(ConfigError) as error:
        load_language_model(tmp_path / "lm")
    message = str(error.value)
    assert "model.norm.weight: missing" in message
    assert "extra.weight: not in this architecture" in message
    assert f"lm_head.weight: shape (3, 32), expected ({VOCABULARY.size}, 32)" in message


def test_wrong_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config.json cannot be read"):
        load_language_model(tmp_path)
    save_vision_tokenizer(tmp_path / "vt", make_tokenizer())
    with pytest.raises(ConfigError, match="Emu3VisionVQ"):
        load_language_model(tmp_path / "vt")
    (tmp_path / "vt" / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ConfigError, match=r"model.safetensors cannot be read"):
        load_vision_tokenizer(tmp_path / "vt")
    with pytest.raises(ConfigError, match="483"):
        save_language_model(tmp_path / "lm", make_transformer(), Vocabulary(300, 16), TEXT)


def test_shards_and_other_types_load(tmp_path: Path) -> None:
    transformer = make_transformer()
    save_language_model(tmp_path / "lm", transformer, VOCABULARY, TEXT)
    file = tmp_path / "lm" / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    for shard, members in shards.items():
        save_file({name: tensors[name] for name in members}, tmp_path / "lm" / shard)
    index = {"weight_map": {name: shard for shard, members in shards.items() for name in members}}
    (tmp_path / "lm" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert digest(load_language_model(tmp_path / "lm").transformer) == digest(transformer)
    halved = load_language_model(tmp_path / "lm", dtype=torch.bfloat16).transformer
    assert {parameter.dtype for parameter in halved.parameters()} == {torch.bfloat16}


def reference() -> Any:
    return pytest.importorskip("transformers.models.emu3.modeling_emu3")


@torch.no_grad()
def test_our_language_model_folder_loads_in_transformers(tmp_path: Path) -> None:
    transformer = make_transformer()
    save_language_model(tmp_path / "lm", transformer, VOCABULARY, TEXT)
    theirs = reference().Emu3ForCausalLM.from_pretrained(tmp_path / "lm").eval()
    torch.testing.assert_close(theirs(TOKENS).logits, transformer(TOKENS), atol=1e-5, rtol=0)
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ConfigError, match="vocabulary"):
        load_language_model(tmp_path / "theirs")
    (tmp_path / "theirs" / "vocabulary.json").write_text(VOCABULARY.to_json())
    TEXT.save(tmp_path / "theirs")
    assert digest(load_language_model(tmp_path / "theirs").transformer) == digest(transformer)


@torch.no_grad()
def test_a_composite_of_transformers_loads(tmp_path: Path) -> None:
    emu3 = reference()
    transformer, tokenizer = make_transformer(), make_tokenizer()
    save_language_model(tmp_path / "lm", transformer, VOCABULARY, TEXT)
    text_config = emu3.Emu3TextConfig.from_pretrained(tmp_path / "lm")
    vq_config = emu3.Emu3VQVAEConfig(
        codebook_size=16,
        base_channels=32,
        channel_multiplier=(1, 2),
        num_res_blocks=1,
        attn_resolutions=(1,),
        hidden_size=64,
    )
    vocabulary_map = {"<image>": 259, "<|extra_200|>": VOCABULARY.eol}
    vocabulary_map |= {VOCABULARY.vision_string(code): VOCABULARY.vision_offset + code for code in range(16)}
    config = emu3.Emu3Config(text_config=text_config, vq_config=vq_config, vocabulary_map=vocabulary_map)
    composite = emu3.Emu3ForConditionalGeneration(config)
    tensors = {name.replace("model.", "model.text_model.", 1): t for name, t in transformer.state_dict().items()}
    vision = transformers_vision_tensors(tokenizer.state_dict())
    tensors |= {f"model.vqmodel.{name}": tensor for name, tensor in vision.items()}
    composite.load_state_dict(tensors, strict=True)
    composite.save_pretrained(tmp_path / "both")
    (tmp_path / "both" / "vocabulary.json").write_text(VOCABULARY.to_json())
    TEXT.save(tmp_path / "both")
    assert digest(load_language_model(tmp_path / "both").transformer) == digest(transformer)
    assert digest(load_vision_tokenizer(tmp_path / "both")) == digest(tokenizer)
