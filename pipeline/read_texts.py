"""Texts: where language data enters. A `.txt` file is one document; a file of rows with a text column is one per row.

A document is the text as it stands, without the newline that ends a file. Text in UTF-8 only: what is not gets a row in
`attempts` with the reason, as does an empty text.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.read_rows import read_rows
from schemas.errors import RowError

TEXT_COLUMNS = ("text", "content")
LICENCE_COLUMNS = ("licence", "license")
MAX_TEXT_BYTES = 256 << 20


@dataclass(frozen=True)
class Text:
    """One document and where it stands; `row` is the row of its file, from 0."""

    text: str
    row: int
    licence: str | None

    @property
    def text_id(self) -> str:
        """The id that the content gives: equal texts are one row of the lake."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class BrokenText:
    """A row that is no document."""

    row: int
    error: RowError


def text_column(columns: tuple[str, ...]) -> str | None:
    """Column names -> the one that holds the text, if any."""
    return next((name for name in TEXT_COLUMNS if name in columns), None)


def read_texts(path: Path, licence: str | None = None) -> Iterator[Text | BrokenText]:
    """A `.txt` file, or a file of rows with a text column -> its documents in order. `licence` holds where no row says.

    Raises: OSError if the file cannot be opened; RowError if the whole file cannot be read.
    """
    if path.suffix.lower() == ".txt":
        yield _read_plain(path, licence)
        return
    for row in read_rows(path, (*TEXT_COLUMNS, *LICENCE_COLUMNS)):
        if row.error is not None:
            yield BrokenText(row.index, row.error)
            continue
        text = next((row.values[name] for name in TEXT_COLUMNS if name in row.values), None)
        stated = next((row.values[name] for name in LICENCE_COLUMNS if row.values.get(name)), licence)
        yield _checked(text, row.index, None if stated is None else str(stated))


def _read_plain(path: Path, licence: str | None) -> Text | BrokenText:
    num_bytes = path.stat().st_size
    if num_bytes > MAX_TEXT_BYTES:
        found = f"found {num_bytes} bytes in one document, expected at most {MAX_TEXT_BYTES}; use JSONL, one per line"
        return BrokenText(0, RowError("TextTooLong", found))
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return BrokenText(0, RowError("NotUtf8", f"the text is not UTF-8: {error}"))
    return _checked(text.removesuffix("\n").removesuffix("\r"), 0, licence)


def _checked(text: object, row: int, licence: str | None) -> Text | BrokenText:
    if not isinstance(text, str):
        return BrokenText(row, RowError("NoText", f"found {type(text).__name__} as text, expected a string"))
    if not text.strip():
        return BrokenText(row, RowError("EmptyText", "found a text of nothing but white space"))
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return BrokenText(row, RowError("NotUtf8", f"the text is not valid Unicode: {error}"))
    return Text(text, row, licence)
