"""Packing: documents into rows of a fixed number of tokens. Images, clips and conversations are never split, texts only
where asked for, to fill what the others leave free; what does not fit is named.

Best fit, longest first, over the free space of all open rows: deterministic from the documents and the seed. The order of
the rows is a seeded permutation, so that reading them by index mixes short and long, images, videos and text.
"""

import heapq
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from schemas.chat import Span

Tokens = npt.NDArray[np.uint32]
Counts = npt.NDArray[np.int64]

MIN_PIECE = 32  # tokens of a text that stand in a row without the rest of it
PLANNED_AT_ONCE = 1 << 16  # documents, whose lengths are Python numbers meanwhile


@dataclass(frozen=True)
class PackedDocument:
    """A document as tokens, with the id of what it was made from (a clip, a text, a conversation) and whose caption it has.

    A conversation has the clips that it is about and the spans of its answers, which alone are learnt.
    """

    kind: Literal["image", "video", "text", "chat"]
    item_id: str
    tokens: Tokens
    captioner_id: str | None = None
    clip_ids: tuple[str, ...] = ()
    answers: tuple[Span, ...] = ()


@dataclass(frozen=True)
class PackedRow:
    """One sequence: documents in order, without padding."""

    documents: tuple[PackedDocument, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens in the row."""
        return sum(len(document.tokens) for document in self.documents)


@dataclass(frozen=True)
class Piece:
    """Tokens start..end-1 of the document `index`, in a row."""

    index: int
    row: int
    start: int
    end: int


def pack(
    documents: Sequence[PackedDocument], context_len: int, seed: int, *, split_texts: bool = False
) -> list[PackedRow]:
    """Documents -> rows of at most `context_len` tokens, in the order of training. Only texts that may be split can be longer
    than a row.
    """
    ordered = sorted(documents, key=lambda document: (-len(document.tokens), document.kind, document.item_id))
    lengths = np.array([len(document.tokens) for document in ordered], np.int64)
    may_split = np.array([split_texts and document.kind == "text" for document in ordered], np.bool_)
    row_of, pieces, num_rows = plan_rows(lengths, may_split, context_len)
    rows: list[list[PackedDocument]] = [[] for _ in range(num_rows)]
    for document, row in zip(ordered, row_of.tolist(), strict=True):
        if row >= 0:
            rows[row].append(document)
    for piece in pieces:
        document = ordered[piece.index]
        rows[piece.row].append(replace(document, tokens=document.tokens[piece.start : piece.end]))
    permutation = np.random.Generator(np.random.PCG64(seed)).permutation(num_rows)
    return [PackedRow(tuple(rows[row])) for row in permutation]


def plan_rows(lengths: Counts, may_split: npt.NDArray[np.bool_], context_len: int) -> tuple[Counts, list[Piece], int]:
    """Lengths of documents, and which may be split -> the row of each that stays whole, -1 for others; the pieces of those;
    and the number of rows.

    What may not be split is placed first, longest first, each into the fullest row that has room. Texts follow likewise, into
    rows that are there. Those that fit nowhere are poured, cut where a row ends, first into gaps and then into rows of their
    own. No piece is shorter than `MIN_PIECE`, or a quarter of a row.
    """
    row_of = np.full(len(lengths), -1, np.int64)
    open_rows = _OpenRows(context_len)
    by_length = np.argsort(-lengths, kind="stable")
    split = may_split[by_length]
    for whole, may_open in ((by_length[~split], True), (by_length[split], False)):
        for start in range(0, len(whole), PLANNED_AT_ONCE):
            part = whole[start : start + PLANNED_AT_ONCE]
            row_of[part] = [open_rows.place(length, may_open=may_open) for length in lengths[part].tolist()]
    left = by_length[row_of[by_length] < 0]
    pieces = list(_pour(left.tolist(), lengths, open_rows, context_len))
    return row_of, pieces, open_rows.num_rows


def _pour(left: Sequence[int], lengths: Counts, open_rows: "_OpenRows", context_len: int) -> Iterator[Piece]:
    """Texts one after the other into what rows have free, the largest gaps first, and into rows of their own."""
    least = min(MIN_PIECE, context_len // 4)
    gaps = iter(open_rows.gaps(least))
    row, free = -1, 0
    for index in left:
        start, length = 0, int(lengths[index])
        while start < length:
            end = min(length, start + free)
            if end < length:
                end = min(end, length - least)  # what is left over is a piece too
            if end < length and end - start < least:
                row, free = next(gaps, (-1, context_len))
                row = open_rows.open() if row < 0 else row
                continue
            yield Piece(index, row, start, end)
            free -= end - start
            start = end


class _OpenRows:
    """Rows by what they have free. One look finds the fullest with room: a bit for each number of free tokens says whether
    there is a row.
    """

    def __init__(self, context_len: int) -> None:
        self._context_len = context_len
        self._rows: dict[int, list[int]] = {}  # free tokens -> a heap of rows
        self._frees = 0  # bit n: some row has n tokens free
        self.num_rows = 0

    def place(self, length: int, *, may_open: bool) -> int:
        """A row that has room for these many tokens now has them: its number, -1 if there is none and none may be opened."""
        fitting = self._frees >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            rows = self._rows[free]
            row = heapq.heappop(rows)
            if not rows:
                self._frees ^= 1 << free
        elif may_open:
            free, row = self._context_len, self.open()
        else:
            return -1
        left = free - length
        if left:
            rows = self._rows.setdefault(left, [])
            if not rows:
                self._frees |= 1 << left
            heapq.heappush(rows, row)
        return row

    def open(self) -> int:
        """A new row, which is not placed into: its number."""
        self.num_rows += 1
        return self.num_rows - 1

    def gaps(self, least: int) -> list[tuple[int, int]]:
        """Rows with at least so many tokens free, and how many, the most first."""
        frees = sorted((free for free, rows in self._rows.items() if rows and free >= least), reverse=True)
        return [(row, free) for free in frees for row in sorted(self._rows[free])]


def sequence_rows(rows: Sequence[PackedRow], seqset_id: str) -> list[dict[str, object]]:
    """Packed rows -> rows of `sequences`."""
    return [_sequence_row(row, index, seqset_id) for index, row in enumerate(rows)]


def _sequence_row(row: PackedRow, index: int, seqset_id: str) -> dict[str, object]:
    segments: list[dict[str, object]] = []
    chats: list[dict[str, object]] = []
    offset = 0
    for document in row.documents:
        if document.answers:
            answers = [{"offset": offset + span.offset, "length": span.length} for span in document.answers]
            chats.append({"document": len(segments), "clip_ids": list(document.clip_ids), "answers": answers})
        segments.append(
            {"kind": document.kind, "item_id": document.item_id, "offset": offset, "length": len(document.tokens)}
        )
        offset += len(document.tokens)
    tokens = np.concatenate([document.tokens for document in row.documents]).astype("<u4").tobytes()
    return {
        "seqset_id": seqset_id,
        "seq_index": index,
        "tokens": tokens,
        "num_tokens": row.num_tokens,
        "segments": segments,
        "crc32": zlib.crc32(tokens),
        "captioner_ids": [document.captioner_id for document in row.documents],
        "chats": chats or None,
    }
