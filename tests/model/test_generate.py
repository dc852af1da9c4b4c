"""Generation: documents always parse, seeds decide, the cache and the batch change nothing."""

import copy
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.generate import VisionRequest, Window, generate_vision
from model.kv_cache import KvCache
from model.sampling import SamplingConfig, guide
from model.text_tokenizer import TinyBpe
from model.transformer import Transformer, TransformerConfig
from model.weights import LanguageModel
from schemas.document import Grammar, MetaTemplate, Tokens, VisionDocument, parse_document, prompt_tokens
from schemas.errors import ConfigError
from schemas.vocabulary import IntArray, Vocabulary
from tests.model.small_lm import random_lm

VOCABULARY = Vocabulary(num_text=256, num_codes=24)
GREEDY = SamplingConfig(temperature=0, guidance=1)
GUIDED = SamplingConfig(guidance=2.5, top_k=20, negative_prompt="ugly")


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    """A random model whose choices are far from uniform and depend on everything before."""
    return random_lm(VOCABULARY, max_position_embeddings=256)


def parsed(lm: LanguageModel, tokens: Tokens, meta: MetaTemplate = MetaTemplate.OUTBACK) -> VisionDocument:
    document = parse_document(tokens, lm.vocabulary, lm.text, meta=meta)
    assert isinstance(document, VisionDocument)
    return document


REQUESTS = [
    VisionRequest("a red circle", "image", (1, 3, 2), seed=1),
    VisionRequest("b", "video", (2, 2, 3), fps=8, seed=2),
    VisionRequest("", "image", (1, 1, 1), seed=3),
    VisionRequest("<|image end|>", "video", (3, 2, 2), seed=4, context_codes=np.arange(8).reshape(2, 2, 2)),
]


@pytest.mark.parametrize("sampling", [GREEDY, GUIDED, SamplingConfig(temperature=0)], ids=["greedy", "guided", "both"])
@pytest.mark.parametrize("meta", MetaTemplate)
def test_mixed_batches_give_documents_that_parse(
    lm: LanguageModel, sampling: SamplingConfig, meta: MetaTemplate
) -> None:
    steps: list[tuple[int, int]] = []
    made = generate_vision(lm, REQUESTS, sampling, lambda done, total: steps.append((done, total)), meta=meta)
    for request, tokens in zip(REQUESTS, made, strict=True):
        document = parsed(lm, tokens, meta)
        assert tokens.dtype == np.uint32
        assert (document.block.kind, document.caption, document.block.grid) == (
            request.kind,
            request.prompt,
            request.grid,
        )
        if request.context_codes is not None:
            assert np.array_equal(document.block.codes[:2], request.context_codes)
    assert steps[-1] == (23, 23)
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("sampling", [GREEDY, GUIDED], ids=["greedy", "guided"])
def test_the_batch_does_not_change_a_sample(lm: LanguageModel, sampling: SamplingConfig) -> None:
    together = generate_vision(lm, REQUESTS, sampling)
    for request, tokens in zip(REQUESTS, together, strict=True):
        assert generate_vision(lm, [request], sampling)[0].tolist() == tokens.tolist()
    other = generate_vision(lm, [REQUESTS[3], REQUESTS[1], REQUESTS[0]], sampling)
    assert [row.tolist() for row in other] == [together[index].tolist() for index in (3, 1, 0)]


@pytest.mark.parametrize("sampling", [GREEDY, GUIDED, SamplingConfig(temperature=0)], ids=["greedy", "guided", "both"])
@pytest.mark.parametrize("lookahead", [1, 3, 100])
def test_guesses_change_no_code(lm: LanguageModel, sampling: SamplingConfig, lookahead: int) -> None:
    one_by_one = generate_vision(lm, REQUESTS, sampling)
    for requests, expected in ((REQUESTS, one_by_one), (REQUESTS[1:2], one_by_one[1:2])):
        made = generate_vision(lm, requests, sampling, lookahead=lookahead)
        assert [row.tolist() for row in made] == [row.tolist() for row in expected]


