"""The output head and its cross-entropy in one, so that logits over a vocabulary of 184,622 never exist whole.

Logits are worked out for some tokens at a time, in float32 whatever the weights are: rounded to bfloat16 the
log-probability of a picture of 8,190 tokens is off by a nat and more, and preferences are made of such.

Shapes: N tokens, C of them at a time, D hidden, V vocabulary.
"""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.autograd.function import once_differentiable

from schemas.errors import ConfigError
from schemas.recipe import Config


class HeadLossConfig(Config):
    """How the loss of the head is worked out. All ways give the same loss, up to rounding.

    `chunked` is ours; `torch` is `linear_cross_entropy`, which rounds the loss of each token to the dtype of the weights;
    `liger` is Liger's fused kernel and needs a GPU and the package `liger-kernel`; `whole` makes all logits at once.
    """

    kind: Literal["chunked", "torch", "liger", "whole"] = "chunked"
    chunk_tokens: int = Field(default=128, ge=1)
    """Tokens at a time, of `chunked` and `torch`: 128 on a CPU, 1,024 or more on a GPU."""


@dataclass(frozen=True)
class VocabularyShard:
    """A head of which each worker of a group holds some rows, this one those from `first` on. `chunked` alone knows it.

    All workers of the group ask for the same tokens and find the same loss. What each finds as the gradient of hidden states
    is its part of a sum.
    """

    first: int
    group: dist.ProcessGroup


def weighted_nll(
    hidden_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    weights_N: Tensor,
    config: HeadLossConfig,
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, Tensor]:
    """Hidden states, labels and their weights -> the weighted sum of negative log-likelihoods, and each one of them.

    Only the sum carries gradients; both are float32. With `chunked` its gradients are made along with it, in one pass.
    """
    if config.kind == "chunked" and torch.is_grad_enabled():
        total, nll_N = _WeightedNll.apply(hidden_ND, head_VD, labels_N, weights_N.float(), config.chunk_tokens, shard)  # type: ignore[no-untyped-call]
        return total, nll_N
    nll_N = token_nll(hidden_ND, head_VD, labels_N, config, shard)
    return (nll_N * weights_N).sum(), nll_N.detach()


def token_nll(
    hidden_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    config: HeadLossConfig,
    shard: VocabularyShard | None = None,
) -> Tensor:
    """Hidden states and labels -> the negative log-likelihood of each label, (N,) float32, with gradients.

    With `chunked` the backward pass works logits out again: what each token counts is not known before.

    Raises: ConfigError if `liger` cannot run here, or the head is shared out and this is not `chunked`.
    """
    if config.kind == "chunked":
        out: Tensor = _TokenNll.apply(hidden_ND, head_VD, labels_N, config.chunk_tokens, shard)  # type: ignore[no-untyped-call]
        return out
    if shard is not None:
        raise ConfigError(
            f"found the head's loss {config.kind!r} and a head shared out over workers, expected 'chunked'"
        )
    if config.kind == "whole":
        return F.cross_entropy(F.linear(hidden_ND, head_VD).float(), labels_N, reduction="none")
    if config.kind == "torch":
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=config.chunk_tokens)
        return F.linear_cross_entropy(hidden_ND, head_VD, labels_N, reduction="none", options=options).float()
    fused = _liger(hidden_ND)(reduction="none", accum_dtype=torch.float32)
    nll_N: Tensor = fused(head_VD, hidden_ND, labels_N)
    return nll_N.float()


def _liger(hidden_ND: Tensor) -> Any:
    if not hidden_ND.is_cuda:
        raise ConfigError(f"the head's loss 'liger' needs a GPU, found tensors on {hidden_ND.device}: use 'chunked'")
    try:
        return importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss
    except ImportError as error:
        raise ConfigError(f"the head's loss 'liger' needs the package liger-kernel ({error}): install it") from None


class _WeightedNll(torch.autograd.Function):
    """The weighted sum with gradients made in the forward pass: logits are worked out once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        labels_N: Tensor,
        weights_N: Tensor,
        chunk_tokens: int,
        shard: VocabularyShard | None,
    ) -> tuple[Tensor, Tensor]:
        head = _Head(hidden_ND, head_VD, shard, *ctx.needs_input_grad[:2])
        nll_N = torch.empty(len(labels_N), dtype=torch.float32, device=hidden_ND.device)
        for part in head.parts(chunk_tokens):
            nll_N[part], exponentials = head.nll(part, labels_N[part])
            head.add_gradients(part, exponentials, labels_N[part], weights_N[part])
            del exponentials  # before the next ones are made
        ctx.head = head
        ctx.mark_non_differentiable(nll_N)
        return (nll_N * weights_N).sum(), nll_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        head, ctx.head = ctx.head, None
        if head is None:
            raise RuntimeError("found a second backward pass through the head's loss, expected one: use token_nll")
        return *head.gradients(upstream[0]), None, None, None, None


class _TokenNll(torch.autograd.Function):
    """Each token's negative log-likelihood; the backward pass works the logits out again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        labels_N: Tensor,
        chunk_tokens: int,
        shard: VocabularyShard | None,
    ) -> Tensor:
        head = _Head(hidden_ND, head_VD, shard, False, False)
        nll_N = torch.empty(len(labels_N), dtype=torch.float32, device=hidden_ND.device)
        for part in head.parts(chunk_tokens):
            nll_N[part] = head.nll(part, labels_N[part])[0]
        ctx.save_for_backward(hidden_ND, head_VD, labels_N)
        ctx.chunk_tokens, ctx.shard = chunk_tokens, shard
        return nll_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, head_VD, labels_N = ctx.saved_tensors
        head = _Head(hidden_ND, head_VD, ctx.shard, *ctx.needs_input_grad[:2])
        for part in head.parts(ctx.chunk_tokens):
            _, exponentials = head.nll(part, labels_N[part])
            head.add_gradients(part, exponentials, labels_N[part], upstream[0][part])
            del exponentials
        return *head.gradients(), None, None, None


