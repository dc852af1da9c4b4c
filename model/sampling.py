"""Scores of the next token to a choice: guidance, temperature, top-k, top-p, and a draw that a seed decides.

Shapes: R requests, V ids that may come next.
"""

import torch
from pydantic import Field
from torch import Tensor

from schemas.recipe import Config

EMU3_NEGATIVE_PROMPT = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)


class DrawConfig(Config):
    """How one of the scored tokens is chosen.

    temperature: 0 always takes the best token.
    top_k: how many of the best tokens may be drawn; None for all.
    top_p: the smallest set of best tokens with at least this probability may be drawn.
    """

    temperature: float = Field(default=1.0, ge=0)
    top_k: int | None = Field(default=None, ge=1)
    top_p: float = Field(default=1.0, gt=0, le=1)


class SamplingConfig(DrawConfig):
    """How codes are chosen. The defaults are the published ones; the paper's evaluations use top_k 16384.

    guidance: 1 is off, and costs half; the paper's evaluations use 5 and 5.5.
    negative_prompt: what guidance steers away from. Published demonstrations use `EMU3_NEGATIVE_PROMPT`; the empty
        text is what models see in training when captions are dropped.
    """

    top_k: int | None = Field(default=2048, ge=1)
    guidance: float = Field(default=3.0, ge=0)
    negative_prompt: str = ""


def guide(conditional_RV: Tensor, unconditional_RV: Tensor, guidance: float) -> Tensor:
    """Logits with and without the prompt -> guided scores u + g * (c - u) of their log-probabilities.

    The logits may be of a part of the vocabulary: leaving ids out shifts all of a row's scores alike.
    """
    conditional_RV, unconditional_RV = conditional_RV.log_softmax(dim=-1), unconditional_RV.log_softmax(dim=-1)
    return torch.lerp(unconditional_RV, conditional_RV, guidance)


def keep_likely(scores_RV: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """Scores -> the same, -inf outside the `top_k` best and outside the smallest set of probability `top_p`."""
    if top_k is not None and top_k < scores_RV.shape[-1]:
        lowest = scores_RV.topk(top_k, dim=-1).values[..., -1:]
        scores_RV = scores_RV.masked_fill(scores_RV < lowest, -torch.inf)
    if top_p < 1:
        ordered, order = scores_RV.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities  # 0 for the best, which therefore always stays
        drop = torch.zeros_like(scores_RV, dtype=torch.bool).scatter(-1, order, before >= top_p)
        scores_RV = scores_RV.masked_fill(drop, -torch.inf)
    return scores_RV


def choose(scores_RV: Tensor, uniforms_R: Tensor, config: DrawConfig) -> Tensor:
    """Scores and one number in [0, 1) each -> the chosen index of each row, int64.

    The number is looked up on the cumulative distribution, so a row's choice depends on its own number and scores.
    """
    if config.temperature == 0:
        return scores_RV.argmax(dim=-1)
    scores_RV = keep_likely(scores_RV / config.temperature, config.top_k, config.top_p)
    # Float64: over 32,768 ids a float32 sum is off by as much as a rare id weighs.
    cumulative_RV = scores_RV.double().softmax(dim=-1).cumsum(dim=-1)
    # A hair below 1, so that rounding never looks past the last possible id.
    targets_R1 = uniforms_R.double().clamp_max(1 - 2**-40).unsqueeze(-1) * cumulative_RV[..., -1:]
    return torch.searchsorted(cumulative_RV, targets_R1, right=True).squeeze(-1)
