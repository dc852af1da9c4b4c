"""Packing keeps pictures whole, fills rows, and depends on nothing but documents and seed."""

import zlib
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.pack_sequences import MIN_PIECE, PackedDocument, pack, sequence_rows


def documents(lengths: list[int]) -> list[PackedDocument]:
    rng = np.random.default_rng(0)
    kinds = ("image", "video", "text")
    return [
        PackedDocument(kinds[i % 3], f"item{i:04d}", rng.integers(0, 1000, length).astype(np.uint32))  # type: ignore[arg-type]  # literal from a tuple
        for i, length in enumerate(lengths)
    ]


@given(st.lists(st.integers(1, 100), min_size=1, max_size=80), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_every_document_is_packed_once_and_whole(lengths: list[int], seed: int) -> None:
    given_documents = documents(lengths)
    rows = pack(given_documents, 100, seed)
    assert all(row.num_tokens <= 100 for row in rows)
    packed = {document.item_id: document.tokens for row in rows for document in row.documents}
    assert sum(len(row.documents) for row in rows) == len(given_documents)
    assert all(np.array_equal(packed[document.item_id], document.tokens) for document in given_documents)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.randoms())
@settings(max_examples=30, deadline=None)
def test_order_of_the_input_does_not_matter(lengths: list[int], random: st.DataObject) -> None:
    first = documents(lengths)
    second = list(first)
    random.shuffle(second)  # type: ignore[attr-defined]  # hypothesis gives a random.Random
    assert sequence_rows(pack(first, 100, 3), "s") == sequence_rows(pack(second, 100, 3), "s")


def test_best_fit_fills_rows_that_halves_fill_exactly() -> None:
    rows = pack(documents([60, 40] * 20), 100, 0)
    assert len(rows) == 20
    assert all(row.num_tokens == 100 for row in rows)


def test_rows_are_dense_and_say_where_each_document_is() -> None:
    rows = sequence_rows(pack(documents([30, 50, 20, 90]), 100, 1), "set")
    assert [row["seq_index"] for row in rows] == list(range(len(rows)))
    for row in rows:
        tokens = np.frombuffer(row["tokens"], "<u4")  # type: ignore[call-overload]  # object values
        ends = [segment["offset"] + segment["length"] for segment in row["segments"]]  # type: ignore[attr-defined]
        starts = [segment["offset"] for segment in row["segments"]]  # type: ignore[attr-defined]
        assert starts == [0, *ends[:-1]]
        assert ends[-1] == len(tokens) == row["num_tokens"]
        assert row["crc32"] == zlib.crc32(row["tokens"])  # type: ignore[arg-type]


def test_another_seed_orders_rows_anew_and_holds_the_same() -> None:
    first, second = (pack(documents(list(range(1, 90))), 100, seed) for seed in (0, 1))
    ids = [[document.item_id for row in rows for document in row.documents] for rows in (first, second)]
    assert ids[0] != ids[1]
    assert sorted(ids[0]) == sorted(ids[1])


@given(st.lists(st.integers(1, 700), min_size=1, max_size=60), st.integers(64, 300), st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_split_texts_come_back_whole_and_pictures_are_never_split(
    lengths: list[int], context_len: int, seed: int
) -> None:
    made = [replace(doc, tokens=np.arange(len(doc.tokens), dtype=np.uint32)) for doc in documents(lengths)]
    made = [doc for doc in made if doc.kind == "text" or len(doc.tokens) <= context_len]
    rows = pack(made, context_len, seed, split_texts=True)
    assert all(0 < row.num_tokens <= context_len for row in rows)
    pieces: dict[str, list[list[int]]] = {}
    for row in rows:
        for document in row.documents:
            pieces.setdefault(document.item_id, []).append(document.tokens.tolist())
    assert pieces.keys() == {document.item_id for document in made}
    for document in made:
        found = sorted(pieces[document.item_id])
        assert document.kind == "text" or len(found) == 1
        assert [token for piece in found for token in piece] == document.tokens.tolist()
        assert len(found) == 1 or min(map(len, found)) >= min(MIN_PIECE, context_len // 4)


def test_text_fills_what_pictures_leave_free() -> None:
    # Documents of Emu3's first stage: images of about 64 x 64 codes in seven shapes, and texts, at context 5,120.
    rng = np.random.default_rng(0)
    sides = [(64, 64), (56, 73), (73, 56), (52, 79), (79, 52), (48, 85), (85, 48)]
    images = [h * (w + 1) + int(rng.integers(20, 120)) for h, w in (sides[i] for i in rng.integers(0, 7, 600))]
    texts = np.clip(np.exp(rng.normal(6.2, 1.1, 1500)).astype(int), 8, 20_000).tolist()
    made = [PackedDocument("image", f"i{n:05d}", np.zeros(length, np.uint32)) for n, length in enumerate(images)]
    made += [PackedDocument("text", f"t{n:05d}", np.zeros(length, np.uint32)) for n, length in enumerate(texts)]
    whole = [doc for doc in made if len(doc.tokens) <= 5120]
    rows = pack(made, 5120, 0, split_texts=True)
    fill = sum(row.num_tokens for row in rows) / (5120 * len(rows))
    plain = pack(whole, 5120, 0)
    assert fill >= 0.99
    assert sum(row.num_tokens for row in plain) / (5120 * len(plain)) < fill
