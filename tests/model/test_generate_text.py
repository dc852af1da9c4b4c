"""Answers: only text comes out, the batch changes nothing, and the end is where the model puts it."""

import numpy as np
import pytest
import torch

from model.generate_text import AnswerConfig, generate_text
from model.text_tokenizer import TinyBpe
from model.weights import LanguageModel
from schemas.chat import chat_prompt
from schemas.document import Tokens, VisionBlock
from schemas.errors import ConfigError
from schemas.vocabulary import Vocabulary
from tests.model.small_lm import random_lm

VOCABULARY = Vocabulary(num_text=300, num_codes=24)  # more text ids than the text tokenizer has
TEXT = TinyBpe.train([], 256)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return random_lm(VOCABULARY, text=TEXT, max_position_embeddings=128)


def prompts() -> list[Tokens]:
    image = VisionBlock("image", np.arange(6).reshape(1, 2, 3))
    return [
        chat_prompt("What?", [image], VOCABULARY, TEXT),
        chat_prompt("Who are you", [], VOCABULARY, TEXT),
        np.array([VOCABULARY.bos], np.uint32),
    ]


@torch.no_grad()
def test_greedy_answers_are_those_of_full_passes(lm: LanguageModel) -> None:
    prompt = prompts()[0]
    answer = generate_text(lm, [prompt], AnswerConfig(max_new_tokens=12))[0]
    ids = prompt.astype(np.int64).tolist()
    written: list[int] = []
    for _ in range(12):
        logits = lm.transformer(torch.tensor([ids + written]))[0, -1]
        allowed = [*range(256), VOCABULARY.eos]
        written.append(allowed[int(logits[allowed].argmax())])
        if written[-1] == VOCABULARY.eos:
            break
    ended = written[-1] == VOCABULARY.eos
    assert (answer.text, answer.is_complete) == (TEXT.decode(written[:-1] if ended else written), ended)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_batch_does_not_change_an_answer(lm: LanguageModel, temperature: float) -> None:
    config = AnswerConfig(temperature=temperature, max_new_tokens=15)
    together = generate_text(lm, prompts(), config, seeds=[1, 2, 3])
    for prompt, seed, answer in zip(prompts(), [1, 2, 3], together, strict=True):
        assert generate_text(lm, [prompt], config, seeds=[seed]) == [answer]


def test_an_answer_ends_with_eos_or_at_the_limit(lm: LanguageModel) -> None:
    weight = lm.transformer.lm_head.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[VOCABULARY.eos] = 0
            weight[:256] = 0  # text and the end are equally likely: some answers end, some do not
        config = AnswerConfig(temperature=1.0, max_new_tokens=60)
        answers = generate_text(lm, prompts()[1:] * 20, config, seeds=list(range(40)))
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert {answer.is_complete for answer in answers} == {True, False}
    assert not any("<|" in answer.text for answer in answers)


def test_a_full_context_ends_the_answer_or_is_refused(lm: LanguageModel) -> None:
    almost = np.concatenate([[VOCABULARY.bos], np.full(125, 65)]).astype(np.uint32)
    with torch.no_grad():
        assert len(generate_text(lm, [almost], AnswerConfig())[0].text.encode("utf-8", "replace")) <= 6
    with pytest.raises(ConfigError, match="fewer than 128"):
        generate_text(lm, [np.append(almost, [65, 65]).astype(np.uint32)], AnswerConfig())
    assert generate_text(lm, [], AnswerConfig()) == []