def test_right_guesses_save_passes(lm: LanguageModel) -> None:
    """A model that says its last code again is guessed right; one that counts up is guessed wrong, and costs no more."""
    request = VisionRequest("", "video", (2, 4, 4), fps=8, context_codes=np.full((1, 4, 4), 5))
    for step, most in ((0, 3), (1, 16)):
        counting = copy.deepcopy(lm)
        num_passes = 0

        def hidden(tokens_BL: torch.Tensor, *, kv_cache: KvCache, step: int = step) -> torch.Tensor:
            nonlocal num_passes
            num_passes += 1
            kv_cache.advance(tokens_BL.shape[1])
            codes = torch.where(tokens_BL >= VOCABULARY.vision_offset, tokens_BL - VOCABULARY.vision_offset, 5)
            return torch.nn.functional.one_hot((codes + step) % VOCABULARY.num_codes, VOCABULARY.num_codes).float()

        counting.transformer.hidden = hidden  # type: ignore[assignment, method-assign]
        counting.transformer.logits = lambda hidden_ND, rows=None: hidden_ND  # type: ignore[assignment, method-assign]
        generate_vision(counting, [request], GREEDY, lookahead=7)
        assert num_passes <= most


def test_the_seed_decides(lm: LanguageModel) -> None:
    made = [
        generate_vision(lm, [VisionRequest("x", "image", (1, 4, 4), seed=seed)], GUIDED)[0].tolist()
        for seed in (5, 5, 6)
    ]
    assert made[0] == made[1]
    assert made[0] != made[2]


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_greedy_codes_are_those_of_full_passes(lm: LanguageModel, guidance: float) -> None:
    sampling = SamplingConfig(temperature=0, guidance=guidance, negative_prompt="ugly")
    request = VisionRequest("a cat", "video", (2, 3, 2), fps=8)
    tokens = generate_vision(lm, [request], sampling)[0]
    args = (request.kind, request.grid, request.fps, lm.vocabulary, lm.text)
    prompt, negative = prompt_tokens("a cat", *args), prompt_tokens("ugly", *args)
    offset = lm.vocabulary.vision_offset
    num_checked = 0
    for place in range(len(prompt), len(tokens)):
        if tokens[place] < offset:
            continue
        written = tokens[len(prompt) : place]

        def scores(head: Tokens, written: Tokens = written) -> torch.Tensor:
            ids = torch.from_numpy(np.concatenate([head, written]).astype(np.int64))
            logits: torch.Tensor = lm.transformer(ids.unsqueeze(0))[0, -1]
            return logits

        guided = guide(scores(prompt), scores(negative), guidance)[offset:]
        assert int(tokens[place]) - offset == int(guided.argmax())
        num_checked += 1
    assert num_checked == 12


@torch.no_grad()
@pytest.mark.parametrize(
    ("lookahead", "guidance"),
    [(2, 1.5), *(pytest.param(*rest, marks=pytest.mark.slow) for rest in ((0, 1.0), (0, 1.5), (2, 1.0)))],
)
def test_draws_have_the_distribution_of_the_model(guidance: float, lookahead: int) -> None:
    """Three codes of five: all 125 outcomes, as often as the model's own probabilities say."""
    stats = pytest.importorskip("scipy.stats")
    vocabulary, num_draws, num_codes = Vocabulary(num_text=256, num_codes=5), 4000, 5
    small = random_lm(vocabulary, seed=5, std=0.2, num_heads=2, num_kv_heads=1, head_dim=16)
    grid = (1, 1, 3)

    def log_probabilities(caption: str) -> torch.Tensor:
        """Of each outcome, one row for each of its three codes."""
        head = torch.from_numpy(prompt_tokens(caption, "image", grid, None, vocabulary, small.text).astype(np.int64))
        outcomes = torch.cartesian_prod(*[torch.arange(num_codes)] * 3) + vocabulary.vision_offset
        tokens = torch.cat([head.expand(len(outcomes), -1), outcomes], dim=1)
        return small.transformer(tokens)[:, len(head) - 1 : -1, vocabulary.vision_offset :].log_softmax(dim=-1)

    scores = guide(log_probabilities("a"), log_probabilities(""), guidance).log_softmax(dim=-1)
    chosen = torch.cartesian_prod(*[torch.arange(num_codes)] * 3)
    expected = scores.gather(2, chosen.unsqueeze(2)).sum(dim=(1, 2)).exp().double()
    requests = [VisionRequest("a", "image", grid, seed=seed) for seed in range(num_draws)]
    sampling = SamplingConfig(guidance=guidance, top_k=None)
    found = torch.zeros(num_codes**3)
    for start in range(0, num_draws, 500):
        for tokens in generate_vision(small, requests[start : start + 500], sampling, lookahead=lookahead):
            codes = parse_document(tokens, vocabulary, small.text).block.codes.ravel()  # type: ignore[union-attr]
            found[int(codes @ np.array([num_codes**2, num_codes, 1]))] += 1
    common = expected * num_draws >= 5  # the test's own condition; the rest are one cell
    observed = [*found[common].tolist(), found[~common].sum().item()]
    wanted = [*(expected[common] * num_draws).tolist(), (expected[~common].sum() * num_draws).item()]
    assert int(common.sum()) > 30
    assert stats.chisquare(observed, np.array(wanted) * (num_draws / sum(wanted))).pvalue > 0.01


