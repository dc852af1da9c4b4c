"""Answers in text: about an image, a clip, or nothing but the question. Only text ids and EOS may come.

Shapes: B prompts, L new tokens, V ids that may come next, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import Field

from model.sampling import DrawConfig, choose, place_noise
from model.weights import LanguageModel
from schemas.document import Tokens
from schemas.errors import ConfigError


class AnswerConfig(DrawConfig):
    """How answers are chosen; greedy and up to 1024 tokens by default, as published."""

    temperature: float = Field(default=0.0, ge=0)
    max_new_tokens: int = Field(default=1024, ge=1)


@dataclass(frozen=True)
class Answer:
    """The text, whether the model ended it itself (or ran into the limit), and the tokens it chose."""

    text: str
    is_complete: bool
    tokens: tuple[int, ...]


@torch.no_grad()
def generate_text(
    lm: LanguageModel, prompts: Sequence[Tokens], config: AnswerConfig, *, seeds: Sequence[int] | None = None
) -> list[Answer]:
    """Prompts (`chat_prompt`, or a document up to its caption) -> an answer to each, in one batch.

    A seed for each prompt decides its draws, whatever else is in the batch; 0 for all unless given.

    Raises: ConfigError if a prompt leaves no room for an answer in the model's context; RuntimeError in train mode.
    """
    if lm.transformer.training:
        raise RuntimeError("the transformer is in train mode, expected eval mode: call .eval() first")
    if not prompts:
        return []
    longest, limit = max(map(len, prompts)), lm.transformer.config.max_position_embeddings
    if longest >= limit:
        raise ConfigError(f"found a prompt of {longest} tokens, expected fewer than {limit}, the model's context")
    num_new = min(config.max_new_tokens, limit - longest)
    seeds = seeds or [0] * len(prompts)
    if len(seeds) != len(prompts):
        raise ValueError(f"found {len(seeds)} seeds for {len(prompts)} prompts, expected one each")
    answers = _decode(lm, [prompt.tolist() for prompt in prompts], seeds, num_new, config)
    return [_answer(lm, answer) for answer in answers]


def _answer(lm: LanguageModel, tokens: list[int]) -> Answer:
    is_complete = tokens[-1] == lm.vocabulary.eos
    return Answer(lm.text.decode(tokens[:-1] if is_complete else tokens), is_complete, tuple(tokens))


def _decode(
    lm: LanguageModel, prompts: list[list[int]], seeds: Sequence[int], num_new: int, config: AnswerConfig
) -> list[list[int]]:
    transformer, vocabulary = lm.transformer, lm.vocabulary
    device = transformer.lm_head.weight.device
    width = max(map(len, prompts))
    tokens_BL = torch.tensor([prompt + [vocabulary.pad] * (width - len(prompt)) for prompt in prompts], device=device)
    ends = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
    cache = transformer.new_cache(len(prompts), width + num_new)
    answers: list[list[int]] = [[] for _ in prompts]
    active = list(range(len(prompts)))
    for place in range(num_new):
        hidden_BLD = transformer.hidden(tokens_BL, kv_cache=cache)
        cache.forget((hidden_BLD.shape[1] - 1 - ends).tolist())
        scores_BV = transformer.logits(hidden_BLD[torch.arange(len(ends)), ends], slice(0, vocabulary.eos + 1))
        scores_BV[:, lm.text.num_text : vocabulary.eos] = -torch.inf
        noise_BV = None
        if config.temperature > 0:
            noise_BV = torch.stack([place_noise(seeds[row], place, vocabulary.eos + 1) for row in active]).to(device)
        chosen = choose(scores_BV, noise_BV, config).tolist()
        for row, token in zip(active, chosen, strict=True):
            answers[row].append(token)
        going = [index for index, token in enumerate(chosen) if token != vocabulary.eos]
        if not going:
            break
        if len(going) < len(active):
            cache.select(going)
            active = [active[index] for index in going]
        tokens_BL = torch.tensor([[chosen[index]] for index in going], device=device)
        ends = torch.zeros(len(going), dtype=torch.int64, device=device)
    return answers
