"""LLaVA's layout as it is found in the wild, and rows that break it."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.read_conversations import read_conversations
from schemas.chat import Exchange
from schemas.errors import ConfigError


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]


GOOD: dict[str, Any] = {
    "id": "000000033471",
    "image": "coco/000000033471.jpg",
    "conversations": turns("<image>\nWhat is it?", "A bus.", "Which colour?", "White and red."),
}
SAID = (Exchange("What is it?", "A bus."), Exchange("Which colour?", "White and red."))


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_the_published_layout(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"said.{suffix}"
    plain = {"id": "2", "conversations": turns("Why?", "Because.")}
    if suffix == "json":
        path.write_text(json.dumps([GOOD, plain]))
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in (GOOD, plain)))
    else:
        pq.write_table(pa.Table.from_pylist([GOOD, plain]), path)
    first, second = read_conversations(path)
    assert first.error is None
    assert first.media == (tmp_path / "coco/000000033471.jpg",)
    assert first.exchanges == SAID
    assert (second.index, second.media, second.exchanges) == (1, (), (Exchange("Why?", "Because."),))


@pytest.mark.parametrize("question", ["What is it?", "What is it?\n<image>", "<image> What is it?"])
def test_the_placeholder_may_stand_anywhere_in_the_first_question(tmp_path: Path, question: str) -> None:
    path = tmp_path / "said.json"
    path.write_text(json.dumps([{**GOOD, "conversations": turns(question, "A bus.")}]))
    assert next(read_conversations(path)).exchanges == SAID[:1]


def test_several_pictures_and_openai_roles(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "<image><image>Which?"}, {"role": "assistant", "content": "The first."}]
    path = tmp_path / "said.json"
    path.write_text(json.dumps([{"image": ["a.png", "/b.png"], "conversations": said}]))
    found = next(read_conversations(path))
    assert found.error is None
    assert found.media == (tmp_path / "a.png", Path("/b.png"))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (7, "BrokenRow"),
        ({**GOOD, "conversations": None}, "BrokenConversation"),
        ({**GOOD, "conversations": []}, "BrokenConversation"),
        ({**GOOD, "conversations": turns("Why?")}, "BrokenConversation"),
        ({**GOOD, "conversations": turns("Why?", "  ")}, "BrokenConversation"),
        ({**GOOD, "conversations": turns("<image>", "A bus.")}, "BrokenConversation"),
        ({**GOOD, "conversations": turns("<image><image>Why?", "A bus.")}, "BrokenConversation"),
        ({**GOOD, "conversations": turns("Why?", "A bus.")[::-1]}, "BrokenConversation"),
        ({**GOOD, "conversations": ["Why?", "Because."]}, "BrokenConversation"),
        ({**GOOD, "conversations": turns("Why?", "A.", "<image> And this?", "B.")}, "PictureInside"),
        ({**GOOD, "conversations": turns("Why?", "\ud800")}, "BrokenConversation"),
        ({**GOOD, "image": 3}, "BrokenConversation"),
        ({**GOOD, "image": "a\0b"}, "BrokenConversation"),
    ],
)
def test_a_broken_row_is_named_and_the_next_one_read(tmp_path: Path, row: object, reason: str) -> None:
    path = tmp_path / "said.json"
    path.write_text(json.dumps([row, GOOD]))
    broken, good = read_conversations(path)
    assert broken.error is not None
    assert broken.error.reason == reason
    assert good.exchanges == SAID


def test_files_that_are_none(tmp_path: Path) -> None:
    for name, content in (("a.json", "{}"), ("b.json", "[1,"), ("c.txt", "x"), ("d.parquet", "x")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ConfigError, match=f"{name} cannot be read"):
            list(read_conversations(tmp_path / name))
    with pytest.raises(ConfigError, match="cannot be read"):
        list(read_conversations(tmp_path / "none.json"))