@pytest.mark.slow  # it trains one
@pytest.mark.timeout(600)
def test_a_trained_model_needs_half_the_passes() -> None:
    """Pictures of a rectangle on a ground, learnt in seconds, and the codes the same with and without guesses."""
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=VOCABULARY.size, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=2, num_kv_heads=2,
        head_dim=32, dropout=0.0,
    )  # fmt: skip
    trained = LanguageModel(Transformer(config), VOCABULARY, TinyBpe.train([], 256))
    grammar = Grammar(VOCABULARY, "image", (1, 8, 8))
    head = prompt_tokens("", "image", grammar.grid, None, VOCABULARY, trained.text)
    rng = np.random.default_rng(0)

    def picture() -> Tokens:
        codes = np.full((1, 8, 8), rng.integers(2))
        top, left, height, width = (*rng.integers(0, 4, 2), *rng.integers(2, 5, 2))
        codes[0, top : top + height, left : left + width] = rng.integers(2, 6)
        return np.concatenate([head, grammar.write(codes)])

    optimiser = torch.optim.AdamW(trained.transformer.parameters(), lr=3e-3)
    for _ in range(120):
        tokens = torch.from_numpy(np.stack([picture() for _ in range(16)]).astype(np.int64))
        logits = trained.transformer(tokens[:, :-1])[:, len(head) - 1 :]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, len(head) :].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    trained.transformer.eval()
    num_passes, hidden = 0, trained.transformer.hidden

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal num_passes
        num_passes += 1
        return hidden(*args, **kwargs)

    trained.transformer.hidden = counted  # type: ignore[method-assign]
    drawn, passes = {}, {}
    for lookahead in (0, 16):
        num_passes = 0
        requests = [VisionRequest("", "image", grammar.grid, seed=seed) for seed in range(10)]
        sampling = SamplingConfig(guidance=1.0)
        drawn[lookahead] = [generate_vision(trained, [r], sampling, lookahead=lookahead)[0].tolist() for r in requests]
        passes[lookahead] = num_passes
    assert drawn[0] == drawn[16]
    assert passes[0] == 10 * 64
    assert 2 * passes[16] <= passes[0]


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["image", "video"]), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
        min_size=1,
        max_size=4,
    ),
    st.booleans(),
)
def test_any_batch_of_grids_parses(lm: LanguageModel, forms: list[tuple[str, int, int, int]], guided: bool) -> None:
    requests = [
        VisionRequest("p" * index, kind, (1 if kind == "image" else t, h, w), seed=index)  # type: ignore[arg-type]
        for index, (kind, t, h, w) in enumerate(forms)
    ]
    for request, tokens in zip(requests, generate_vision(lm, requests, GUIDED if guided else GREEDY), strict=True):
        assert parsed(lm, tokens).block.grid == request.grid


def test_long_clips_are_drawn_window_by_window(lm: LanguageModel) -> None:
    """Each window is what a clip of its length, begun with the kept frames, gives; shorter ones are not touched."""
    long = VisionRequest("x", "video", (7, 3, 3), fps=8, seed=4)
    greedy = SamplingConfig(temperature=0, guidance=2.0)
    steps: list[int] = []
    window = Window(num_frames=4, num_kept=2)
    made = generate_vision(lm, [long, REQUESTS[1]], greedy, lambda done, _: steps.append(done), window=window)
    assert steps[-1] == 7 * 9 + 12
    assert steps == sorted(steps)
    assert made[1].tolist() == generate_vision(lm, [REQUESTS[1]], greedy)[0].tolist()
    codes = parsed(lm, made[0]).block.codes
    assert codes.shape == (7, 3, 3)
    expected = np.zeros((0, 3, 3), np.int64)
    for start, length in ((0, 4), (2, 4), (4, 3)):
        part = VisionRequest("x", "video", (length, 3, 3), fps=8, context_codes=expected[start:])
        expected = np.concatenate([expected[:start], parsed(lm, generate_vision(lm, [part], greedy)[0]).block.codes])
    assert np.array_equal(codes, expected)