@dataclass(frozen=True)
class _Exponentials:
    """Of logits less their largest (C, V), and their sums (C, 1): what probabilities are made of."""

    terms_CV: Tensor
    sums_C1: Tensor


class _Head:
    """Hidden states before a head: logits of some of them, and gradients added up, those of the head in float32."""

    def __init__(
        self,
        hidden_ND: Tensor,
        head_VD: Tensor,
        shard: VocabularyShard | None,
        wants_hidden: bool,
        wants_head: bool,
    ) -> None:
        self._hidden_ND, self._dtype, self._shard = hidden_ND.detach(), head_VD.dtype, shard
        # A GPU multiplies bfloat16 into float32. A CPU rounds what it multiplies, unless the factors are float32.
        self._head_VD = head_VD.detach() if head_VD.is_cuda else head_VD.detach().float()
        self._to_hidden_ND = torch.empty_like(self._hidden_ND) if wants_hidden else None
        self._to_head_VD = torch.zeros_like(self._head_VD, dtype=torch.float32) if wants_head else None

    def parts(self, chunk_tokens: int) -> Iterator[slice]:
        """Which tokens are worked on together."""
        for start in range(0, len(self._hidden_ND), chunk_tokens):
            yield slice(start, min(start + chunk_tokens, len(self._hidden_ND)))

    def nll(self, part: slice, labels_C: Tensor) -> tuple[Tensor, _Exponentials]:
        """Negative log-likelihoods (C,), and what their gradients are made of."""
        hidden_CD = self._hidden_ND[part]
        if self._head_VD.dtype == torch.float32:
            logits_CV = hidden_CD.float() @ self._head_VD.T
        else:
            logits_CV = torch.mm(hidden_CD, self._head_VD.T, out_dtype=torch.float32)
        largest_C1 = logits_CV.amax(dim=1, keepdim=True)
        rows_C1, here_C1 = self._rows(labels_C)
        label_C1 = logits_CV.gather(1, rows_C1) * here_C1
        if self._shard is not None:
            dist.all_reduce(largest_C1, dist.ReduceOp.MAX, self._shard.group)
        terms_CV = logits_CV.sub_(largest_C1).exp_()
        sums_C1 = terms_CV.sum(dim=1, keepdim=True)
        if self._shard is not None:
            both = torch.cat([sums_C1, label_C1])
            dist.all_reduce(both, group=self._shard.group)
            sums_C1, label_C1 = both.chunk(2)
        return (largest_C1 + sums_C1.log() - label_C1).squeeze(1), _Exponentials(terms_CV, sums_C1)

    def _rows(self, labels_C: Tensor) -> tuple[Tensor, Tensor]:
        """Labels -> the rows of the head that this worker holds for them, row 0 for those it does not hold, and 1 where it
        holds them, both (C, 1).
        """
        if self._shard is None:
            return labels_C.unsqueeze(1), torch.ones_like(labels_C, dtype=torch.float32).unsqueeze(1)
        rows_C1 = (labels_C - self._shard.first).unsqueeze(1)
        here_C1 = (rows_C1 >= 0) & (rows_C1 < len(self._head_VD))
        return rows_C1.where(here_C1, 0), here_C1.float()

    def add_gradients(self, part: slice, exponentials: _Exponentials, labels_C: Tensor, scale_C: Tensor) -> None:
        """Adds what these tokens give, each times its scale. Overwrites the exponentials."""
        if self._to_hidden_ND is None and self._to_head_VD is None:
            return
        scale_C1, (rows_C1, here_C1) = scale_C.unsqueeze(1), self._rows(labels_C)
        slopes_CV = exponentials.terms_CV.mul_(scale_C1 / exponentials.sums_C1)
        slopes_CV.scatter_(1, rows_C1, slopes_CV.gather(1, rows_C1) - scale_C1 * here_C1)
        slopes_CV = slopes_CV.to(self._head_VD.dtype)
        if self._to_hidden_ND is not None:
            self._to_hidden_ND[part] = (slopes_CV @ self._head_VD).to(self._to_hidden_ND.dtype)
        if self._to_head_VD is None:
            return
        hidden_CD = self._hidden_ND[part]
        if slopes_CV.dtype == torch.float32:
            self._to_head_VD.addmm_(slopes_CV.T, hidden_CD.float())
        else:
            torch.addmm(self._to_head_VD, slopes_CV.T, hidden_CD, out_dtype=torch.float32, out=self._to_head_VD)

    def gradients(self, factor: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """Those of hidden states and head, times a number, in their own dtypes. To be called once."""
        found = self._to_hidden_ND, self._to_head_VD
        for gradient in found:
            if gradient is not None and factor is not None:
                gradient.mul_(factor)
        return found[0], None if found[1] is None else found[1].to(self._dtype)
