"""Packing: documents into rows of a fixed number of tokens. No document is ever split; what does not fit is named.

Best fit, longest first, over the free space of all open rows: deterministic from the documents and the seed. The order of
the rows is a seeded permutation, so that reading them by index mixes short and long, images, videos and text.
"""

import bisect
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from schemas.chat import Span

Tokens = npt.NDArray[np.uint32]


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


def pack(documents: Sequence[PackedDocument], context_len: int, seed: int) -> list[PackedRow]:
    """Documents of at most `context_len` tokens -> rows of at most `context_len` tokens, in the order of training."""
    order = sorted(
        range(len(documents)), key=lambda i: (-len(documents[i].tokens), documents[i].kind, documents[i].item_id)
    )
    rows: list[list[PackedDocument]] = []
    free: list[tuple[int, int]] = []  # (free tokens, row), sorted: the first that fits is the tightest
    for index in order:
        document = documents[index]
        length = len(document.tokens)
        place = bisect.bisect_left(free, (length, -1))
        if place == len(free):
            rows.append([document])
            left, row = context_len - length, len(rows) - 1
        else:
            left, row = free.pop(place)
            rows[row].append(document)
            left -= length
        bisect.insort(free, (left, row))
    permutation = np.random.Generator(np.random.PCG64(seed)).permutation(len(rows))
    return [PackedRow(tuple(rows[row])) for row in permutation]


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
