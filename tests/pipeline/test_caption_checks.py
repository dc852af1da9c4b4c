"""Captions that are none are told from those that are."""

import pytest

from pipeline.caption_checks import CaptionChecks, find_problem, language, repetition
from pipeline.caption_prompts import load_prompt

GOOD = (
    "A woman in a red coat walks from left to right along a wet street at night, past a shop whose neon sign reads OPEN. "
    "The camera follows her at walking pace, and headlights pass behind her."
)
ASKED = load_prompt("dense.v1")[1].asked("video")


def problem(text: str, finish_reason: str = "stop", **checks: object) -> str | None:
    return find_problem(text, finish_reason, ASKED, CaptionChecks(**checks))


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        "a red circle moving left",
        "A man holds a sign that says: sorry, we are closed. He shrugs.",
        "Two dogs, then two cats, then two birds pass; two dogs follow.",
        "A price list <small print> with $5 | $6 columns.",
    ],
)
def test_captions_pass(text: str) -> None:
    assert problem(text) is None


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("", "empty"),
        (" \n\t ", "empty"),
        ("The sky is blue. " * 20, "repetition"),
        ("blue blue blue blue blue blue blue blue blue blue", "repetition"),
        ("蓝色的圆圈在移动。" * 12, "repetition"),
        ("I'm sorry, but I can't describe people in this video.", "refusal"),
        ("I cannot help with that.", "refusal"),
        ("As an AI language model, I do not see pictures.", "refusal"),
        ("抱歉,我无法描述这张图片。", "refusal"),
        (f"A cat. {ASKED}", "leakage"),
        ("<|im_start|>assistant\nA cat on a mat.", "leakage"),
        ("A cat on a mat.<|image start|>", "leakage"),
        ("Ein Mann geht am Strand entlang und schaut aufs Meer hinaus.", "language"),
        ("一只猫坐在桌子上,看着窗外的雨,外面有人撑着伞走过。", "language"),
    ],
)
def test_what_is_no_caption_is_named(text: str, name: str) -> None:
    assert problem(text) == name


def test_a_cut_caption_is_truncated_and_a_loop_that_was_cut_is_a_loop() -> None:
    assert problem(GOOD, "length") == "truncated"
    assert problem(GOOD, "length", may_be_truncated=True) is None
    assert problem("and then " * 40, "length") == "repetition"


def test_the_language_asked_for_is_a_choice() -> None:
    german = "Ein Mann geht am Strand entlang und schaut aufs Meer hinaus."
    assert problem(german, language="de") is None
    assert problem(german, language="any") is None
    assert problem(GOOD, language="de") == "language"
    assert language("a blue triangle", 0.9) is None  # three words tell nothing, and fail nothing


def test_repetition_is_the_share_said_before() -> None:
    assert repetition("one two three") == 0.0
    assert repetition("a b c d e f g h") == 0.0
    assert repetition("a b c d a b c d") == pytest.approx(1 - 4 / 5)
