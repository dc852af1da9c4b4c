"""Causal attention with grouped keys and values, over whole rows, packed documents, padded rows or a cache.

Shapes: B batch, L new tokens, S tokens in all, D hidden, H query heads, K key-value heads, C channels of a head.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from model.kv_cache import KvCache
from model.rope import rotate

if TYPE_CHECKING:
    from model.transformer import TransformerConfig


@dataclass(frozen=True)
class Span:
    """Tokens start..end-1 of one row, which see one another and nothing else."""

    row: int
    start: int
    end: int


@dataclass(frozen=True)
class Piece:
    """New tokens side by side that are the last `num_keys` of a document's first ones: they see these, each up to itself."""

    length: int
    document: int
    num_keys: int


@dataclass(frozen=True)
class SharedRows:
    """Packed rows whose tokens are dealt out to devices. A device asks for its own, of the keys and values of all.

    `gather`: those of its own tokens (B, L, K, C) -> those of whole rows, in order. `document_lens`: documents of the whole
    rows laid end to end. `pieces`: its own tokens, rows laid end to end.
    """

    gather: Callable[[Tensor], Tensor]
    document_lens: list[int]
    pieces: list[Piece]
    masks: tuple[Tensor | None, ...] = field(init=False)
    """Of each piece, None where the plain causal kernel does. Made here: a layer that is recomputed cannot make them."""

    def __post_init__(self) -> None:
        masks = [None if p.length == p.num_keys else causal_lower_right(p.length, p.num_keys) for p in self.pieces]
        object.__setattr__(self, "masks", tuple(masks))


@dataclass(frozen=True)
class AttentionPlan:
    """Who sees whom, worked out once for all layers.

    `spans`: packed documents or unpadded parts, each causal within itself. `shared`: packed documents, over devices.
    `mask_B1LS`: True where a query sees a key. None of them: every row is causal from its first token. `places_BL`: where a
    cache takes the new tokens.
    """

    spans: tuple[Span, ...] | None = None
    shared: SharedRows | None = None
    mask_B1LS: Tensor | None = None
    causal: bool = True
    places_BL: Tensor | None = None

    @property
    def is_packed(self) -> bool:
        """Whether rows fall into parts that see nothing of one another."""
        return self.spans is not None or self.shared is not None


def plan_attention(document_ids_BL: Tensor | None, attention_mask_BL: Tensor | None) -> AttentionPlan:
    """What the caller knows of whole rows -> the cheapest way to attend that is exact.

    Spans run the plain causal kernel on each document: no L x L mask, however long the row, and no work across documents.
    """
    if document_ids_BL is not None:
        return AttentionPlan(spans=_document_spans(document_ids_BL))
    if attention_mask_BL is not None and not bool(attention_mask_BL.all()):
        return AttentionPlan(spans=_unpadded_spans(attention_mask_BL))
    return AttentionPlan()


def plan_cached(kv_cache: KvCache, num_new: int) -> AttentionPlan:
    """New tokens after those in the cache -> each sees its row's earlier tokens and itself."""
    places_BL = kv_cache.places(num_new)
    if kv_cache.is_static:
        seen_S = torch.arange(kv_cache.max_length, device=places_BL.device)
        return AttentionPlan(mask_B1LS=places_BL[:, None, :, None] >= seen_S, causal=False, places_BL=places_BL)
    if not any(kv_cache.lengths):
        return AttentionPlan(places_BL=places_BL)
    if num_new == 1 and min(kv_cache.lengths) == max(kv_cache.lengths):
        return AttentionPlan(causal=False, places_BL=places_BL)  # one query that sees everything
    seen_S = torch.arange(max(kv_cache.lengths) + num_new, device=places_BL.device)
    return AttentionPlan(mask_B1LS=places_BL[:, None, :, None] >= seen_S, causal=False, places_BL=places_BL)


def _document_spans(document_ids_BL: Tensor) -> tuple[Span, ...]:
    spans = []
    changes_BL = (document_ids_BL[:, 1:] != document_ids_BL[:, :-1]).cpu()
    for row, changes_L in enumerate(changes_BL):
        edges = [0, *(changes_L.nonzero().squeeze(1) + 1).tolist(), document_ids_BL.shape[1]]
        spans += [Span(row, start, end) for start, end in itertools.pairwise(edges)]
    return tuple(spans)


def _unpadded_spans(attention_mask_BL: Tensor) -> tuple[Span, ...]:
    mask_BL = attention_mask_BL.bool().cpu()
    length = mask_BL.shape[1]
    starts = (length - mask_BL.sum(dim=1)).tolist()
    if not torch.equal(mask_BL, torch.arange(length).unsqueeze(0) >= torch.tensor(starts).unsqueeze(1)):
        raise ValueError(
            "found an attention mask with padding between or after tokens, expected padding on the left only"
        )
    return tuple(Span(row, start, length) for row, start in enumerate(starts) if start < length)


