"""The chat template against its published form."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from schemas.chat import chat_prompt, write_chat
from schemas.document import VisionDocument, write_document
from schemas.vocabulary import Vocabulary

SMALL = Vocabulary(num_text=256, num_codes=64)
IMAGE = VisionDocument("image", "not shown", np.arange(6).reshape(1, 2, 3))


class Bytes:
    """The simplest text tokenizer: one id for each byte."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode()


def test_chat_about_an_image_is_the_published_template() -> None:
    tokens, weights = write_chat("What is it?", "A cat", IMAGE, SMALL, Bytes())
    without_caption = VisionDocument("image", "", IMAGE.codes)
    block = write_document(without_caption, SMALL, Bytes())[1:-1].tolist()
    head = [SMALL.bos, *b"You are a helpful assistant. USER: ", *block, *b"What is it?. ASSISTANT:"]
    assert tokens.tolist() == [*head, *b"A cat", SMALL.eos]
    assert chat_prompt("What is it?", IMAGE, SMALL, Bytes()).tolist() == head
    assert weights.tolist() == [0.0] * len(head) + [1.0] * 6


@given(st.text(), st.text())
def test_chat_about_nothing_is_text_only(question: str, answer: str) -> None:
    tokens, weights = write_chat(question, answer, None, SMALL, Bytes())
    assert bytes(tokens[1:-1].tolist()).decode() == f"You are a helpful assistant. USER: {question}. ASSISTANT:{answer}"
    assert len(weights) == len(tokens)
    assert weights.sum() == len(answer.encode()) + 1
