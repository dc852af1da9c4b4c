"""The language model: a Llama-style decoder over text, special and vision tokens.

Shapes: B batch, L tokens, S tokens seen and new, D hidden, I inside the MLP, V vocabulary.
"""

from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.attention import AttentionPlan, SelfAttention, plan_attention, plan_cached
from model.kv_cache import KvCache
from model.rope import rotary_tables
from schemas.recipe import Config

INIT_STD = 0.02
MAX_STEP_LEN = 64  # new tokens of a step of decoding; what is longer is a prompt, of any length


class TransformerConfig(Config):
    """Numbers that fix the architecture. The defaults are those that all sizes share.

    `dropout` acts in four places: on embeddings, attention probabilities, and the outputs of attention and MLP.
    Paper: Emu3 report, section 2.3.
    """

    vocab_size: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    num_layers: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=2, multiple_of=2)
    rope_theta: float = Field(default=1_000_000.0, gt=0)
    rms_norm_eps: float = Field(default=1e-5, gt=0)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    max_position_embeddings: int = Field(default=131_072, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"found num_heads {self.num_heads}, expected a multiple of num_kv_heads {self.num_kv_heads}"
            )
        return self


TRANSFORMER_SIZES = MappingProxyType(
    {
        "8b": TransformerConfig(
            vocab_size=184_622,
            hidden_size=4096,
            intermediate_size=14_336,
            num_layers=32,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
        ),
        "tiny": TransformerConfig(
            vocab_size=1024 + 211 + 512,
            hidden_size=192,
            intermediate_size=512,
            num_layers=6,
            num_heads=6,
            num_kv_heads=2,
            head_dim=32,
            dropout=0.0,  # a model this small does not overfit before it fits
            max_position_embeddings=4096,
        ),
    }
)


def transformer_size(name: str, vocab_size: int | None = None) -> TransformerConfig:
    """A size's name, and the vocabulary's size where it differs -> the config.

    Raises: KeyError if there is no such size.
    """
    config = TRANSFORMER_SIZES[name]
    return config if vocab_size is None else config.model_copy(update={"vocab_size": vocab_size})


class _RmsNormed(torch.autograd.Function):
    """A norm that keeps its input and one number a token for the backward pass, where the rest is worked out again."""

    @staticmethod
    def forward(ctx: Any, x_BLD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        wide_BLD = x_BLD.float()
        scale_BL1 = torch.rsqrt(wide_BLD.square().mean(dim=-1, keepdim=True) + eps)
        ctx.save_for_backward(x_BLD, weight_D, scale_BL1)
        return weight_D * (wide_BLD * scale_BL1).to(x_BLD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_BLD: Tensor) -> tuple[Tensor | None, ...]:
        x_BLD, weight_D, scale_BL1 = ctx.saved_tensors
        normed_BLD = x_BLD.float() * scale_BL1
        to_weight_D = None
        if ctx.needs_input_grad[1]:
            to_weight_D = (slope_BLD * normed_BLD.to(x_BLD.dtype)).sum(dim=tuple(range(slope_BLD.ndim - 1)))
        to_normed_BLD = (slope_BLD * weight_D).float()
        along_BL1 = (to_normed_BLD * normed_BLD).mean(dim=-1, keepdim=True)
        to_x_BLD = (to_normed_BLD - normed_BLD * along_BL1) * scale_BL1
        return to_x_BLD.to(x_BLD.dtype), to_weight_D, None


class _GatedSilu(torch.autograd.Function):
    """`silu(gate) * up`, of which nothing but its two inputs is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate_BLI: Tensor, up_BLI: Tensor) -> Tensor:
        ctx.save_for_backward(gate_BLI, up_BLI)
        return F.silu(gate_BLI) * up_BLI

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_BLI: Tensor) -> tuple[Tensor, Tensor]:
        gate_BLI, up_BLI = ctx.saved_tensors
        to_gate_BLI: Tensor = torch.ops.aten.silu_backward(slope_BLI * up_BLI, gate_BLI)
        return to_gate_BLI, slope_BLI * F.silu(gate_BLI)


class RmsNorm(nn.Module):
    """Root-mean-square norm, worked out in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Hidden states -> normalised ones, in their own dtype."""
        normed: Tensor = _RmsNormed.apply(x_BLD, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return normed


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Hidden states -> hidden states."""
        inner_BLI: Tensor = _GatedSilu.apply(self.gate_proj(x_BLD), self.up_proj(x_BLD))  # type: ignore[no-untyped-call]
        out_BLD: Tensor = self.down_proj(inner_BLI)
        return out_BLD


class DecoderLayer(nn.Module):
    """Attention and MLP, each after a norm and beside a residual path."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, layer)
        self.mlp = Mlp(config)
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x_BLD: Tensor, rotary: tuple[Tensor, Tensor], plan: AttentionPlan, kv_cache: KvCache | None = None
    ) -> Tensor:
        """Hidden states -> hidden states."""
        x_BLD = x_BLD + self.dropout(self.self_attn(self.input_layernorm(x_BLD), rotary, plan, kv_cache))
        out_BLD: Tensor = x_BLD + self.dropout(self.mlp(self.post_attention_layernorm(x_BLD)))
        return out_BLD


class Decoder(nn.Module):
    """Embedding, layers and last norm, under the published prefix `model.`."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_layers))
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, tokens_BL: Tensor, rotary: tuple[Tensor, Tensor], plan: AttentionPlan, kv_cache: KvCache | None
    ) -> Tensor:
        """Tokens -> hidden states after the last norm."""
        x_BLD = self.dropout(self.embed_tokens(tokens_BL))
        for layer in self.layers:
            x_BLD = layer(x_BLD, rotary, plan, kv_cache)
        out_BLD: Tensor = self.norm(x_BLD)
        return out_BLD


