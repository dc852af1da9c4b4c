"""The loss of the head against float64, whatever the dtype, the chunks and the way it is worked out."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from schemas.errors import ConfigError
from train.head_loss import HeadLossConfig, token_nll, weighted_nll

WAYS = [
    HeadLossConfig(chunk_tokens=7),
    HeadLossConfig(chunk_tokens=1000),
    HeadLossConfig(kind="whole"),
    HeadLossConfig(kind="torch", chunk_tokens=7),
]


def make(
    num: int, vocab: int, dtype: torch.dtype, seed: int = 0, dim: int = 48
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, a head, labels and weights, some of them zero; a few labels are likely."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num, dim, generator=generator)
    head = torch.randn(vocab, dim, generator=generator) * 0.3
    labels = torch.randint(0, vocab, (num,), generator=generator)
    labels[: num // 2] = (hidden @ head.T).argmax(1)[: num // 2]
    weights = torch.tensor([0.0, 0.5, 1.0])[torch.randint(0, 3, (num,), generator=generator)]
    return hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_(), labels, weights


def truth(hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Everything in float64: the sum, each token's share of it unweighted, and gradients of hidden states and head."""
    wide = [part.detach().double().requires_grad_() for part in (hidden, head)]
    nll = F.cross_entropy(wide[0] @ wide[1].T, labels, reduction="none")
    total = (nll * weights.double()).sum()
    to_hidden, to_head = torch.autograd.grad(total, wide)
    return total.detach(), nll.detach(), to_hidden, to_head


def off(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way.kind}-{way.chunk_tokens}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_and_gradients_are_those_of_float64(way: HeadLossConfig, dtype: torch.dtype) -> None:
    hidden, head, labels, weights = make(100, 999, dtype)
    total, nll, *expected = truth(hidden, head, labels, weights)
    found, each = weighted_nll(hidden, head, labels, weights, way)
    assert found.dtype == each.dtype == torch.float32
    rounds_losses = dtype == torch.bfloat16 and way.kind != "chunked"
    assert found.item() == pytest.approx(total.item(), rel=1e-2 if rounds_losses else 1e-5)
    torch.testing.assert_close(each.double(), nll, rtol=0, atol=0.05 if rounds_losses else 1e-4)
    gradients = torch.autograd.grad(found, (hidden, head))
    assert [gradient.dtype for gradient in gradients] == [dtype, dtype]
    for gradient, true in zip(gradients, expected, strict=True):
        assert off(gradient, true) < (1e-5 if dtype == torch.float32 else 5e-3 if rounds_losses else 3e-3)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way.kind}-{way.chunk_tokens}")
def test_tokens_may_count_by_what_becomes_of_their_sum(way: HeadLossConfig) -> None:
    hidden, head, labels, weights = make(60, 300, torch.float32)

    def objective(nll: Tensor) -> Tensor:
        return F.logsigmoid((nll[:30] * weights[:30]).sum() - nll[30:].sum())  # as preferences use them

    found = torch.autograd.grad(objective(token_nll(hidden, head, labels, way)), (hidden, head))
    logits = hidden @ head.T
    expected = torch.autograd.grad(objective(F.cross_entropy(logits, labels, reduction="none")), (hidden, head))
    for gradient, true in zip(found, expected, strict=True):
        assert off(gradient, true.double()) < 1e-5


def test_a_picture_in_bfloat16_keeps_its_log_probability() -> None:
    hidden, head, labels, _ = make(8190, 4096, torch.bfloat16)
    _, nll, *_ = truth(hidden, head, labels, torch.ones(8190))
    with torch.no_grad():
        ours = token_nll(hidden, head, labels, HeadLossConfig()).double().sum()
        rounded = token_nll(hidden, head, labels, HeadLossConfig(kind="whole")).double().sum()
    assert abs(ours - nll.sum()) < 0.01
    assert abs(rounded - nll.sum()) > 0.01  # why logits are worked out in float32


@settings(max_examples=60, deadline=None)
@given(
    num=st.integers(1, 40),
    vocab=st.integers(2, 60),
    chunk=st.integers(1, 50),
    seed=st.integers(0, 2**31),
    size=st.floats(0.1, 60.0),
)
def test_chunks_change_nothing(num: int, vocab: int, chunk: int, seed: int, size: float) -> None:
    hidden, head, labels, weights = make(num, vocab, torch.float32, seed, dim=6)
    hidden = (hidden.detach() * size).requires_grad_()
    total, _, *expected = truth(hidden, head, labels, weights)
    found, _ = weighted_nll(hidden, head, labels, weights, HeadLossConfig(chunk_tokens=chunk))
    assert found.item() == pytest.approx(total.item(), rel=1e-5, abs=1e-5)
    for gradient, true in zip(torch.autograd.grad(found * 3, (hidden, head)), expected, strict=True):
        torch.testing.assert_close(gradient.double(), 3 * true, rtol=1e-4, atol=1e-4 * size)


def test_a_frozen_head_costs_no_gradient() -> None:
    hidden, head, labels, weights = make(20, 50, torch.float32)
    _, _, expected, _ = truth(hidden, head, labels, weights)
    weighted_nll(hidden, head.detach(), labels, weights, HeadLossConfig())[0].backward()
    assert hidden.grad is not None
    assert off(hidden.grad, expected) < 1e-5


def test_what_was_made_in_one_pass_is_used_once() -> None:
    total, _ = weighted_nll(*make(20, 50, torch.float32), HeadLossConfig())
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="token_nll"):
        total.backward()


def test_liger_says_that_it_needs_a_gpu() -> None:
    with pytest.raises(ConfigError, match="needs a GPU"):
        token_nll(*make(4, 5, torch.float32)[:3], HeadLossConfig(kind="liger"))


@pytest.mark.gpu
@pytest.mark.parametrize("way", [*WAYS, HeadLossConfig(kind="liger")], ids=lambda way: f"{way.kind}-{way.chunk_tokens}")
def test_on_a_gpu_too(way: HeadLossConfig) -> None:
    if way.kind == "liger":
        pytest.importorskip("liger_kernel")
    hidden, head, labels, weights = (
        part.detach().cuda().requires_grad_(part.requires_grad) for part in make(100, 999, torch.bfloat16)
    )
    total, _, *expected = truth(hidden, head, labels, weights)
    found, _ = weighted_nll(hidden, head, labels, weights, way)
    assert found.item() == pytest.approx(total.item(), rel=1e-5 if way.kind == "chunked" else 1e-2)
    for gradient, true in zip(torch.autograd.grad(found, (hidden, head)), expected, strict=True):
        assert off(gradient, true) < 5e-3
