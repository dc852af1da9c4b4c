r"""Conversations about images and clips, in LLaVA's layout: a JSON list, or JSONL or Parquet of the same rows.

    {"id": "7", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat is it?"},
                                                    {"from": "gpt", "value": "A cat"}, ...]}

`image` and `video` hold a path or a list of paths, relative to the file; a row with neither is a plain conversation. A
broken row is an item of its own, not the end of them.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.read_rows import Row, read_rows
from schemas.chat import Exchange
from schemas.errors import ConfigError, RowError

MEDIA_COLUMNS = ("image", "video")
COLUMNS = ("id", *MEDIA_COLUMNS, "conversations")
PLACEHOLDER = re.compile(r"<(?:image|video)>\s*")
ROLES = {"human": 0, "user": 0, "gpt": 1, "assistant": 1}


@dataclass(frozen=True)
class Conversation:
    """Row `index` of a file, from 0: absolute paths of the media it is about, and what was said; or why it is none."""

    index: int
    media: tuple[Path, ...] = ()
    exchanges: tuple[Exchange, ...] = ()
    error: RowError | None = None


def read_conversations(path: Path) -> Iterator[Conversation]:
    """A .json, .jsonl or .parquet file -> its conversations in order.

    Raises: ConfigError if the file as a whole cannot be read.
    """
    try:
        for row in _rows(path):
            if row.error is not None:
                yield Conversation(row.index, error=row.error)
                continue
            try:
                yield _conversation(row, path.parent)
            except RowError as error:
                yield Conversation(row.index, error=error)
    except (OSError, RowError, ValueError, RecursionError) as error:
        raise ConfigError(f"the conversations {path} cannot be read: {error}") from error


def _rows(path: Path) -> Iterator[Row]:
    if path.suffix.lower() in (".jsonl", ".parquet"):
        yield from read_rows(path, COLUMNS)
        return
    if path.suffix.lower() != ".json":
        raise ValueError(f"found {path.suffix!r}, expected .json, .jsonl or .parquet")
    values = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(values, list):
        raise ValueError(f"found a JSON {type(values).__name__}, expected a list")
    for index, value in enumerate(values):
        if isinstance(value, dict):
            yield Row(index, value)
        else:
            error = RowError("BrokenRow", f"found a JSON {type(value).__name__}, expected an object")
            yield Row(index, {}, error)


def _conversation(row: Row, folder: Path) -> Conversation:
    media = tuple(path for name in MEDIA_COLUMNS for path in _paths(row.values, name, folder))
    turns = row.values.get("conversations")
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        found = f"{len(turns)} turns" if isinstance(turns, list) else repr(turns)
        raise RowError("BrokenConversation", f"found {found}, expected questions and answers in turn")
    said = [_turn(turn, index % 2) for index, turn in enumerate(turns)]
    said[0] = _without_placeholders(said[0], len(media))
    for text in said[1:]:
        if PLACEHOLDER.search(text):
            raise RowError(
                "PictureInside",
                f"found a picture inside the conversation, before {text[:40]!r}; they stand at its start",
            )
    exchanges = tuple(Exchange(said[index], said[index + 1]) for index in range(0, len(said), 2))
    return Conversation(row.index, media, exchanges)


def _paths(values: Mapping[str, Any], name: str, folder: Path) -> Iterator[Path]:
    found = values.get(name) or []
    for value in found if isinstance(found, list) else [found]:
        if not isinstance(value, str) or not value or "\0" in value:
            raise RowError("BrokenConversation", f"found {value!r} as {name}, expected a path or a list of paths")
        # As places of media are written down: absolute, symbolic links left as they are.
        yield Path(folder.absolute() / value)


def _turn(turn: object, role: int) -> str:
    said = turn if isinstance(turn, dict) else {}
    who, text = said.get("from", said.get("role")), said.get("value", said.get("content"))
    if ROLES.get(str(who)) != role or not isinstance(text, str) or not text.strip():
        expected = "human" if role == 0 else "gpt"
        raise RowError("BrokenConversation", f"found the turn {turn!r}"[:200] + f", expected one from {expected!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError("BrokenConversation", f"found text that is not valid Unicode: {error.reason}") from error
    return text.strip()


def _without_placeholders(question: str, num_media: int) -> str:
    """The first question without its placeholders, which the template writes where the pictures are: before it."""
    found = PLACEHOLDER.findall(question)
    if found and len(found) != num_media:
        raise RowError("BrokenConversation", f"found {len(found)} placeholders for {num_media} pictures")
    if not (rest := PLACEHOLDER.sub("", question).strip()):
        raise RowError("BrokenConversation", f"found no question beside the picture in {question!r}")
    return rest