class SelfAttention(nn.Module):
    """Grouped-query attention without biases. Attribute names are the published state-dict keys."""

    def __init__(self, config: "TransformerConfig", layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.dropout = config.dropout
        query_dim, key_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_dim, bias=False)
        self.o_proj = nn.Linear(query_dim, config.hidden_size, bias=False)

    def forward(
        self, x_BLD: Tensor, rotary: tuple[Tensor, Tensor], plan: AttentionPlan, kv_cache: KvCache | None
    ) -> Tensor:
        """Hidden states -> what each token gathered from those that it sees."""
        # -1 and not num_heads: under tensor parallelism a device holds some of the heads.
        query_BLHC = rotate(torch.unflatten(self.q_proj(x_BLD), -1, (-1, self.head_dim)), *rotary)
        key_BLKC = rotate(torch.unflatten(self.k_proj(x_BLD), -1, (-1, self.head_dim)), *rotary)
        value_BLKC = torch.unflatten(self.v_proj(x_BLD), -1, (-1, self.head_dim))
        query, key, value = (part.transpose(1, 2) for part in (query_BLHC, key_BLKC, value_BLKC))
        if kv_cache is not None:
            assert plan.places_BL is not None
            key, value = kv_cache.update(self.layer, key, value, plan.places_BL)
        if plan.is_packed:
            mixed_BHLC = self._attend_packed(query_BLHC, key_BLKC, value_BLKC, plan)
        else:
            mixed_BHLC = self._attend(query, key, value, plan.mask_B1LS, plan.causal)
        out_BLD: Tensor = self.o_proj(mixed_BHLC.transpose(1, 2).flatten(2))
        return out_BLD

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, enable_gqa=grouped
        )

    # Not compiled: every batch has other documents.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _attend_packed(self, query_BLHC: Tensor, key_BLKC: Tensor, value_BLKC: Tensor, plan: AttentionPlan) -> Tensor:
        if plan.shared is not None:
            return self._attend_shared(query_BLHC, key_BLKC, value_BLKC, plan.shared)
        assert plan.spans is not None
        batch_size, length = query_BLHC.shape[:2]
        sizes, attended = _stretches(plan.spans, batch_size, length)
        # Split and joined, not sliced and written into a buffer: the backward pass stays linear in the number of spans.
        split = [torch.split(part.flatten(0, 1), sizes) for part in (query_BLHC, key_BLKC, value_BLKC)]
        parts: list[Tensor] = []  # (tokens, H, C) for each stretch of the rows laid end to end
        for query_NHC, key_NKC, value_NKC, attends in zip(*split, attended, strict=True):
            if attends:
                q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (query_NHC, key_NKC, value_NKC))
                parts.append(self._attend(q, k, v, None, True)[0].transpose(0, 1))
            else:
                parts.append(torch.zeros_like(query_NHC))
        rows: Tensor = torch.cat(parts).unflatten(0, (batch_size, length))
        return rows.transpose(1, 2)

    def _attend_shared(self, query_BLHC: Tensor, key_BLKC: Tensor, value_BLKC: Tensor, shared: SharedRows) -> Tensor:
        query_NHC = torch.split(query_BLHC.flatten(0, 1), [piece.length for piece in shared.pieces])
        key_NKC, value_NKC = (
            torch.split(shared.gather(part).flatten(0, 1), shared.document_lens) for part in (key_BLKC, value_BLKC)
        )
        parts: list[Tensor] = []
        for piece, mask, asks in zip(shared.pieces, shared.masks, query_NHC, strict=True):
            seen = (asks, key_NKC[piece.document][: piece.num_keys], value_NKC[piece.document][: piece.num_keys])
            q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in seen)
            parts.append(self._attend(q, k, v, mask, mask is None)[0].transpose(0, 1))
        rows: Tensor = torch.cat(parts).unflatten(0, query_BLHC.shape[:2])
        return rows.transpose(1, 2)


def _stretches(spans: tuple[Span, ...], batch_size: int, length: int) -> tuple[list[int], list[bool]]:
    """Spans -> sizes that cover the rows laid end to end, and which of them are spans; the others are padding, which
    sees nothing and gathers nothing.
    """
    sizes, attended, end = [], [], 0
    for span in spans:
        start = span.row * length + span.start
        if start > end:
            sizes.append(start - end)
            attended.append(False)
        sizes.append(span.end - span.start)
        attended.append(True)
        end = start + sizes[-1]
    if end < batch_size * length:
        sizes.append(batch_size * length - end)
        attended.append(False)
    return sizes, attended
