"""Questions about an image or a clip, and plain ones: the published chat template, as tokens.

    BOS "You are a helpful assistant. USER: " (BOI meta IMG codes EOI)* question ". ASSISTANT:" answer EOS

The full stop after the question is part of the template, whatever the question ends with.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from schemas.document import (
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
CLOSING = ". ASSISTANT:"


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
    question: str,
    answer: str,
    blocks: Sequence[VisionBlock],
    vocabulary: Vocabulary,
    text: TextCodec,
    *,
    meta: MetaTemplate = MetaTemplate.OUTBACK,
) -> tuple[Tokens, npt.NDArray[np.float32]]:
    """A question with its answer -> tokens from BOS to EOS, and the weight of each as a target: 1 for the answer only.

    Paper: Emu3 report, section 2.5.2: vision tokens carry no loss when the model learns to understand.
    """
    prompt = chat_prompt(question, blocks, vocabulary, text, meta=meta)
    # Apart from the question, so that a text tokenizer joins no piece of one to a piece of the other.
    answered = np.append(text_tokens(answer, vocabulary, text), np.uint32(vocabulary.eos))
    weights = np.repeat(np.array([0.0, 1.0], np.float32), [len(prompt), len(answered)])
    return np.concatenate([prompt, answered]), weights
