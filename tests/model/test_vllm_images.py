"""Images through vLLM: the codes of our own decoding when greedy, documents that parse always, and pairs that stay together."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from model.export import export_language_model
from model.generate import VisionRequest, generate_vision
from model.sampling import SamplingConfig, guide
from model.vllm_images import ARGUMENT, VisionGrammar, VllmImages
from model.weights import LanguageModel
from schemas.document import parse_document
from schemas.errors import ConfigError
from schemas.vocabulary import Vocabulary
from tests.model.small_lm import random_lm

VOCABULARY = Vocabulary(num_text=256, num_codes=40)
REQUESTS = [
    VisionRequest("a red circle", "image", (1, 3, 2), seed=1),
    VisionRequest("b", "video", (2, 2, 3), fps=8, seed=2),
    VisionRequest("<|image end|>", "video", (3, 2, 2), seed=4, context_codes=np.arange(8).reshape(2, 2, 2)),
    VisionRequest("", "image", (1, 4, 4), seed=3),
    VisionRequest("two", "image", (1, 2, 2), seed=3),
]


def asked(pair: int, negative: bool, guidance: float = 2.0) -> SamplingParams:
    values = {
        "pair": pair,
        "negative": negative,
        "guidance": guidance,
        "kind": "image",
        "grid": [1, 2, 2],
        "meta": "outback",
    }
    values |= {"given": 0, "num_text": 256, "num_codes": 40}
    return SamplingParams(extra_args={ARGUMENT: values})


def test_both_rows_of_a_pair_get_the_guided_scores() -> None:
    processor = VisionGrammar(None, torch.device("cpu"), False)
    written: list[list[int]] = [[], [], []]
    rows = [asked(7, False), SamplingParams(), asked(7, True)]
    added: list[Any] = [(index, params, [], written[index]) for index, params in enumerate(rows)]
    processor.update_state(BatchUpdate(3, removed=[], added=added, moved=[]))
    logits = torch.randn(3, VOCABULARY.size, generator=torch.Generator().manual_seed(0))
    offset = VOCABULARY.vision_offset
    found = processor.apply(logits.clone())
    assert torch.equal(found[1], logits[1])  # another request in the batch
    assert torch.equal(found[0], found[2])
    torch.testing.assert_close(found[0, offset:], guide(logits[0, offset:], logits[2, offset:], 2.0))
    assert bool(torch.isneginf(found[0, :offset]).all())
    written[0] += [offset, offset + 1]
    written[2] += [offset, offset + 1]
    processor.update_state(BatchUpdate(3, removed=[], added=[], moved=[(0, 1, MoveDirectionality.SWAP)]))
    found = processor.apply(logits.clone())
    assert torch.equal(found[0], logits[0])
    assert found[1].isfinite().nonzero().flatten().tolist() == [VOCABULARY.eol]
    written[0].append(VOCABULARY.eol)
    with pytest.raises(RuntimeError, match="separated the pair 7"):
        processor.apply(logits.clone())
    processor.update_state(BatchUpdate(2, removed=[2], added=[], moved=[]))
    with pytest.raises(RuntimeError, match="separated"):
        processor.apply(logits.clone())


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return random_lm(
        VOCABULARY, hidden_size=64, intermediate_size=96, num_heads=2, num_kv_heads=1, head_dim=32,
        max_position_embeddings=256,  # 32: the least of vLLM's attention on CPU
    )  # fmt: skip


@pytest.fixture(scope="module")
def engine(lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmImages]:
    folder = tmp_path_factory.mktemp("llama") / "model"
    export_language_model(folder, lm, "llama")
    engine = VllmImages(
        folder,
        lm.vocabulary,
        lm.text,
        context_len=256,
        max_pairs=3,
        dtype="float32",
        enforce_eager=True,
        cpu_kv_cache_gb=1,
    )
    yield engine
    engine.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_greedy_codes_are_those_of_our_own_decoding(lm: LanguageModel, engine: VllmImages, guidance: float) -> None:
    sampling = SamplingConfig(temperature=0, guidance=guidance, negative_prompt="ugly")
    found = engine.generate(REQUESTS, sampling)
    assert [tokens.tolist() for tokens in found] == [t.tolist() for t in generate_vision(lm, REQUESTS, sampling)]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_engine_leaves_threads_to_those_who_set_them(engine: VllmImages) -> None:
    """A training in this process would compute other bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    found = torch.get_num_threads()
    torch.set_num_threads(before)
    assert found == before + 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_drawn_documents_parse_and_seeds_decide(lm: LanguageModel, engine: VllmImages) -> None:
    sampling = SamplingConfig(temperature=1.0, guidance=2.5, top_k=20, negative_prompt="ugly")
    found = engine.generate(REQUESTS, sampling)
    for request, tokens in zip(REQUESTS, found, strict=True):
        document: Any = parse_document(tokens, lm.vocabulary, lm.text)
        assert (document.block.kind, document.caption, document.block.grid) == (
            request.kind,
            request.prompt,
            request.grid,
        )
    again = engine.generate(REQUESTS[::-1], sampling)
    assert [tokens.tolist() for tokens in again[::-1]] == [tokens.tolist() for tokens in found]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_prompts_that_do_not_go_through_in_one_pass_wait_or_are_refused(
    lm: LanguageModel, engine: VllmImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = SamplingConfig(temperature=0, guidance=2.5, negative_prompt="ugly")
    monkeypatch.setattr(engine, "_max_prompt_tokens", 70)
    expected = [tokens.tolist() for tokens in generate_vision(lm, REQUESTS, sampling)]
    assert [tokens.tolist() for tokens in engine.generate(REQUESTS, sampling)] == expected
    with pytest.raises(ConfigError, match="expected at most 70"):
        engine.generate([VisionRequest("x" * 80, "image", (1, 2, 2))], sampling)
    with pytest.raises(ConfigError, match="expected at most 256, the model's context"):
        engine.generate([VisionRequest("x", "image", (1, 16, 16))], sampling)
