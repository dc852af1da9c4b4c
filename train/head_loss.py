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
    chunk_tokens: int = Field(default=256, ge=1)
    """Tokens at a time, of `chunked` and `torch`: 256 on a CPU, 1,024 or more on a GPU."""


def weighted_nll(
    hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, weights_N: Tensor, config: HeadLossConfig
) -> tuple[Tensor, Tensor]:
    """Hidden states, labels and their weights -> the weighted sum of negative log-likelihoods, and each one of them.

    Only the sum carries gradients; both are float32. With `chunked` its gradients are made along with it, in one pass.
    """
    if config.kind == "chunked" and torch.is_grad_enabled():
        total, nll_N = _WeightedNll.apply(hidden_ND, head_VD, labels_N, weights_N.float(), config.chunk_tokens)  # type: ignore[no-untyped-call]
        return total, nll_N
    nll_N = token_nll(hidden_ND, head_VD, labels_N, config)
    return (nll_N * weights_N).sum(), nll_N.detach()


def token_nll(hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, config: HeadLossConfig) -> Tensor:
    """Hidden states and labels -> the negative log-likelihood of each label, (N,) float32, with gradients.

    With `chunked` the backward pass works logits out again: what each token counts is not known before.

    Raises: ConfigError if `liger` cannot run here.
    """
    if config.kind == "chunked":
        out: Tensor = _TokenNll.apply(hidden_ND, head_VD, labels_N, config.chunk_tokens)  # type: ignore[no-untyped-call]
        return out
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
        ctx: Any, hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, weights_N: Tensor, chunk_tokens: int
    ) -> tuple[Tensor, Tensor]:
        head = _Head(hidden_ND, head_VD, *ctx.needs_input_grad[:2])
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
        return *head.gradients(upstream[0]), None, None, None


class _TokenNll(torch.autograd.Function):
    """Each token's negative log-likelihood; the backward pass works the logits out again."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, chunk_tokens: int) -> Tensor:
        head = _Head(hidden_ND, head_VD, False, False)
        nll_N = torch.empty(len(labels_N), dtype=torch.float32, device=hidden_ND.device)
        for part in head.parts(chunk_tokens):
            nll_N[part] = head.nll(part, labels_N[part])[0]
        ctx.save_for_backward(hidden_ND, head_VD, labels_N)
        ctx.chunk_tokens = chunk_tokens
        return nll_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, head_VD, labels_N = ctx.saved_tensors
        head = _Head(hidden_ND, head_VD, *ctx.needs_input_grad[:2])
        for part in head.parts(ctx.chunk_tokens):
            _, exponentials = head.nll(part, labels_N[part])
            head.add_gradients(part, exponentials, labels_N[part], upstream[0][part])
            del exponentials
        return *head.gradients(), None, None


@dataclass(frozen=True)
class _Exponentials:
    """Of logits less their largest (C, V), and their sums (C, 1): what probabilities are made of."""

    terms_CV: Tensor
    sums_C1: Tensor


class _Head:
    """Hidden states before a head: logits of some of them, and gradients added up, those of the head in float32."""

    def __init__(self, hidden_ND: Tensor, head_VD: Tensor, wants_hidden: bool, wants_head: bool) -> None:
        self._hidden_ND, self._dtype = hidden_ND.detach(), head_VD.dtype
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
        label_C1 = logits_CV.gather(1, labels_C.unsqueeze(1))
        terms_CV = logits_CV.sub_(largest_C1).exp_()
        sums_C1 = terms_CV.sum(dim=1, keepdim=True)
        return (largest_C1 + sums_C1.log() - label_C1).squeeze(1), _Exponentials(terms_CV, sums_C1)

    def add_gradients(self, part: slice, exponentials: _Exponentials, labels_C: Tensor, scale_C: Tensor) -> None:
        """Adds what these tokens give, each times its scale. Overwrites the exponentials."""
        if self._to_hidden_ND is None and self._to_head_VD is None:
            return
        scale_C1, labels_C1 = scale_C.unsqueeze(1), labels_C.unsqueeze(1)
        slopes_CV = exponentials.terms_CV.mul_(scale_C1 / exponentials.sums_C1)
        slopes_CV.scatter_(1, labels_C1, slopes_CV.gather(1, labels_C1) - scale_C1)
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
