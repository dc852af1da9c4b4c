"""The document grammar against the published worked example, and its own round trips."""

import pickle
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.document import (
    Document,
    DocumentError,
    Grammar,
    InterleavedDocument,
    Kind,
    MetaTemplate,
    TextDocument,
    TokenWeights,
    VisionBlock,
    VisionDocument,
    loss_weights,
    parse_document,
    prompt_tokens,
    write_document,
)
from schemas.errors import RowError, SchemaError
from schemas.vocabulary import EMU3, Vocabulary

SMALL = Vocabulary(num_text=256, num_codes=64)
HOSTILE = [*SMALL.special_strings().values(), SMALL.vision_string(3), "*", "8*8", "1*2*3, 24 fps, 0.17 s"]


class Bytes:
    """The simplest text tokenizer: one id for each byte."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


@dataclass
class Table:
    """A tokenizer that knows the words it was given."""

    words: dict[str, list[int]] = field(default_factory=dict)

    def encode(self, text: str) -> list[int]:
        return self.words[text]

    def decode(self, ids: list[int]) -> str:
        return next(word for word, found in self.words.items() if found == ids)


CAPTIONS = st.one_of(st.text(max_size=30), st.lists(st.sampled_from(HOSTILE), max_size=4).map("".join))
SIDES = st.integers(1, 5)
META = st.sampled_from(MetaTemplate)


@st.composite
def vision_documents(draw: st.DrawFn) -> VisionDocument:
    kind: Kind = draw(st.sampled_from(["image", "video"]))
    grid = (1 if kind == "image" else draw(SIDES), draw(SIDES), draw(SIDES))
    size = grid[0] * grid[1] * grid[2]
    codes = np.array(draw(st.lists(st.integers(0, 63), min_size=size, max_size=size))).reshape(grid)
    fps = draw(st.none() | st.floats(0.001, 1000)) if kind == "video" else None
    return VisionDocument(VisionBlock(kind, codes, fps), draw(CAPTIONS), caption_last=draw(st.booleans()))


def test_image_document_is_the_published_worked_example() -> None:
    text = Table({"a cat": [64, 8251], "2*3": [17, 9, 18], "": []})
    document = VisionDocument(VisionBlock("image", np.array([[[1, 1, 1], [2, 2, 2]]])), "a cat")
    tokens = write_document(document, EMU3, text)
    row_1, row_2 = [151855] * 3, [151856] * 3
    expected = [151849, 64, 8251, 151852, 17, 9, 18, 151851]
    expected += [*row_1, 151846, *row_2, 151846, 151847, 151853, 151850]
    assert tokens.tolist() == expected
    assert tokens.dtype == np.uint32
    assert parse_document(tokens, EMU3, text) == document


def test_video_document_closes_rows_and_latent_frames() -> None:
    document = VisionDocument(VisionBlock("video", np.arange(8).reshape(2, 2, 2), 24), "hi")
    tokens = write_document(document, SMALL, Bytes())
    v = SMALL.code_to_token(np.arange(8)).tolist()
    frames = [*v[0:2], SMALL.eol, *v[2:4], SMALL.eol, SMALL.eof, *v[4:6], SMALL.eol, *v[6:8], SMALL.eol, SMALL.eof]
    head = [SMALL.bos, *b"hi", SMALL.boi, *b"2*2*2, 24 fps, 0.33 s", SMALL.img]
    assert tokens.tolist() == [*head, *frames, SMALL.eoi, SMALL.eos]
    assert document.block.duration_s == 0.33


def test_univla_preset_has_no_rows() -> None:
    document = VisionDocument(VisionBlock("video", np.arange(8).reshape(2, 2, 2)), "")
    tokens = write_document(document, SMALL, Bytes(), meta=MetaTemplate.UNIVLA)
    v = SMALL.code_to_token(np.arange(8)).tolist()
    expected = [SMALL.bos, SMALL.boi, *b"2*2*2", SMALL.img, *v[:4], SMALL.eof, *v[4:], SMALL.eof, SMALL.eoi, SMALL.eos]
    assert tokens.tolist() == expected
    assert parse_document(tokens, SMALL, Bytes(), meta=MetaTemplate.UNIVLA) == document


@given(vision_documents(), META)
def test_vision_documents_round_trip(document: VisionDocument, meta: MetaTemplate) -> None:
    tokens = write_document(document, SMALL, Bytes(), meta=meta)
    found = parse_document(tokens, SMALL, Bytes(), meta=meta)
    if meta is MetaTemplate.UNIVLA:  # its meta text has no rate
        document = replace(document, block=replace(document.block, fps=None))
    assert found == document
    assert int(np.isin(tokens, [SMALL.boi]).sum()) == 1
    assert int(np.isin(tokens, [SMALL.eos]).sum()) == 1


@given(st.lists(st.one_of(CAPTIONS, vision_documents().map(lambda document: document.block)), max_size=5), META)
def test_interleaved_documents_round_trip(parts: list[str | VisionBlock], meta: MetaTemplate) -> None:
    if meta is MetaTemplate.UNIVLA:
        parts = [part if isinstance(part, str) else replace(part, fps=None) for part in parts]
    tokens = write_document(InterleavedDocument(tuple(parts)), SMALL, Bytes(), meta=meta)
    found = parse_document(tokens, SMALL, Bytes(), meta=meta)
    assert InterleavedDocument(found.parts) == InterleavedDocument(tuple(parts))
    num_blocks = sum(isinstance(part, VisionBlock) for part in parts)
    assert int(np.isin(tokens, [SMALL.boi]).sum()) == num_blocks
    assert isinstance(found, TextDocument) == (num_blocks == 0)
    assert write_document(found, SMALL, Bytes(), meta=meta).tolist() == tokens.tolist()


@given(CAPTIONS)
def test_text_never_becomes_a_control_token(caption: str) -> None:
    tokens = write_document(TextDocument(caption), SMALL, Bytes())
    assert SMALL.is_text(tokens[1:-1]).all()
    assert parse_document(tokens, SMALL, Bytes()) == TextDocument(caption)


def test_a_tokenizer_that_recognises_special_strings_is_refused() -> None:
    text = Table({"<|image start|>": [EMU3.boi], "1*1": [16, 9, 16]})
    document = VisionDocument(VisionBlock("image", np.zeros((1, 1, 1), np.int64)), "<|image start|>")
    with pytest.raises(SchemaError, match="recognises special tokens"):
        write_document(document, EMU3, text)


@given(vision_documents(), META)
def test_grammar_tells_each_next_token(document: VisionDocument, meta: MetaTemplate) -> None:
    document = VisionDocument(document.block, document.caption)
    tokens = write_document(document, SMALL, Bytes(), meta=meta)
    args = (document.caption, document.block.kind, document.block.grid, document.block.fps, SMALL, Bytes())
    prompt = prompt_tokens(*args, meta=meta)
    assert tokens[: len(prompt)].tolist() == prompt.tolist()
    assert prompt[-1] == SMALL.img
    grammar = Grammar(SMALL, document.block.kind, document.block.grid, meta)
    after = tokens[len(prompt) :]
    assert grammar.length == len(after)
    for place, token in enumerate(after.tolist()):
        forced = grammar.forced_token(place)
        assert forced == token if forced is not None else SMALL.is_vision(np.array(token))
        assert np.flatnonzero(grammar.allowed(place)).tolist() == (
            [forced] if forced is not None else list(range(467, 531))
        )
    assert grammar.forced_token(len(after)) == SMALL.pad


@given(vision_documents(), st.data())
def test_a_changed_token_is_another_document_or_an_error(document: VisionDocument, data: st.DataObject) -> None:
    tokens = write_document(document, SMALL, Bytes())
    place = data.draw(st.integers(0, len(tokens) - 1))
    changed = tokens.copy()
    changed[place] = data.draw(st.integers(0, SMALL.size + 3).filter(lambda token: token != tokens[place]))
    try:
        found: Document = parse_document(changed, SMALL, Bytes())
    except DocumentError:
        return
    again = write_document(found, SMALL, Bytes())
    is_exact = again.tolist() == changed.tolist()
    # Bytes that are no UTF-8 come back as the replacement character.
    assert is_exact or "\ufffd" in "".join(part for part in found.parts if isinstance(part, str))


@given(vision_documents(), st.data())
def test_a_cut_document_is_an_error(document: VisionDocument, data: st.DataObject) -> None:
    tokens = write_document(document, SMALL, Bytes())
    with pytest.raises(DocumentError):
        parse_document(tokens[: data.draw(st.integers(0, len(tokens) - 1))], SMALL, Bytes())


def test_errors_name_place_found_and_expected() -> None:
    tokens = write_document(VisionDocument(VisionBlock("image", np.zeros((1, 2, 2), np.int64)), "x"), SMALL, Bytes())
    tokens[9] = SMALL.eof  # the row's end
    with pytest.raises(DocumentError, match=r"found <\|extra_201\|> .* expected <\|extra_200\|>"):
        parse_document(tokens, SMALL, Bytes())
    with pytest.raises(DocumentError, match="'8x8'"):
        MetaTemplate.OUTBACK.parse("8x8")
    with pytest.raises(DocumentError, match="meta text"):
        MetaTemplate.OUTBACK.parse("2*2*2, 24 fps, 9 s")  # the duration does not follow from the rest
    huge = [SMALL.bos, SMALL.boi, *b"999999999*999999999", SMALL.img, SMALL.eos]
    with pytest.raises(DocumentError, match="document_truncated"):
        parse_document(np.array(huge), SMALL, Bytes())


@pytest.mark.parametrize(
    ("kind", "shape", "fps"),
    [
        ("image", (2, 2, 2), None),
        ("image", (1, 2, 2), 24.0),
        ("video", (2, 2, 2), 0.0),
        ("video", (2, 2, 2), float("nan")),
        ("video", (2, 2), 24.0),
        ("video", (0, 2, 2), 24.0),
        ("film", (1, 2, 2), 24.0),
    ],
)
def test_contradictory_documents_are_refused(kind: str, shape: tuple[int, ...], fps: float | None) -> None:
    with pytest.raises(DocumentError):
        VisionBlock(kind, np.zeros(shape, np.int64), fps)  # type: ignore[arg-type]


def test_invalid_unicode_is_a_bad_row() -> None:
    with pytest.raises(RowError, match="Unicode"):
        write_document(TextDocument("\ud800"), SMALL, Bytes())


def test_errors_survive_pickling() -> None:
    error = DocumentError("document_meta", "found x, expected y")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is DocumentError
    assert str(again) == str(error)


def test_codes_weigh_half() -> None:
    tokens = write_document(VisionDocument(VisionBlock("image", np.zeros((1, 2, 2), np.int64)), "x"), SMALL, Bytes())
    weights = loss_weights(tokens, SMALL, TokenWeights())
    assert weights.dtype == np.float32
    assert (weights[SMALL.is_vision(tokens)] == 0.5).all()
    assert (weights[~SMALL.is_vision(tokens)] == 1.0).all()
    assert int(SMALL.is_vision(tokens).sum()) == 4


def test_what_stands_between_codes_can_weigh_otherwise() -> None:
    tokens = write_document(VisionDocument(VisionBlock("image", np.zeros((1, 2, 2), np.int64)), "x"), SMALL, Bytes())
    weights = loss_weights(tokens, SMALL, TokenWeights(vision=1.0, structure=0.25, text=0.0))
    structure = [SMALL.eol, SMALL.eol, SMALL.eof, SMALL.eoi]
    assert [token for token, weight in zip(tokens, weights, strict=True) if weight == 0.25] == structure
    assert (weights[SMALL.is_vision(tokens)] == 1.0).all()
    assert set(tokens[weights == 0].tolist()) >= {SMALL.bos, SMALL.boi, SMALL.img, SMALL.eos, ord("x")}
