"""Materialised data on local disk, and what step number `step` reads of it.

Which rows a step reads is a pure function of (seed, step): no state to save, exact resume, and the same order on any
number of workers. Rows are read from memory-mapped files, so a step touches only the pages it needs.

Shapes: B rows, L tokens, T frames, H W pixels, C channels.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from model.text_tokenizer import TextTokenizer
from schemas.document import TokenWeights, loss_weights
from schemas.errors import ConfigError, SchemaError
from schemas.sequences import SEGMENT, SPAN
from schemas.vocabulary import IntArray, Vocabulary
from train.files import publish_file

Frames = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.int64]

FRAMES_PER_CHUNK = 4  # the vision tokenizer makes one latent frame of four
ROWS_PER_RECORD_BATCH = 1024
TOKEN_TYPE = np.dtype("<u4")

SEQUENCE_SCHEMA = pa.schema(
    [
        pa.field("tokens", pa.large_binary(), nullable=False),  # token ids, little-endian uint32, without padding
        pa.field("segments", pa.list_(pa.field("element", SEGMENT, nullable=False)), nullable=False),
        # Answers of conversations; of a document that holds one, nothing else is learnt.
        pa.field("answers", pa.list_(pa.field("element", SPAN, nullable=False)), nullable=False),
    ]
)


@dataclass(frozen=True)
class SequenceData:
    """Packed sequences, materialised: what `pretrain` reads. `data_id` and `sha256` name the content, not the file. `vision` is
    the folder of the vision tokenizer that decodes them, None where nothing is drawn.
    """

    path: Path
    data_id: str
    sha256: str
    vocabulary: Vocabulary
    text: TextTokenizer
    context_len: int
    vision: Path | None = None

    def is_written_in(self, vocabulary: Vocabulary, text: TextTokenizer) -> bool:
        """Whether an id means here what it means there."""
        return self.vocabulary == vocabulary and self.text.to_json() == text.to_json()


@dataclass(frozen=True)
class FrameData:
    """Chunks of four frames, materialised: what `train_vision_tokenizer` reads. An image is four equal frames."""

    path: Path
    data_id: str
    sha256: str


@dataclass(frozen=True)
class TokenBatch:
    """Rows as tensors on one device. A label is the next token of the same document; without one its weight is 0.

    `document_ids_BL` counts a row's documents from 0; padding is a document of its own, so nothing attends to it.
    `quarters_BL` says in which quarter of its document a token is, 0..3.
    """

    tokens_BL: Tensor
    labels_BL: Tensor
    weights_BL: Tensor
    positions_BL: Tensor
    document_ids_BL: Tensor
    quarters_BL: Tensor

    def to(self, device: torch.device) -> "TokenBatch":
        """The same batch on another device."""
        return TokenBatch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def columns(self, places: Tensor) -> "TokenBatch":
        """The tokens at these places of every row."""
        return TokenBatch(*(getattr(self, name)[:, places] for name in self.__dataclass_fields__))


def batch_indices(seed: int, step: int, global_batch: int, num_rows: int) -> Rows:
    """Seed and step (from 0) -> the rows of the global batch, (global_batch,), of 0..num_rows-1.

    Every epoch is a fresh permutation, so no row repeats inside an epoch; a batch may hold the end of one epoch and the
    start of the next.
    """
    places = np.arange(step * global_batch, (step + 1) * global_batch)
    epochs = places // num_rows
    rows = np.empty(global_batch, np.int64)
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        rows[inside] = _permutation(seed, int(epoch), num_rows)[places[inside] % num_rows]
    return rows


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_rows: int) -> Rows:
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def worker_share(rows: Rows, rank: int, num_workers: int) -> Rows:
    """The global batch -> the part of one worker. The parts of all workers are the whole, whatever their number."""
    return rows[rank::num_workers]


def write_sequence_file(
    path: Path,
    tokens: Iterable[IntArray],
    segments: Iterable[Sequence[Mapping[str, object]]],
    answers: Iterable[Sequence[Mapping[str, object]]] | None = None,
) -> int:
    """Token ids, segments and answers of each row, in order -> an Arrow IPC file, published whole; the number of rows.

    Raises: SchemaError if segments do not cover their row from end to end.
    """
    num_rows = 0
    with (
        publish_file(path) as draft,
        pa.OSFile(str(draft), "wb") as sink,
        pa.ipc.new_file(sink, SEQUENCE_SCHEMA) as writer,
    ):
        pending: list[dict[str, object]] = []
        rows = zip(tokens, segments, strict=True)
        spans = itertools.repeat(()) if answers is None else iter(answers)
        for (row_tokens, row_segments), row_answers in zip(rows, spans, strict=answers is not None):
            ids = np.ascontiguousarray(row_tokens, TOKEN_TYPE)
            _document_lengths(row_segments, len(ids), num_rows)
            pending.append({"tokens": ids.tobytes(), "segments": list(row_segments), "answers": list(row_answers)})
            num_rows += 1
            if len(pending) == ROWS_PER_RECORD_BATCH:
                writer.write_batch(pa.RecordBatch.from_pylist(pending, SEQUENCE_SCHEMA))
                pending = []
        if pending:
            writer.write_batch(pa.RecordBatch.from_pylist(pending, SEQUENCE_SCHEMA))
    return num_rows


class SequenceFile:
    """Rows of a sequence file by index, without reading the rest.

    Raises: ConfigError if the file is missing or is no such file.
    """

    def __init__(self, path: Path) -> None:
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except (OSError, pa.ArrowInvalid) as error:
            raise ConfigError(f"the sequences {path} cannot be read: {error}") from error
        if table.schema != SEQUENCE_SCHEMA:
            raise ConfigError(f"{path} holds the columns {table.schema.names}, expected {SEQUENCE_SCHEMA.names}")
        self._tokens = table.column("tokens")
        self._segments = table.column("segments")
        self._answers = table.column("answers")
        # What every step asks for, out of the lists of structures once and for all: 8 bytes a document.
        self._first = np.concatenate([[0], np.cumsum(pc.list_value_length(self._segments).to_numpy())])
        fields = pc.list_flatten(self._segments)
        self._offsets, self._lengths = (pc.struct_field(fields, name).to_numpy() for name in ("offset", "length"))

    def __len__(self) -> int:
        return len(self._tokens)

    def tokens(self, row: int) -> npt.NDArray[np.uint32]:
        """A row -> its tokens, uint32, a view of the file."""
        return np.frombuffer(self._tokens[row].as_buffer(), TOKEN_TYPE)

    def segments(self, row: int) -> list[dict[str, object]]:
        """A row -> its documents in order: kind, item_id, offset and length in tokens."""
        return list(self._segments[row].as_py())

    def item_ids(self) -> set[str]:
        """What the documents of all rows are made of."""
        items = pc.struct_field(pc.list_flatten(self._segments), "item_id")
        return set(pc.unique(items).to_pylist())

    def answers(self, row: int) -> list[dict[str, int]]:
        """A row -> the answers of its conversations in order: offset in the row and length, in tokens."""
        return list(self._answers[row].as_py())

    def document_lengths(self, row: int) -> Rows:
        """A row -> tokens of each of its documents.

        Raises: SchemaError if segments do not cover the row from end to end.
        """
        documents = slice(self._first[row], self._first[row + 1])
        num_tokens = self._tokens[row].as_buffer().size // TOKEN_TYPE.itemsize
        return _check_cover(self._offsets[documents], self._lengths[documents], num_tokens, row)


def _document_lengths(segments: Sequence[Mapping[str, object]], num_tokens: int, row: int) -> Rows:
    offsets = np.asarray([segment["offset"] for segment in segments], np.int64)
    lengths = np.asarray([segment["length"] for segment in segments], np.int64)
    return _check_cover(offsets, lengths, num_tokens, row)


def _check_cover(offsets: Rows, lengths: Rows, num_tokens: int, row: int) -> Rows:
    ends = np.cumsum(lengths, dtype=np.int64)
    if not len(ends) or ends[-1] != num_tokens or not np.array_equal(offsets, ends - lengths) or lengths.min() < 1:
        found = list(zip(offsets.tolist(), lengths.tolist(), strict=True))
        raise SchemaError(f"row {row}: found segments {found}, expected them to cover its {num_tokens} tokens in order")
    return lengths


def token_batch(
    file: SequenceFile, rows: Rows, data: SequenceData, token_weights: TokenWeights, length: int | None = None
) -> TokenBatch:
    """Rows of a sequence file -> a batch padded to `length`, or to the context length.

    Raises: SchemaError if a row is longer than the context, or holds an id outside the vocabulary.
    """
    vocabulary = data.vocabulary
    shape = (len(rows), length or data.context_len)
    tokens = np.full(shape, vocabulary.pad, np.int64)
    documents: list[Rows] = []  # lengths of each row's documents, padding as one more
    for place, row in enumerate(rows):
        ids = file.tokens(int(row))
        if len(ids) > data.context_len or ids.max() >= vocabulary.size:
            found = f"{len(ids)} tokens with ids up to {ids.max()}"
            expected = f"at most {data.context_len} tokens with ids below {vocabulary.size}"
            raise SchemaError(f"row {row} of {file}: found {found}, expected {expected}")
        tokens[place, : len(ids)] = ids
        documents.append(np.append(file.document_lengths(int(row)), shape[1] - len(ids)))
    labels = np.empty(shape, np.int64)
    labels[:, :-1], labels[:, -1] = tokens[:, 1:], vocabulary.pad
    weights = _weight_table(vocabulary, token_weights)[labels]
    for place, (row, lengths) in enumerate(zip(rows, documents, strict=True)):
        ends = np.cumsum(lengths[:-1])
        labels[place, ends - 1] = vocabulary.pad  # the last token of a document predicts nothing
        weights[place, ends - 1] = 0.0
        weights[place, ends[-1] :] = 0.0
        _keep_answers(weights[place], ends, file.answers(int(row)))
    lengths = np.concatenate(documents)
    numbers = np.concatenate([np.arange(len(row)) for row in documents])
    starts = np.concatenate([np.cumsum(row) - row for row in documents])
    positions = np.arange(shape[1]) - np.repeat(starts, lengths).reshape(shape)
    document_ids = np.repeat(numbers, lengths).reshape(shape)
    edges = -(-lengths[:, None] * np.arange(5) // 4)
    quarters = np.repeat(np.tile(np.arange(4, dtype=np.int8), len(lengths)), np.diff(edges).ravel()).reshape(shape)
    parts = (tokens, labels, weights, positions, document_ids, quarters)
    return TokenBatch(*(torch.from_numpy(part) for part in parts))


@lru_cache(maxsize=4)
def _weight_table(vocabulary: Vocabulary, token_weights: TokenWeights) -> npt.NDArray[np.float32]:
    """What each id weighs as a label."""
    return loss_weights(np.arange(vocabulary.size), vocabulary, token_weights)


def _keep_answers(weights_L: npt.NDArray[np.float32], ends: Rows, answers: Sequence[Mapping[str, int]]) -> None:
    """Take the weight from all but the answers of each document that holds some; `ends` are where documents end.

    Paper: Emu3 report, section 2.5.2: when the model learns to understand, neither pictures nor questions are learnt.
    """
    if not answers:
        return
    learnt = np.zeros(len(weights_L), np.bool_)
    chats = np.zeros(len(weights_L), np.bool_)
    for span in answers:
        first = span["offset"]
        learnt[first - 1 : first - 1 + span["length"]] = True  # the label of a place is the token after it
        document = int(np.searchsorted(ends, first, side="right"))
        chats[ends[document - 1] if document else 0 : ends[document]] = True
    weights_L[chats & ~learnt] = 0.0


def write_frame_file(path: Path, chunks: Iterable[Frames], num_chunks: int, size_px: tuple[int, int]) -> None:
    """Chunks of frames (4, H, W, 3) uint8 RGB -> a .npy file (num_chunks, 4, H, W, 3), published whole.

    `size_px` is (height, width).

    Raises: SchemaError if a chunk has another shape or type, or their number is another.
    """
    expected = (FRAMES_PER_CHUNK, *size_px, 3)
    with publish_file(path) as draft:
        out = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
            draft, mode="w+", dtype=np.uint8, shape=(num_chunks, *expected)
        )
        written = 0
        for chunk in chunks:
            if chunk.shape != expected or chunk.dtype != np.uint8 or written == num_chunks:
                found = f"{chunk.dtype} of shape {chunk.shape}"
                raise SchemaError(f"chunk {written}: found {found}, expected {num_chunks} of uint8, shape {expected}")
            out[written] = chunk
            written += 1
        if written != num_chunks:
            raise SchemaError(f"found {written} chunks of frames, expected {num_chunks}")
        out.flush()
        del out


class FrameFile:
    """Chunks of a frame file by index, without reading the rest.

    Raises: ConfigError if the file is missing or is no such file.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._chunks = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise ConfigError(f"the frames {path} cannot be read: {error}") from error
        shape = self._chunks.shape
        if self._chunks.dtype != np.uint8 or len(shape) != 5 or (shape[1], shape[4]) != (FRAMES_PER_CHUNK, 3):
            found = f"{self._chunks.dtype} of shape {shape}"
            raise ConfigError(f"{path} holds {found}, expected uint8 of shape (N, {FRAMES_PER_CHUNK}, H, W, 3)")

    def __len__(self) -> int:
        return len(self._chunks)

    def read(self, rows: Rows) -> Frames:
        """Rows -> chunks (B, 4, H, W, 3) uint8 RGB."""
        return np.ascontiguousarray(self._chunks[rows])


@lru_cache(maxsize=2)
def open_sequences(path: Path) -> SequenceFile:
    """A path -> its sequence file, opened once per process."""
    return SequenceFile(path)


@lru_cache(maxsize=2)
def open_frames(path: Path) -> FrameFile:
    """A path -> its frame file, opened once per process."""
    return FrameFile(path)
