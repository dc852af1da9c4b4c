"""Exported folders: other programs load them and compute the same, and they come back bit for bit."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from model.export import export_composite, export_language_model, export_vision_tokenizer
from model.text_tokenizer import EMU3_FILE, Emu3TextTokenizer, TextTokenizer, TinyBpe, hub_tokenizer
from model.vision_tokenizer.config import VisionTokenizerConfig
from model.vision_tokenizer.tokenizer import VisionTokenizer
from model.weights import LanguageModel, digest, load_language_model, load_vision_tokenizer
from schemas.errors import ConfigError
from schemas.vocabulary import SPECIAL_STRINGS, Vocabulary
from tests.model.small_lm import random_lm

VOCABULARY = Vocabulary(num_text=300, num_codes=40)
TEXTS = ["a red square moves to the left", "a blue circle moves up"]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    text = TinyBpe.train(TEXTS, 300)
    return random_lm(
        VOCABULARY, seed=0, std=0.15, text=text, hidden_size=64, intermediate_size=96, num_heads=2, num_kv_heads=1,
        head_dim=32, rope_theta=10_000.0, max_position_embeddings=512,  # 32: the least of vLLM's attention on CPU
    )  # fmt: skip


@pytest.fixture(scope="module")
def vision() -> VisionTokenizer:
    torch.manual_seed(0)
    size = VisionTokenizerConfig(codebook_size=40, ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(1,))
    tokenizer = VisionTokenizer(size).eval()
    tokenizer.quantize.embedding.weight.data.normal_()
    return tokenizer


def emu3() -> Any:
    return pytest.importorskip("transformers.models.emu3.modeling_emu3")


def bring_back(folder: Path, lm: LanguageModel) -> LanguageModel:
    """A folder that others wrote, with what only ours have beside it -> our model."""
    (folder / "vocabulary.json").write_text(lm.vocabulary.to_json())
    lm.text.save(folder)
    return load_language_model(folder)


@torch.no_grad()
@pytest.mark.parametrize("form", ["transformers", "official", "llama"])
def test_language_models_come_back_bit_for_bit(tmp_path: Path, lm: LanguageModel, form: Any) -> None:
    export_language_model(tmp_path / form, lm, form)
    tensors = load_file(tmp_path / form / "model.safetensors")
    assert tensors.keys() == lm.transformer.state_dict().keys()  # the same names in all forms
    assert all(torch.equal(tensor, lm.transformer.state_dict()[name]) for name, tensor in tensors.items())
    if form == "official":
        assert json.loads((tmp_path / form / "config.json").read_text())["model_type"] == "Emu3"
        assert digest(bring_back(tmp_path / form, lm).transformer) == digest(lm.transformer)
        return
    llama = pytest.importorskip("transformers").LlamaForCausalLM
    network = {"transformers": emu3().Emu3ForCausalLM, "llama": llama}[form]
    theirs = network.from_pretrained(tmp_path / form).eval()
    tokens = torch.randint(0, VOCABULARY.size, (2, 30), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(theirs(tokens).logits, lm.transformer(tokens), atol=1e-5, rtol=0)
    theirs.save_pretrained(tmp_path / "theirs")
    if form == "transformers":
        back = bring_back(tmp_path / "theirs", lm)
        assert back.transformer.config == lm.transformer.config
        assert digest(back.transformer) == digest(lm.transformer)


@torch.no_grad()
def test_vision_tokenizers_come_back_bit_for_bit(tmp_path: Path, vision: VisionTokenizer) -> None:
    export_vision_tokenizer(tmp_path / "official", vision, "official")
    assert digest(load_vision_tokenizer(tmp_path / "official")) == digest(vision)
    export_vision_tokenizer(tmp_path / "hub", vision, "transformers")
    theirs = emu3().Emu3VQVAE.from_pretrained(tmp_path / "hub").eval()
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    expected = torch.stack(list(theirs.encode(images, image_sizes=torch.tensor([[16, 24]] * 2)).image_tokens))
    assert torch.equal(vision.encode(images), expected)
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_vision_tokenizer(tmp_path / "theirs")
    assert back.config == vision.config
    assert digest(back) == digest(vision)


@torch.no_grad()
def test_the_composite_loads_in_transformers_and_comes_back(
    tmp_path: Path, lm: LanguageModel, vision: VisionTokenizer
) -> None:
    export_composite(tmp_path / "both", lm, vision)
    theirs = emu3().Emu3ForConditionalGeneration.from_pretrained(tmp_path / "both").eval()
    tokens = torch.tensor([[VOCABULARY.bos, 5, 6, 7, VOCABULARY.boi, 9]])
    torch.testing.assert_close(theirs(tokens).logits, lm.transformer(tokens), atol=1e-5, rtol=0)
    theirs.save_pretrained(tmp_path / "theirs")
    assert digest(bring_back(tmp_path / "theirs", lm).transformer) == digest(lm.transformer)
    assert digest(load_vision_tokenizer(tmp_path / "theirs")) == digest(vision)


def test_an_architecture_that_transformers_lacks_is_refused(tmp_path: Path) -> None:
    size = VisionTokenizerConfig(
        codebook_size=8, ch=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(0, 1), norm_groups=4
    )
    with pytest.raises(ConfigError, match="4 norm groups"):
        export_vision_tokenizer(tmp_path / "x", VisionTokenizer(size), "transformers")
    assert not (tmp_path / "x").exists()


@pytest.fixture(scope="module", params=["tiny", "emu3"])
def codec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    if request.param == "tiny":
        return TinyBpe.train(TEXTS, 300)
    merges = [b"re", b"red", b" re", b" s", b".\n", b"(w", b"\xc3\xa9", b"90", b"mo", b"ve"]
    lines = [*(bytes([value]) for value in range(256)), *merges]
    file = tmp_path_factory.mktemp("tiktoken") / EMU3_FILE
    file.write_bytes(b"\n".join(base64.b64encode(line) + b" %d" % rank for rank, line in enumerate(lines)))
    return Emu3TextTokenizer(file)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.text(max_size=8), st.sampled_from([*SPECIAL_STRINGS, " red", "moves", ".\n", "<|visual token 000003|>"])
        ),
        max_size=6,
    )
)
def test_hub_tokenizers_give_the_same_ids_and_no_control_token(codec: TextTokenizer, parts: list[str]) -> None:
    hub = pytest.importorskip("tokenizers").Tokenizer.from_str(hub_tokenizer(codec, VOCABULARY))
    text = "".join(parts)
    ids = hub.encode(text).ids
    assert ids == [VOCABULARY.bos, *codec.encode(text)]
    assert all(token < codec.num_text for token in ids[1:])
    assert hub.decode(ids[1:], skip_special_tokens=False) == codec.decode(ids[1:])
    assert hub.decode([VOCABULARY.eos, VOCABULARY.vision_offset + 3], skip_special_tokens=False) == (
        "<|extra_204|><|visual token 000003|>"
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
@torch.no_grad()
def test_vllm_serves_the_llama_and_chooses_the_same(
    tmp_path: Path, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm = pytest.importorskip("vllm")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    export_language_model(tmp_path / "llama", lm, "llama")
    engine = vllm.LLM(str(tmp_path / "llama"), dtype="float32", enforce_eager=True, max_model_len=128)
    try:
        # As a text, which the exported tokenizer turns into ids, and as ids.
        texts = ["a red square", "<|extra_204|> is no control token", ""]
        ids = [[VOCABULARY.bos, *lm.text.encode(text)] for text in texts]
        params = vllm.SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
        said = engine.generate(texts, params)
        again = engine.generate([{"prompt_token_ids": row} for row in ids], params)
        for row, first, second in zip(ids, said, again, strict=True):
            tokens = list(row)
            for _ in range(24):
                tokens.append(int(lm.transformer(torch.tensor([tokens]))[0, -1].argmax()))
            assert list(first.prompt_token_ids) == row
            assert list(first.outputs[0].token_ids) == list(second.outputs[0].token_ids) == tokens[len(row) :]
    finally:
        engine.llm_engine.engine_core.shutdown()
