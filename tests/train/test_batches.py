from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.chat import Exchange, write_chat
from schemas.document import TokenWeights, VisionBlock
from schemas.errors import ConfigError, SchemaError
from schemas.vocabulary import Vocabulary
from tests.train.small_data import CONTEXT_LEN, VOCABULARY, documents, frame_data, sequence_data, text_tokenizer
from train.batches import (
    FrameFile,
    SequenceData,
    SequenceFile,
    batch_indices,
    token_batch,
    worker_share,
    write_frame_file,
    write_sequence_file,
)


@given(seed=st.integers(0, 2**32), num_rows=st.integers(1, 50), global_batch=st.integers(1, 20))
def test_every_epoch_reads_every_row_once(seed: int, num_rows: int, global_batch: int) -> None:
    steps = -(-3 * num_rows // global_batch)
    stream = np.concatenate([batch_indices(seed, step, global_batch, num_rows) for step in range(steps)])
    for epoch in range(3):
        assert sorted(stream[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))


def test_order_depends_on_seed_and_step_alone() -> None:
    asked_late = batch_indices(7, 900, 16, 1000)
    for step in (3, 901, 0):
        batch_indices(7, step, 16, 1000)
    assert np.array_equal(asked_late, batch_indices(7, 900, 16, 1000))
    assert not np.array_equal(asked_late, batch_indices(8, 900, 16, 1000))
    assert not np.array_equal(batch_indices(7, 0, 1000, 1000), batch_indices(7, 1, 1000, 1000))  # epochs differ


@given(num_workers=st.integers(1, 7))
def test_shares_of_all_workers_are_the_global_batch(num_workers: int) -> None:
    rows = batch_indices(0, 5, 24, 100)
    shares = [worker_share(rows, rank, num_workers) for rank in range(num_workers)]
    assert sorted(np.concatenate(shares)) == sorted(rows)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_rows_come_back_as_written(tmp_path: Path) -> None:
    rows = [np.array([1, 2, 2**32 - 1]), np.array([5])]
    segments = [
        [
            {"kind": "text", "item_id": "a", "offset": 0, "length": 2},
            {"kind": "image", "item_id": "b", "offset": 2, "length": 1},
        ],
        [{"kind": "text", "item_id": "c", "offset": 0, "length": 1}],
    ]
    path = tmp_path / "new" / "rows.arrow"
    assert write_sequence_file(path, rows, segments) == 2
    file = SequenceFile(path)
    assert len(file) == 2
    for row, (ids, parts) in enumerate(zip(rows, segments, strict=True)):
        assert file.tokens(row).dtype == np.uint32
        assert np.array_equal(file.tokens(row), ids)
        assert file.segments(row) == parts


@pytest.mark.parametrize("spans", [[], [(0, 2)], [(0, 2), (3, 1)], [(0, 3), (2, 1)], [(0, 4)], [(0, 0), (0, 3)]])
def test_segments_must_cover_their_row(tmp_path: Path, spans: list[tuple[int, int]]) -> None:
    segments = [{"kind": "text", "item_id": "a", "offset": at, "length": length} for at, length in spans]
    with pytest.raises(SchemaError, match="row 0"):
        write_sequence_file(tmp_path / "rows.arrow", [np.array([1, 2, 3])], [segments])
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_batch_against_the_documents_one_by_one(tmp_path: Path) -> None:
    data = sequence_data(tmp_path)
    file = SequenceFile(data.path)
    batch = token_batch(file, np.array([4, 1, 9]), data, TokenWeights())
    for place, row in enumerate((4, 1, 9)):
        at = 0
        for number, segment in enumerate(file.segments(row)):
            length = int(str(segment["length"]))
            document = file.tokens(row)[at : at + length]
            inside = slice(at, at + length)
            assert batch.tokens_BL[place, inside].tolist() == document.tolist()
            assert batch.labels_BL[place, inside].tolist()[:-1] == document.tolist()[1:]
            vision = document[1:] >= VOCABULARY.vision_offset
            assert batch.weights_BL[place, inside].tolist() == [*np.where(vision, 0.5, 1.0), 0.0]
            assert batch.positions_BL[place, inside].tolist() == list(range(length))
            assert set(batch.document_ids_BL[place, inside].tolist()) == {number}
            assert batch.quarters_BL[place, inside].tolist() == [4 * token // length for token in range(length)]
            at += length
        assert set(batch.tokens_BL[place, at:].tolist()) == {VOCABULARY.pad}
        assert batch.weights_BL[place, at:].sum() == 0
        assert not set(batch.document_ids_BL[place, at:].tolist()) & set(batch.document_ids_BL[place, :at].tolist())


def test_no_label_crosses_a_document(tmp_path: Path) -> None:
    # Every document starts with BOS, and no document holds another one, so a weighted BOS label would be a crossing.
    data = sequence_data(tmp_path, num_rows=30)
    batch = token_batch(SequenceFile(data.path), np.arange(30), data, TokenWeights())
    assert int((batch.tokens_BL == VOCABULARY.bos).sum()) == 60
    assert not ((batch.labels_BL == VOCABULARY.bos) & (batch.weights_BL > 0)).any()
    assert ((batch.labels_BL == VOCABULARY.eos) & (batch.weights_BL > 0)).sum() == 60


def test_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    ids = np.concatenate(documents(0, 1))
    segment = {"kind": "text", "item_id": "a", "offset": 0, "length": len(ids)}
    path = tmp_path / "rows.arrow"
    write_sequence_file(path, [ids], [[segment]])
    short = SequenceData(path, "a", "a", VOCABULARY, text_tokenizer(), len(ids) - 1)
    small = SequenceData(path, "a", "a", Vocabulary(10, 16), text_tokenizer(), CONTEXT_LEN)
    for data in (short, small):
        with pytest.raises(SchemaError, match="row 0"):
            token_batch(SequenceFile(path), np.array([0]), data, TokenWeights())


def test_frames_come_back_as_written(tmp_path: Path) -> None:
    file = FrameFile(frame_data(tmp_path).path)
    again = np.load(tmp_path / "frames.npy")
    assert len(file) == 6
    assert np.array_equal(file.read(np.array([3, 0])), again[[3, 0]])


@pytest.mark.parametrize(("shape", "count"), [((4, 8, 9, 3), 1), ((3, 8, 8, 3), 1), ((4, 8, 8, 3), 2)])
def test_frames_that_do_not_fit_are_refused(tmp_path: Path, shape: tuple[int, ...], count: int) -> None:
    with pytest.raises(SchemaError):
        write_frame_file(tmp_path / "frames.npy", [np.zeros(shape, np.uint8)], count, (8, 8))
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no data")
    for read in (SequenceFile, FrameFile):
        with pytest.raises(ConfigError, match="cannot be read"):
            read(tmp_path / "text")
        with pytest.raises(ConfigError, match="cannot be read"):
            read(tmp_path / "missing")


def test_of_a_conversation_only_the_answers_are_learnt(tmp_path: Path) -> None:
    image = VisionBlock("image", np.arange(4).reshape(1, 2, 2))
    text = text_tokenizer()
    exchanges = [Exchange("Colour?", "red"), Exchange("Shape?", "circle")]
    chat, answers = write_chat(exchanges, [image], VOCABULARY, text)
    plain = documents(0, 2)
    rows = [np.concatenate([plain[0], chat, plain[1]]), np.concatenate([plain[1]])]
    lengths = [[len(plain[0]), len(chat), len(plain[1])], [len(plain[1])]]
    segments = [
        [
            {"kind": "chat", "item_id": "a", "offset": end - n, "length": n}
            for n, end in zip(row, np.cumsum(row).tolist(), strict=True)
        ]
        for row in lengths
    ]
    spans = [[{"offset": len(plain[0]) + span.offset, "length": span.length} for span in answers], []]
    path = tmp_path / "rows.arrow"
    write_sequence_file(path, rows, segments, spans)
    data = SequenceData(path, "a", "a", VOCABULARY, text, 512)
    batch = token_batch(SequenceFile(path), np.array([0, 1]), data, TokenWeights())
    inside = slice(len(plain[0]), len(plain[0]) + len(chat))
    learnt = batch.labels_BL[0, inside][batch.weights_BL[0, inside] > 0]
    expected = [*text.encode("red"), VOCABULARY.eos, *text.encode("circle"), VOCABULARY.eos]
    assert learnt.tolist() == expected
    assert batch.weights_BL[0, inside].sum() == len(expected)
    after = inside.stop
    for row, first, document in ((0, 0, plain[0]), (0, after, plain[1]), (1, 0, plain[1])):
        assert (batch.weights_BL[row, first : first + len(document) - 1] > 0).all()  # the others are learnt whole
