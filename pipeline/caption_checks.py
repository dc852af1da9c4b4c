"""Whether a caption can be one: it is there, it ended by itself, it does not repeat itself, it does not refuse, it does not
recite its prompt, and it is in the language that was asked for.

A caption that fails is kept with the name of the check, for thresholds are a matter of taste and tables are not.
"""

import re
from functools import cache
from typing import Protocol

from pydantic import Field

from schemas.recipe import Config

NGRAM_WORDS = 4
LEAK_WORDS = 8
ANY_LANGUAGE = "any"
# How instruction-tuned models decline. Only the beginning is read: a person in a picture may be sorry too.
REFUSALS = re.compile(
    r"^\W*(i'?m\s+(really\s+)?sorry\b|i\s+(am\s+)?sorry\b|sorry,|i\s+(can('|no)?t|am\s+(not\s+able|unable)|will\s+not|won'?t)\b"
    r"|i'?m\s+(not\s+able|unable)\b|as\s+an?\s+(ai|language|large language)\b|unfortunately,?\s+i\b|抱歉|很抱歉|对不起|我无法)",
    re.IGNORECASE,
)
# What belongs to a model's own protocol, never to a picture: `<|im_start|>`, `[INST]`, `<image>`.
CONTROL = re.compile(r"<\|[^|<>]{1,40}\|>|\[/?INST\]|</?s>|<(image|video|think|assistant|user)>", re.IGNORECASE)


class CaptionChecks(Config):
    """What a caption must pass. Names of failures: empty, truncated, repetition, refusal, leakage, language."""

    min_chars: int = Field(default=3, ge=1)
    may_be_truncated: bool = False
    max_repetition: float = Field(default=0.4, ge=0.0, le=1.0)
    """Largest share of 4-grams that stood in the caption before."""
    language: str = "en"
    """ISO 639-1 code of the language the caption must be in, where that can be told; or `any`."""
    min_language_probability: float = Field(default=0.9, ge=0.0, le=1.0)


def find_problem(text: str, finish_reason: str, prompt: str, checks: CaptionChecks) -> str | None:
    """A caption, how it ended and what asked for it -> the first check it fails, or None."""
    if len(text.strip()) < checks.min_chars:
        return "empty"
    if repetition(text) > checks.max_repetition:
        return "repetition"  # before truncation: a loop ends at the limit, and its cause is the loop
    if finish_reason == "length" and not checks.may_be_truncated:
        return "truncated"
    if REFUSALS.search(text):
        return "refusal"
    if CONTROL.search(text) or _recites(text, prompt):
        return "leakage"
    found = language(text, checks.min_language_probability)
    if checks.language != ANY_LANGUAGE and found is not None and found != checks.language:
        return "language"
    return None


def repetition(text: str) -> float:
    """Share of a text's 4-grams that it has said before: 0 for prose, near 1 for a loop. 0 below two 4-grams."""
    grams = _ngrams(_words(text), NGRAM_WORDS)
    return 1.0 - len(set(grams)) / len(grams) if len(grams) > 1 else 0.0


def language(text: str, min_probability: float) -> str | None:
    """The ISO 639-1 code of a text's language, or None where the text is too short or too odd to tell."""
    found, probability = _identifier().classify(text)
    return str(found) if probability >= min_probability else None


def _recites(text: str, prompt: str) -> bool:
    said = _ngrams(_words(prompt), LEAK_WORDS)
    return not set(said).isdisjoint(_ngrams(_words(text), LEAK_WORDS))


def _words(text: str) -> list[str]:
    """Words, lower case; each character of a script without spaces is one."""
    return re.findall(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+", text.lower())


def _ngrams(words: list[str], length: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]


class _Identifier(Protocol):
    def classify(self, text: str) -> tuple[str, float]: ...


@cache
def _identifier() -> _Identifier:
    """The language model of py3langid, which is inside its wheel. Loaded once per process, in about a second."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier: _Identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    return identifier
