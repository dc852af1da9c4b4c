"""Questions about an image or a clip, and plain ones: the published chat template, as tokens.

    BOS "You are a helpful assistant. USER: " [BOI meta IMG codes EOI] question ". ASSISTANT:" answer EOS

The full stop after the question is part of the template, whatever the question ends with.
"""

import numpy as np
import numpy.typing as npt

from schemas.document import Grammar, MetaTemplate, TextCodec, Tokens, VisionDocument, prompt_tokens, text_tokens
from schemas.vocabulary import IntArray, Vocabulary

OPENING = "You are a helpful assistant. USER: "
CLOSING = ". ASSISTANT:"


def chat_prompt(
    question: str,
    vision: VisionDocument | None,
    vocabulary: Vocabulary,
    text: TextCodec,
    *,
    meta: MetaTemplate = MetaTemplate.OUTBACK,
) -> Tokens:
    """A question, and what it is about -> everything up to the answer, uint32. The document's caption is not shown.

    Raises: DocumentError if the text is not encodable; SchemaError if a code or a text id is outside the vocabulary.
    """
    if vision is None:
        return _join([vocabulary.bos], text_tokens(OPENING + question + CLOSING, vocabulary, text))
    block = prompt_tokens("", vision.kind, vision.grid, vision.fps, vocabulary, text, meta=meta)[1:]
    codes = Grammar(vocabulary, vision.kind, vision.grid, meta).write(vision.codes)
    opening, asked = text_tokens(OPENING, vocabulary, text), text_tokens(question + CLOSING, vocabulary, text)
    return _join([vocabulary.bos], opening, block, codes, asked)


def write_chat(
    question: str,
    answer: str,
    vision: VisionDocument | None,
    vocabulary: Vocabulary,
    text: TextCodec,
    *,
    meta: MetaTemplate = MetaTemplate.OUTBACK,
) -> tuple[Tokens, npt.NDArray[np.float32]]:
    """A question with its answer -> tokens from BOS to EOS, and the weight of each as a target: 1 for the answer only.

    Paper: Emu3 report, section 2.5.2: vision tokens carry no loss when the model learns to understand.
    """
    prompt = chat_prompt(question, vision, vocabulary, text, meta=meta)
    answered = _join(text_tokens(answer, vocabulary, text), [vocabulary.eos])
    weights = np.repeat(np.array([0.0, 1.0], np.float32), [len(prompt), len(answered)])
    return _join(prompt, answered), weights


def _join(*parts: list[int] | IntArray) -> Tokens:
    return np.concatenate([np.asarray(part, np.uint32) for part in parts])