@pytest.mark.slow  # compiling takes a minute
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="compiling needs a C++ compiler")
@pytest.mark.parametrize("lookahead", [0, 4])
def test_compiled_steps_choose_the_same(lm: LanguageModel, lookahead: int) -> None:
    compiled = LanguageModel(copy.deepcopy(lm.transformer), lm.vocabulary, lm.text)
    for sampling in (GREEDY, GUIDED):
        expected = generate_vision(lm, REQUESTS, sampling)
        found = generate_vision(compiled, REQUESTS, sampling, lookahead=lookahead, compiled=True)
        assert [tokens.tolist() for tokens in found] == [tokens.tolist() for tokens in expected]


@pytest.mark.parametrize("lookahead", [0, 5])
def test_rows_are_told_as_soon_as_they_are_whole(lm: LanguageModel, lookahead: int) -> None:
    requests = [*REQUESTS, VisionRequest("x", "video", (7, 3, 3), fps=8, seed=4)]
    told: list[tuple[int, int, list[int]]] = []
    steps: list[int] = []  # codes that were decided when each row was told
    decided = 0

    def on_progress(codes: int, _: int) -> None:
        nonlocal decided
        decided = codes

    def on_row(request: int, row: int, codes: IntArray) -> None:
        told.append((request, row, codes.tolist()))
        steps.append(decided)

    window = Window(num_frames=4, num_kept=2)
    made = generate_vision(lm, requests, GUIDED, on_progress, lookahead=lookahead, window=window, on_row=on_row)
    for index, (request, tokens) in enumerate(zip(requests, made, strict=True)):
        _, h, w = request.grid
        given = 0 if request.context_codes is None else len(request.context_codes) * h
        rows = parsed(lm, tokens).block.codes.reshape(-1, w).tolist()
        assert [(row, codes) for who, row, codes in told if who == index] == list(enumerate(rows))[given:]
    assert len(set(steps)) > 10  # along the way, not at the end


def test_clips_longer_than_the_context_slide_by_themselves(lm: LanguageModel) -> None:
    """The context of 256 tokens holds 5 frames of 6 x 6; the seed decides the rest too."""
    request = VisionRequest("x", "video", (9, 6, 6), fps=8, seed=4, context_codes=np.zeros((6, 6, 6), np.int64))
    made = [generate_vision(lm, [request], GUIDED, lookahead=ahead)[0] for ahead in (0, 5)]
    assert made[0].tolist() == made[1].tolist()
    document = parsed(lm, made[0])
    assert len(made[0]) > lm.transformer.config.max_position_embeddings
    assert document.block.codes.shape == (9, 6, 6)
    assert not document.block.codes[:6].any()
    assert len(np.unique(document.block.codes[6:])) > 3


@pytest.mark.parametrize("wrong", [{"num_frames": 1}, {"num_kept": 0}])
def test_windows_that_do_not_move_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1 frame kept"):
        Window(**wrong)


def test_a_whole_clip_of_context_is_left_as_it_is(lm: LanguageModel) -> None:
    codes = np.arange(8).reshape(2, 2, 2)
    request = VisionRequest("x", "video", (2, 2, 2), context_codes=codes)
    assert np.array_equal(parsed(lm, generate_vision(lm, [request], GUIDED)[0]).block.codes, codes)
    assert generate_vision(lm, [], GUIDED) == []


def test_half_precision_weights_generate(lm: LanguageModel) -> None:
    halved = LanguageModel(copy.deepcopy(lm.transformer).to(torch.bfloat16), lm.vocabulary, lm.text)
    for request, tokens in zip(REQUESTS, generate_vision(halved, REQUESTS, GUIDED), strict=True):
        assert parsed(lm, tokens).block.grid == request.grid


def test_impossible_requests_are_refused(lm: LanguageModel) -> None:
    with pytest.raises(ConfigError, match="at most 256"):
        generate_vision(lm, [VisionRequest("x", "image", (1, 16, 16))], GUIDED)
    lm.transformer.train()
    try:
        with pytest.raises(RuntimeError, match="eval"):
            generate_vision(lm, REQUESTS, GUIDED)
    finally:
        lm.transformer.eval()