class Transformer(nn.Module):
    """Emu3's language model at any size. State-dict keys are those of the published weights (and Llama's)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._step: Callable[..., Tensor] | None = None
        if not self.lm_head.weight.is_meta:
            self.init_weights()

    def init_weights(self, pad_token: int | None = None) -> None:
        """Fresh parameters, in place."""
        with torch.no_grad():
            for name, weight in self.fresh_weights(pad_token):
                self.get_parameter(name).copy_(weight)

    def fresh_weights(self, pad_token: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """Names and fresh parameters, one at a time, drawn from torch's generator on the CPU: normal of standard deviation
        0.02, norms 1, and the padding row, if named, zero.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                weight = torch.empty(module.weight.shape, device="cpu").normal_(std=INIT_STD)
                if module is self.model.embed_tokens and pad_token is not None:
                    weight[pad_token].zero_()
                yield f"{name}.weight", weight
            elif isinstance(module, RmsNorm):
                yield f"{name}.weight", torch.ones(module.weight.shape, device="cpu")

    def forward(
        self,
        tokens_BL: Tensor,
        *,
        positions_BL: Tensor | None = None,
        document_ids_BL: Tensor | None = None,
        kv_cache: KvCache | None = None,
        attention_mask_BL: Tensor | None = None,
    ) -> Tensor:
        """Tokens -> logits of the next token at each place, (B, L, V) float32. Arguments as in `hidden`."""
        hidden_BLD = self.hidden(
            tokens_BL,
            positions_BL=positions_BL,
            document_ids_BL=document_ids_BL,
            kv_cache=kv_cache,
            attention_mask_BL=attention_mask_BL,
        )
        return self.logits(hidden_BLD)

    def hidden(
        self,
        tokens_BL: Tensor,
        *,
        positions_BL: Tensor | None = None,
        document_ids_BL: Tensor | None = None,
        kv_cache: KvCache | None = None,
        attention_mask_BL: Tensor | None = None,
        plan: AttentionPlan | None = None,
    ) -> Tensor:
        """Tokens -> hidden states (B, L, D) that `logits` turns into logits, whole or in chunks.

        document_ids_BL: packed rows. A run of equal ids is a document; attention stays inside it, and positions start
            at 0 in each unless given.
        kv_cache: the tokens come after those in the cache, and are added to it. Rows of unequal length are padded on the
            right, and the padding is forgotten afterwards (`KvCache.forget`).
        attention_mask_BL: 0 on left padding, 1 on tokens. What stands at padded places of the result means nothing.
        plan: who sees whom, if the caller has worked it out; positions are then the caller's too.

        Raises: ValueError for combinations that mean nothing.
        """
        if [document_ids_BL, kv_cache, attention_mask_BL, plan].count(None) < 3:
            raise ValueError("found two of document ids, a cache, an attention mask and a plan, expected one at most")
        if attention_mask_BL is not None and attention_mask_BL.shape != tokens_BL.shape:
            found, expected = tuple(attention_mask_BL.shape), tuple(tokens_BL.shape)
            raise ValueError(f"found an attention mask of shape {found}, expected {expected}, that of the tokens")
        if kv_cache is not None:
            plan = plan_cached(kv_cache, tokens_BL.shape[1])
        elif plan is None:
            plan = plan_attention(document_ids_BL, attention_mask_BL)
        if positions_BL is None:
            positions_BL = plan.places_BL
        if positions_BL is None:
            positions_BL = _positions(tokens_BL, document_ids_BL, attention_mask_BL)
        rotary = rotary_tables(positions_BL, self.config.head_dim, self.config.rope_theta)
        is_step = kv_cache is not None and kv_cache.is_static and tokens_BL.shape[1] <= MAX_STEP_LEN
        network = self._compiled_step() if is_step else self.model
        hidden_BLD: Tensor = network(tokens_BL, rotary, plan, kv_cache)
        if kv_cache is not None:
            kv_cache.advance(tokens_BL.shape[1])
        return hidden_BLD

    def logits(self, hidden_BLD: Tensor, rows: slice | None = None) -> Tensor:
        """Hidden states -> float32 logits, of all ids or only of a range of them (when nothing else may come next)."""
        if rows is None:
            out: Tensor = self.lm_head(hidden_BLD)
            return out.float()
        return F.linear(hidden_BLD, self.lm_head.weight[rows]).float()

    def _compiled_step(self) -> Callable[..., Tensor]:
        """The decoder compiled for steps of decoding: once for each number of rows and of new tokens."""
        if self._step is None:
            self._step = torch.compile(self.model, dynamic=False)
        return self._step

    def new_cache(self, batch_size: int, max_length: int, *, is_static: bool = False) -> KvCache:
        """An empty cache for these many rows and tokens, on the device and in the dtype of the weights. With a static one
        steps of up to `MAX_STEP_LEN` tokens are compiled.
        """
        weight, config = self.lm_head.weight, self.config
        return KvCache(
            config.num_layers,
            batch_size,
            config.num_kv_heads,
            max_length,
            config.head_dim,
            device=weight.device,
            dtype=weight.dtype,
            is_static=is_static,
        )


def _positions(tokens_BL: Tensor, document_ids_BL: Tensor | None, attention_mask_BL: Tensor | None) -> Tensor:
    if document_ids_BL is not None:
        return document_positions(document_ids_BL)
    if attention_mask_BL is not None:
        return (attention_mask_BL.long().cumsum(dim=1) - 1).clamp_min(0)
    return torch.arange(tokens_BL.shape[1], device=tokens_BL.device).expand_as(tokens_BL)


def document_positions(document_ids_BL: Tensor) -> Tensor:
    """Document ids -> the place of each token in its document, from 0 (B, L)."""
    length = document_ids_BL.shape[1]
    places_BL = torch.arange(length, device=document_ids_BL.device).expand_as(document_ids_BL)
    starts = torch.ones_like(document_ids_BL, dtype=torch.bool)
    starts[:, 1:] = document_ids_BL[:, 1:] != document_ids_BL[:, :-1]
    return places_BL - torch.where(starts, places_BL, 0).cummax(dim=1).values
