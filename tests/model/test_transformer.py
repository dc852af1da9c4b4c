"""The language model against transformers' Emu3, the published counts, and its own promises."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from model.transformer import TRANSFORMER_SIZES, Transformer, TransformerConfig, document_positions, transformer_size
from train.head_loss import HeadLossConfig
from train.losses import next_token_loss

CONFIG = TransformerConfig(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=128,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=512,
)


SEEDS = range(20)


def random_config(seed: int) -> TransformerConfig:
    """A config of any shape that the architecture allows."""
    rng = random.Random(seed)
    num_kv_heads, head_dim = rng.choice([1, 2, 3]), rng.choice([8, 16, 32])
    num_heads = num_kv_heads * rng.choice([1, 2, 4])
    return TransformerConfig(
        vocab_size=rng.randint(40, 400),
        hidden_size=num_heads * head_dim,
        intermediate_size=rng.randint(16, 200),
        num_layers=rng.randint(1, 4),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rope_theta=rng.choice([10_000.0, 1_000_000.0]),
        rms_norm_eps=rng.choice([1e-5, 1e-6]),
        max_position_embeddings=512,
    )


def random_transformer(config: TransformerConfig = CONFIG, seed: int = 0) -> Transformer:
    """A transformer in eval mode whose norms and weights are spread out enough that a wrong layer would show."""
    torch.manual_seed(seed)
    transformer = Transformer(config).eval()
    for name, tensor in transformer.state_dict().items():
        if "norm" in name:
            tensor.uniform_(0.5, 1.5)
        else:
            tensor.normal_(std=0.1)
    return transformer


def random_tokens(*shape: int, seed: int = 0, vocab_size: int = CONFIG.vocab_size) -> Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def reference_of(transformer: Transformer) -> Any:
    emu3 = pytest.importorskip("transformers.models.emu3.modeling_emu3")
    config = transformer.config
    reference = emu3.Emu3ForCausalLM(
        emu3.Emu3TextConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_theta": config.rope_theta, "rope_type": "default"},
            attention_dropout=config.dropout,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    reference.load_state_dict(transformer.state_dict(), strict=True)
    return reference.eval()


@torch.no_grad()
@pytest.mark.parametrize("seed", SEEDS)
def test_any_config_matches_transformers(seed: int) -> None:
    """Logits, loss, greedy choices, cached steps, padding and packing, of a random architecture with random weights."""
    config = random_config(seed)
    transformer = random_transformer(config, seed)
    reference = reference_of(transformer)
    tokens = random_tokens(3, 40, seed=seed, vocab_size=config.vocab_size)
    logits = transformer(tokens)
    assert logits.dtype == torch.float32
    assert logits.std() > 0.05
    expected = reference(tokens, labels=tokens)
    torch.testing.assert_close(logits, expected.logits, atol=1e-5, rtol=0)
    labels, weights = tokens[:, 1:], torch.ones(3, 39)
    hidden, head = transformer.hidden(tokens)[:, :-1], transformer.lm_head.weight
    loss = next_token_loss(hidden, head, labels, weights, config.vocab_size, HeadLossConfig())["loss"].mean
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=0)

    cache = transformer.new_cache(3, 80)
    steps = [transformer(part, kv_cache=cache) for part in tokens.split((17, 1, 1, 9, 12), dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), logits, atol=1e-5, rtol=0)
    chosen = [steps[-1][:, -1].argmax(dim=-1)]
    for _ in range(19):
        chosen.append(transformer(chosen[-1].unsqueeze(1), kv_cache=cache)[:, -1].argmax(dim=-1))
    told = reference.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=20, eos_token_id=None
    )
    assert torch.equal(torch.stack(chosen, dim=1), told[:, 40:])

    num_pad = random.Random(seed).randint(1, 39)
    mask = torch.ones_like(tokens)
    mask[1, :num_pad] = 0
    padded = transformer(tokens, attention_mask_BL=mask)
    torch.testing.assert_close(
        padded[1, num_pad:], reference(tokens, attention_mask=mask).logits[1, num_pad:], atol=1e-5, rtol=0
    )
    packed = transformer(tokens, document_ids_BL=(torch.arange(40) >= num_pad).long().expand(3, 40))
    for row in range(3):
        for part in (slice(0, num_pad), slice(num_pad, 40)):
            alone = reference(tokens[row : row + 1, part]).logits[0]
            torch.testing.assert_close(packed[row, part], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(4))
def test_gradients_are_those_of_transformers(seed: int, dtype: torch.dtype) -> None:
    """Of every weight. In bfloat16 both round, each at places of its own: ours are about as far from float32 as theirs."""
    config = random_config(seed)
    transformer = random_transformer(config, seed)
    reference = reference_of(transformer)
    tokens = random_tokens(2, 30, seed=seed, vocab_size=config.vocab_size)
    slopes = torch.randn(2, 30, config.vocab_size, generator=torch.Generator().manual_seed(seed))

    def gradients(model: Any) -> dict[str, Tensor]:
        model.zero_grad()
        logits = model(tokens)
        (getattr(logits, "logits", logits) * slopes.to(dtype)).sum().backward()
        return {name: weight.grad.float().clone() for name, weight in model.named_parameters()}

    exact = gradients(reference)
    ours, theirs = gradients(transformer.to(dtype)), gradients(reference.to(dtype))
    assert ours.keys() == exact.keys()
    for name, expected in exact.items():
        assert expected.norm() > 0
        if dtype == torch.float32:
            assert (ours[name] - expected).norm() < 1e-5 * expected.norm(), name
        else:
            assert (ours[name] - expected).norm() < 2 * (theirs[name] - expected).norm(), name


@torch.no_grad()
def test_left_padding_matches_transformers_and_no_padding() -> None:
    transformer = random_transformer()
    tokens = random_tokens(2, 20)
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    logits = transformer(tokens, attention_mask_BL=mask)
    expected = reference_of(transformer)(tokens, attention_mask=mask).logits
    torch.testing.assert_close(logits[0], expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits[1, 7:], expected[1, 7:], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits[1, 7:], transformer(tokens[1:, 7:])[0], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(24,), (1,) * 24, (9, 1, 1, 5, 8)], ids=str)
def test_cached_steps_equal_the_full_pass(sizes: tuple[int, ...]) -> None:
    transformer = random_transformer()
    tokens = random_tokens(2, 24)
    expected = transformer(tokens)
    cache = transformer.new_cache(2, 24)
    logits = torch.cat([transformer(part, kv_cache=cache) for part in tokens.split(sizes, dim=1)], dim=1)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_rows_of_a_cache_grow_on_their_own() -> None:
    """Rows take other numbers of tokens in each pass, with wrong ones behind them that are forgotten."""
    transformer = random_transformer()
    tokens = random_tokens(3, 24)
    expected = transformer(tokens)
    cache = transformer.new_cache(3, 40)
    ends = [0, 0, 0]
    for counts in ([7, 1, 4], [1, 1, 1], [2, 0, 5], [14, 20, 6], [0, 2, 0]):
        width = max(counts) + 2
        part = random_tokens(3, width, seed=9)  # what is not written over below is wrong
        for row, (end, count) in enumerate(zip(ends, counts, strict=True)):
            part[row, :count] = tokens[row, end : end + count]
        logits = transformer(part, kv_cache=cache)
        cache.forget([width - count for count in counts])
        for row, (end, count) in enumerate(zip(ends, counts, strict=True)):
            torch.testing.assert_close(logits[row, :count], expected[row, end : end + count], atol=1e-5, rtol=0)
        ends = [end + count for end, count in zip(ends, counts, strict=True)]
    assert ends == cache.lengths == [24, 24, 16]


@torch.no_grad()
def test_packed_documents_equal_documents_alone() -> None:
    transformer = random_transformer()
    tokens = random_tokens(2, 30)
    ids = torch.tensor([[0] * 11 + [1] * 1 + [2] * 18, [7] * 30])
    logits = transformer(tokens, document_ids_BL=ids)
    for row, start, end in [(0, 0, 11), (0, 11, 12), (0, 12, 30), (1, 0, 30)]:
        alone = transformer(tokens[row : row + 1, start:end])[0]
        torch.testing.assert_close(logits[row, start:end], alone, atol=1e-5, rtol=0)


def test_packed_gradients_equal_those_of_documents_alone() -> None:
    transformer = random_transformer()
    tokens = random_tokens(1, 30)
    ids = torch.tensor([[0] * 11 + [1] * 19])
    weight = transformer.get_parameter("model.layers.0.self_attn.k_proj.weight")
    packed = torch.autograd.grad(transformer(tokens, document_ids_BL=ids).square().sum(), weight)[0]
    alone = transformer(tokens[:, :11]).square().sum() + transformer(tokens[:, 11:]).square().sum()
    torch.testing.assert_close(packed, torch.autograd.grad(alone, weight)[0], atol=1e-3, rtol=1e-4)


def test_positions_restart_in_each_document() -> None:
    ids = torch.tensor([[3, 3, 3, 0, 0, 9, 9], [1, 2, 2, 2, 2, 2, 3]])
    assert document_positions(ids).tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 0, 1, 2, 3, 4, 0]]


def test_published_size_has_the_published_parameters() -> None:
    with torch.device("meta"):
        transformer = Transformer(TRANSFORMER_SIZES["8b"])
    assert sum(parameter.numel() for parameter in transformer.parameters()) == 8_492_011_520
    keys = transformer.state_dict().keys()
    assert len(keys) == 291
    assert {
        "model.embed_tokens.weight",
        "model.layers.31.self_attn.o_proj.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    } <= keys


def test_tiny_size_is_tiny() -> None:
    with torch.device("meta"):
        transformer = Transformer(transformer_size("tiny", vocab_size=2000))
    assert transformer.lm_head.out_features == 2000
    assert 2e6 < sum(parameter.numel() for parameter in transformer.parameters()) < 4e6


@torch.no_grad()
def test_logits_of_a_range_are_those_of_all() -> None:
    transformer = random_transformer()
    hidden = transformer.hidden(random_tokens(2, 5))
    part = transformer.logits(hidden, slice(100, 300))
    torch.testing.assert_close(part, transformer.logits(hidden)[..., 100:300])


@torch.no_grad()
def test_dropout_acts_in_four_places_and_only_in_training() -> None:
    transformer = random_transformer(CONFIG.model_copy(update={"dropout": 0.5, "num_layers": 1}))
    tokens = random_tokens(1, 8)
    clean = transformer(tokens)
    assert torch.equal(clean, transformer(tokens))
    transformer.train()
    layer = transformer.model.layers[0]
    places = [transformer.model.dropout, layer.dropout]
    assert sum(module.p == 0.5 for module in transformer.modules() if isinstance(module, torch.nn.Dropout)) == 2
    for place in places:
        place.p = 0.0  # type: ignore[union-attr]
    assert not torch.allclose(clean, transformer(tokens))  # attention probabilities still drop
    layer.self_attn.dropout = 0.0  # type: ignore[union-attr]
    torch.testing.assert_close(clean, transformer(tokens))


def test_meaningless_combinations_are_refused() -> None:
    transformer = random_transformer()
    tokens = random_tokens(1, 6)
    with pytest.raises(ValueError, match="document ids"):
        transformer(tokens, document_ids_BL=torch.zeros_like(tokens), kv_cache=transformer.new_cache(1, 6))
    with pytest.raises(ValueError, match=r"shape \(1, 5\), expected \(1, 6\)"):
        transformer(tokens, attention_mask_BL=torch.ones(1, 5))
    with pytest.raises(ValueError, match="left only"):
        transformer(tokens, attention_mask_BL=torch.tensor([[1, 1, 0, 1, 1, 1]]))
    with pytest.raises(RuntimeError, match="cache of 5"):
        transformer(tokens, kv_cache=transformer.new_cache(1, 5))
    with pytest.raises(ValueError, match="num_kv_heads"):
        TransformerConfig.model_validate({**CONFIG.model_dump(), "num_kv_heads": 3})


def test_padding_row_starts_at_zero() -> None:
    transformer = Transformer(CONFIG)
    transformer.init_weights(pad_token=5)
    norms = transformer.model.embed_tokens.weight.norm(dim=1)
    assert norms[5] == 0
    assert (norms > 0).sum() == 299
    assert transformer.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.05)
