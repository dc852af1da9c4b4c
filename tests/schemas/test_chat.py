"""The chat template against its published form."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.chat import Exchange, Span, chat_prompt, write_chat
from schemas.document import DocumentError, VisionBlock, block_tokens
from schemas.vocabulary import Vocabulary

SMALL = Vocabulary(num_text=256, num_codes=64)
IMAGE = VisionBlock("image", np.arange(6).reshape(1, 2, 3))
CLIP = VisionBlock("video", np.arange(8).reshape(2, 2, 2), 24.0)


class Bytes:
    """The simplest text tokenizer: one id for each byte."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode()


def test_chat_about_an_image_is_the_published_template() -> None:
    tokens, answers = write_chat([Exchange("What is it?", "A cat")], [IMAGE], SMALL, Bytes())
    block = block_tokens(IMAGE, SMALL, Bytes()).tolist()
    head = [SMALL.bos, *b"You are a helpful assistant. USER: ", *block, *b"What is it?. ASSISTANT:"]
    assert tokens.tolist() == [*head, *b"A cat", SMALL.eos]
    assert chat_prompt("What is it?", [IMAGE], SMALL, Bytes()).tolist() == head
    assert answers == [Span(len(head), 6)]


def test_more_questions_follow_and_each_answer_ends() -> None:
    exchanges = [Exchange("What is it?", "A cat"), Exchange("Its colour?", "Red")]
    tokens, answers = write_chat(exchanges, [IMAGE], SMALL, Bytes())
    first, _ = write_chat(exchanges[:1], [IMAGE], SMALL, Bytes())
    assert tokens[: len(first)].tolist() == first.tolist()
    assert tokens[len(first) :].tolist() == [*b"USER: Its colour?. ASSISTANT:", *b"Red", SMALL.eos]
    assert [tokens[span.offset : span.offset + span.length].tolist() for span in answers] == [
        [*b"A cat", SMALL.eos],
        [*b"Red", SMALL.eos],
    ]


def test_a_conversation_has_an_exchange() -> None:
    with pytest.raises(DocumentError, match="no exchange"):
        write_chat([], [IMAGE], SMALL, Bytes())


def test_a_question_may_be_about_several_pictures() -> None:
    blocks = [*block_tokens(IMAGE, SMALL, Bytes()).tolist(), *block_tokens(CLIP, SMALL, Bytes()).tolist()]
    head = [SMALL.bos, *b"You are a helpful assistant. USER: ", *blocks, *b"Which?. ASSISTANT:"]
    assert chat_prompt("Which?", [IMAGE, CLIP], SMALL, Bytes()).tolist() == head


@given(st.text(), st.text())
def test_chat_about_nothing_is_text_only(question: str, answer: str) -> None:
    tokens, answers = write_chat([Exchange(question, answer)], [], SMALL, Bytes())
    assert bytes(tokens[1:-1].tolist()).decode() == f"You are a helpful assistant. USER: {question}. ASSISTANT:{answer}"
    length = len(answer.encode()) + 1
    assert answers == [Span(len(tokens) - length, length)]
