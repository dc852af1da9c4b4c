"""Questions about an image or a clip, and plain ones: the published chat template, as tokens.

    BOS "You are a helpful assistant. USER: " (BOI meta IMG codes EOI)* question ". ASSISTANT:" answer EOS
    "USER: " question ". ASSISTANT:" answer EOS ...

The full stop after the question is part of the template, whatever the question ends with.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from schemas.document import (
    DocumentError,
    InterleavedDocument,
    MetaTemplate,
    Part,
    TextCodec,
    Tokens,
    VisionBlock,
    text_tokens,
    write_document,
)
from schemas.vocabulary import Vocabulary

OPENING = "You are a helpful assistant. USER: "
NEXT = "USER: "
CLOSING = ". ASSISTANT:"


@dataclass(frozen=True)
class Exchange:
    """A question and the answer to it."""

    question: str
    answer: str


@dataclass(frozen=True)
class Span:
    """Tokens of a document or row: the first, and how many."""

    offset: int
    length: int


def chat_prompt(
    question: str,
    blocks: Sequence[VisionBlock],
    vocabulary: Vocabulary,
    text: TextCodec,
    *,
    meta: MetaTemplate = MetaTemplate.OUTBACK,
) -> Tokens:
    """A question, and the images and clips it is about, if any -> everything up to the answer, uint32.

    Raises: DocumentError if the text is not encodable; SchemaError if a code or a text id is outside the vocabulary.
    """
    parts: list[Part] = [OPENING, *blocks, question + CLOSING]
    return write_document(InterleavedDocument(tuple(parts)), vocabulary, text, meta=meta)[:-1]


def write_chat(
    exchanges: Sequence[Exchange],
    blocks: Sequence[VisionBlock],
    vocabulary: Vocabulary,
    text: TextCodec,
    *,
    meta: MetaTemplate = MetaTemplate.OUTBACK,
) -> tuple[Tokens, list[Span]]:
    """Questions with their answers, all about the same blocks -> tokens from BOS to EOS, and where the answers are.

    An answer's span ends with the EOS that closes it, so that a model learns to stop after each. The next question follows
    as in Vicuna's conversations, which the published template is the first exchange of: ours, as Emu3 shows no second one.

    Raises: DocumentError if there is no exchange or a text is not encodable; SchemaError as `chat_prompt`.
    Paper: Emu3 report, section 2.5.2: vision tokens carry no loss when the model learns to understand.
    """
    if not exchanges:
        raise DocumentError("document_chat", "found a conversation of no exchange, expected a question and an answer")
    tokens: list[Tokens] = []
    spans: list[Span] = []
    length = 0
    for index, exchange in enumerate(exchanges):
        if index == 0:
            asked = chat_prompt(exchange.question, blocks, vocabulary, text, meta=meta)
        else:
            asked = text_tokens(NEXT + exchange.question + CLOSING, vocabulary, text)
        # Apart from the question, so that a text tokenizer joins no piece of one to a piece of the other.
        answered = np.append(text_tokens(exchange.answer, vocabulary, text), np.uint32(vocabulary.eos))
        spans.append(Span(length + len(asked), len(answered)))
        tokens += [asked, answered]
        length += len(asked) + len(answered)
    return np.concatenate(tokens), spans
