"""Scores of the next token to a choice: guidance, temperature, top-k, top-p, and a draw that a seed decides.

Shapes: R requests, V ids that may come next.
"""

import numpy as np
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


def place_noise(seed: int, place: int, num_ids: int) -> Tensor:
    """Gumbel noise of one place of one sample (V,), float32: always the same, whatever was drawn before or beside it."""
    key = np.array([seed % 2**64, place], np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key))
    # Minus the logarithm of an exponential is Gumbel. Never of 0, though the odds are one in 2^53.
    exponentials_V = torch.from_numpy(generator.standard_exponential(num_ids)).float()
    return -exponentials_V.clamp_min_(torch.finfo(torch.float32).tiny).log_()


def choose(scores_RV: Tensor, noise_RV: Tensor | None, config: DrawConfig) -> Tensor:
    """Scores and the noise of each row's place -> the chosen index of each row, int64. Temperature 0 needs no noise.

    The largest sum of score and Gumbel noise is a draw from the scores' distribution. Nothing is summed over the ids, so
    another order of additions inside the network changes a choice only where two sums are as good as equal.
    """
    if config.temperature == 0 or noise_RV is None:
        return scores_RV.argmax(dim=-1)
    scores_RV = keep_likely(scores_RV / config.temperature, config.top_k, config.top_p)
    return (scores_RV + noise_RV).argmax(dim=-1)
