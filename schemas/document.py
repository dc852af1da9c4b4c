"""The grammar of a document: write one as tokens, parse it back, say what may come next, weigh it for the loss.

    text      BOS text EOS
    image     BOS caption BOI "h*w" IMG (h rows, each closed by EOL) EOF EOI EOS
    video     BOS caption BOI meta  IMG (t latent frames: h rows closed by EOL, then EOF) EOI EOS

An image is a video of one latent frame with another meta text. With `caption_last` the caption stands between EOI and
EOS, for models that describe what they see; interleaved documents have texts and blocks from BOI to EOI in any order. The
image form is Emu3's. Its video form is not public: here the meta text
is `t*h*w, 24 fps, 5 s` (grid of codes, frame rate and duration of the clip, or the grid alone when the rate is
unknown), ours. `MetaTemplate.UNIVLA` writes what UniVLA's published models read: `t*h*w` and frames without EOL.

Text ids come from the codec alone and must be below `num_text`, so text never becomes a control token.
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from schemas.errors import RowError, SchemaError
from schemas.vocabulary import IntArray, Vocabulary

Tokens = npt.NDArray[np.uint32]
Grid = tuple[int, int, int]  # latent frames, rows, columns of codes
Kind = Literal["image", "video"]

FRAMES_PER_LATENT = 4  # Emu3 report, table 1: the vision tokenizer makes one latent frame of four frames
_NUMBER = r"(?:0|[1-9]\d*)(?:\.\d*[1-9])?"
_IMAGE_META = re.compile(r"([1-9]\d*)\*([1-9]\d*)", re.ASCII)
_VIDEO_META = re.compile(rf"([1-9]\d*)\*([1-9]\d*)\*([1-9]\d*)(?:, ({_NUMBER}) fps, ({_NUMBER}) s)?", re.ASCII)


class DocumentError(RowError):
    """Tokens are no document, or values cannot be one. The message says where, what was found and what was expected."""

    def __reduce__(self) -> tuple[object, ...]:
        return (DocumentError, (self.reason, self.message))


class TextCodec(Protocol):
    """What a text tokenizer must offer: ids of ordinary text only, whatever the text contains."""

    def encode(self, text: str) -> list[int]:
        """Text -> ids."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Ids -> text."""
        ...


class MetaTemplate(StrEnum):
    """How the meta text and the frames of a video are written. Images have one form."""

    OUTBACK = "outback"
    UNIVLA = "univla"

    @property
    def rows_end(self) -> bool:
        """Whether EOL closes each row of a video's frames."""
        return self is MetaTemplate.OUTBACK

    def write(self, kind: Kind, grid: Grid, fps: float | None) -> str:
        """Kind, grid and frame rate -> the meta text."""
        t, h, w = grid
        if kind == "image":
            return f"{h}*{w}"
        if fps is None or self is MetaTemplate.UNIVLA:
            return f"{t}*{h}*{w}"
        return f"{t}*{h}*{w}, {_number(fps)} fps, {_number(duration_s(t, fps))} s"

    def parse(self, meta: str) -> tuple[Kind, Grid, float | None]:
        """A meta text -> kind, grid and frame rate.

        Raises: DocumentError if this template writes no such text.
        """
        if image := _IMAGE_META.fullmatch(meta):
            return "image", (1, int(image[1]), int(image[2])), None
        video = _VIDEO_META.fullmatch(meta)
        if video is not None:
            grid = (int(video[1]), int(video[2]), int(video[3]))
            fps = None if video[4] is None else float(video[4])
            if (fps is None or fps > 0) and self.write("video", grid, fps) == meta:
                return "video", grid, fps
        expected = self.write("video", (5, 8, 8), 24.0)
        raise DocumentError("document_meta", f"found the meta text {meta!r}, expected one like '8*8' or {expected!r}")


@dataclass(frozen=True, eq=False)
class VisionBlock:
    """An image or a clip as integer codes (t, h, w). `fps` is the clip's frame rate before encoding.

    `fps` is kept to three decimals, the precision that the meta text holds. An image has one latent frame and no rate.

    Raises: DocumentError if the values contradict each other.
    """

    kind: Kind
    codes: IntArray
    fps: float | None = None

    def __post_init__(self) -> None:
        codes = np.asarray(self.codes)
        if codes.ndim != 3 or codes.size == 0 or not np.issubdtype(codes.dtype, np.integer):
            found = f"{codes.dtype} of shape {codes.shape}"
            raise DocumentError("document_codes", f"found codes as {found}, expected integers of shape (t, h, w)")
        t, h, w = codes.shape
        object.__setattr__(self, "codes", codes)
        object.__setattr__(self, "fps", checked_fps(self.kind, (t, h, w), self.fps))

    @property
    def grid(self) -> Grid:
        """Latent frames, rows, columns."""
        t, h, w = self.codes.shape
        return t, h, w

    @property
    def duration_s(self) -> float | None:
        """Length of the clip, None for an image or an unknown frame rate."""
        return None if self.fps is None else duration_s(self.grid[0], self.fps)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, VisionBlock):
            return NotImplemented
        return (self.kind, self.fps) == (other.kind, other.fps) and np.array_equal(self.codes, other.codes)

    def __hash__(self) -> int:
        return hash((self.kind, self.fps, self.codes.tobytes()))


Part = str | VisionBlock


@dataclass(frozen=True)
class TextDocument:
    """Language data."""

    text: str

    @property
    def parts(self) -> tuple[Part, ...]:
        """What stands between BOS and EOS."""
        return (self.text,)


@dataclass(frozen=True)
class VisionDocument:
    """An image or a clip with its caption, before it or after it."""

    block: VisionBlock
    caption: str = ""
    caption_last: bool = False

    def __post_init__(self) -> None:
        # Without a caption both orders are the same tokens.
        object.__setattr__(self, "caption_last", self.caption_last and self.caption != "")

    @property
    def parts(self) -> tuple[Part, ...]:
        """What stands between BOS and EOS."""
        return (self.block, self.caption) if self.caption_last else (self.caption, self.block)


@dataclass(frozen=True)
class InterleavedDocument:
    """Texts, images and clips in any order. Texts that follow one another are one, and empty ones are none."""

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        parts: list[Part] = []
        for part in self.parts:
            if isinstance(part, str) and parts and isinstance(parts[-1], str):
                parts[-1] += part
            elif part != "":
                parts.append(part)
        object.__setattr__(self, "parts", tuple(parts))


Document = TextDocument | VisionDocument | InterleavedDocument


@dataclass(frozen=True)
class Grammar:
    """What follows IMG, token by token, for one grid: the state machine behind writing, parsing and generating."""

    vocabulary: Vocabulary
    kind: Kind
    grid: Grid
    meta: MetaTemplate = MetaTemplate.OUTBACK

    def __post_init__(self) -> None:
        checked_fps(self.kind, self.grid, None)

    @property
    def rows_end(self) -> bool:
        """Whether EOL closes each row."""
        return self.kind == "image" or self.meta.rows_end

    @property
    def frame_length(self) -> int:
        """Tokens of one latent frame with its EOL and EOF."""
        _, h, w = self.grid
        return h * (w + self.rows_end) + 1

    @property
    def length(self) -> int:
        """Tokens after IMG up to and including EOS."""
        return self.grid[0] * self.frame_length + 2

    @cached_property
    def layout(self) -> npt.NDArray[np.int64]:
        """The forced token at each place after IMG, EOS included, or -1 where any vision token may stand."""
        t, h, w = self.grid
        rows = np.full((h, w + self.rows_end), -1, np.int64)
        if self.rows_end:
            rows[:, w] = self.vocabulary.eol
        frame = np.append(rows.ravel(), self.vocabulary.eof)
        return np.concatenate([np.tile(frame, t), [self.vocabulary.eoi, self.vocabulary.eos]])

    def forced_token(self, num_written: int) -> int | None:
        """Number of tokens already after IMG -> the only token that may come next, or None for any vision token."""
        if num_written >= self.length:
            return self.vocabulary.pad
        token = int(self.layout[num_written])
        return None if token < 0 else token

    def allowed(self, num_written: int) -> npt.NDArray[np.bool_]:
        """Number of tokens already after IMG -> which ids of the vocabulary may come next."""
        mask = np.zeros(self.vocabulary.size, np.bool_)
        token = self.forced_token(num_written)
        if token is None:
            mask[self.vocabulary.vision_offset :] = True
        else:
            mask[token] = True
        return mask

    def write(self, codes: IntArray) -> Tokens:
        """Codes (k, h, w) of the first k <= t latent frames -> their tokens; with k = t also EOI, but not EOS."""
        t, h, w = self.grid
        if codes.ndim != 3 or codes.shape[1:] != (h, w) or not 0 <= len(codes) <= t:
            raise DocumentError("document_codes", f"found codes of shape {codes.shape}, expected at most {self.grid}")
        num_tokens = self.length - 1 if len(codes) == t else len(codes) * self.frame_length
        tokens = self.layout[:num_tokens].copy()
        tokens[tokens < 0] = self.vocabulary.code_to_token(codes).ravel()
        return tokens.astype(np.uint32)

    def parse(self, tokens: IntArray) -> npt.NDArray[np.int64]:
        """Tokens from the one after IMG to EOI -> codes (t, h, w).

        Raises: DocumentError naming the first token that may not stand where it does.
        """
        layout = self.layout[:-1]
        found = np.asarray(tokens)[: len(layout)].astype(np.int64)
        expected = layout[: len(found)]
        slots = expected < 0
        wrong = np.flatnonzero(np.where(slots, ~self.vocabulary.is_vision(found), found != expected))
        if len(wrong):
            place = int(wrong[0])
            wanted = "a vision token" if slots[place] else _name(int(expected[place]), self.vocabulary)
            raise DocumentError(
                "document_grid",
                f"found {_name(int(found[place]), self.vocabulary)} {place} tokens after IMG, "
                f"expected {wanted} for the grid {self.grid}",
            )
        if len(found) < len(layout):
            raise DocumentError(
                "document_truncated",
                f"found {len(found)} tokens after IMG, expected {len(layout)} up to EOI for the grid {self.grid}",
            )
        return self.vocabulary.token_to_code(found[slots]).reshape(self.grid)


def write_document(
    document: Document, vocabulary: Vocabulary, text: TextCodec, *, meta: MetaTemplate = MetaTemplate.OUTBACK
) -> Tokens:
    """A document -> its tokens from BOS to EOS, uint32.

    Raises: DocumentError if the text is not encodable; SchemaError if a code or a text id is outside the vocabulary.
    """
    written = [
        text_tokens(part, vocabulary, text)
        if isinstance(part, str)
        else block_tokens(part, vocabulary, text, meta=meta)
        for part in document.parts
    ]
    return _join([vocabulary.bos], *written, [vocabulary.eos])


def block_tokens(
    block: VisionBlock, vocabulary: Vocabulary, text: TextCodec, *, meta: MetaTemplate = MetaTemplate.OUTBACK
) -> Tokens:
    """An image or a clip -> its tokens from BOI to EOI, uint32."""
    opening = _opening_tokens(block.kind, block.grid, block.fps, vocabulary, text, meta)
    return _join(opening, Grammar(vocabulary, block.kind, block.grid, meta).write(block.codes))


def prompt_tokens(
    caption: str,
    kind: Kind,
    grid: Grid,
    fps: float | None,
    vocabulary: Vocabulary,
    text: TextCodec,
    *,
    meta: MetaTemplate = MetaTemplate.OUTBACK,
) -> Tokens:
    """A caption and the form of what it describes -> everything up to and including IMG, uint32."""
    opening = _opening_tokens(kind, grid, fps, vocabulary, text, meta)
    return _join([vocabulary.bos], text_tokens(caption, vocabulary, text), opening)


def parse_document(
    tokens: IntArray, vocabulary: Vocabulary, text: TextCodec, *, meta: MetaTemplate = MetaTemplate.OUTBACK
) -> Document:
    """Tokens from BOS to EOS -> the document that `write_document` would write as these tokens.

    Raises: DocumentError with the place, what was found and what was expected.
    """
    ids = np.asarray(tokens).astype(np.int64)
    if ids.ndim != 1:
        raise DocumentError("document_shape", f"found tokens of shape {ids.shape}, expected one row")
    place = _expect(ids, 0, vocabulary.bos, vocabulary)
    parts: list[Part] = []
    while True:
        string, place = _read_text(ids, place, vocabulary, text)
        parts.append(string)
        if place < len(ids) and ids[place] == vocabulary.eos:
            break
        block, place = _read_block(ids, place, vocabulary, text, meta)
        parts.append(block)
    if place + 1 != len(ids):
        found = _name(int(ids[place + 1]), vocabulary)
        raise DocumentError("document_token", f"found {found} at place {place + 1}, after EOS, expected the end")
    match parts:
        case [str(only)]:
            return TextDocument(only)
        case [str(before), VisionBlock() as block, ""]:
            return VisionDocument(block, before)
        case ["", VisionBlock() as block, str(after)]:
            return VisionDocument(block, after, caption_last=True)
    return InterleavedDocument(tuple(parts))


@dataclass(frozen=True)
class TokenWeights:
    """What each kind of token weighs as a target, 0 if it is not learnt: codes; EOL, EOF and EOI, which stand between
    codes; and everything else, meta text included.

    Paper: Emu3 report, section 2.4: vision tokens weigh 0.5 so that they do not drown the text. That the structure weighs
    like text is ours: the paper does not say.
    """

    vision: float = 0.5
    structure: float = 1.0
    text: float = 1.0


def loss_weights(tokens: IntArray, vocabulary: Vocabulary, weights: TokenWeights) -> npt.NDArray[np.float32]:
    """Tokens of any shape -> the weight of each as a target."""
    found = np.where(vocabulary.is_vision(tokens), weights.vision, weights.text).astype(np.float32)
    found[np.isin(tokens, (vocabulary.eol, vocabulary.eof, vocabulary.eoi))] = weights.structure
    return found


def text_tokens(string: str, vocabulary: Vocabulary, text: TextCodec) -> Tokens:
    """Text -> its ids, uint32, all of them below `num_text`: what a user writes is never a control token.

    Raises: DocumentError if the string is not valid Unicode; SchemaError if the codec gives another kind of id.
    """
    try:
        string.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DocumentError("document_text", f"found text that is not valid Unicode: {error}") from error
    ids = np.asarray(text.encode(string), np.int64)
    if not vocabulary.is_text(ids).all():
        wrong = int(ids[~vocabulary.is_text(ids)][0])
        raise SchemaError(
            f"the text tokenizer gave the id {wrong} for ordinary text, expected 0..{vocabulary.num_text - 1}: "
            "it belongs to another vocabulary, or recognises special tokens in text"
        )
    return ids.astype(np.uint32)


def duration_s(num_latents: int, fps: float) -> float:
    """Latent frames and frames per second of the clip -> seconds, to two decimals as the meta text holds them."""
    return round(num_latents * FRAMES_PER_LATENT / fps, 2)


def checked_fps(kind: str, grid: Grid, fps: float | None) -> float | None:
    """Kind, grid and frame rate -> the rate to three decimals, once the three agree.

    Raises: DocumentError if they contradict each other.
    """
    if kind not in ("image", "video"):
        raise DocumentError("document_kind", f"found the kind {kind!r}, expected 'image' or 'video'")
    if min(grid) < 1:
        raise DocumentError("document_grid", f"found the grid {grid}, expected (t, h, w) of at least 1")
    if kind == "image" and (grid[0] != 1 or fps is not None):
        raise DocumentError(
            "document_kind", f"found an image with {grid[0]} latent frames and fps {fps}, expected 1, None"
        )
    if fps is None:
        return None
    if not 0.001 <= fps <= 1000:  # False for NaN too
        raise DocumentError("document_fps", f"found {fps} frames per second, expected 0.001 to 1000")
    return round(float(fps), 3)


def _opening_tokens(
    kind: Kind, grid: Grid, fps: float | None, vocabulary: Vocabulary, text: TextCodec, meta: MetaTemplate
) -> Tokens:
    """BOI, the meta text, IMG."""
    meta_text = meta.write(kind, grid, checked_fps(kind, grid, fps))
    return _join([vocabulary.boi], text_tokens(meta_text, vocabulary, text), [vocabulary.img])


def _number(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".")


def _join(*parts: list[int] | Tokens) -> Tokens:
    return np.concatenate([np.asarray(part, np.uint32) for part in parts])


def _name(token: int, vocabulary: Vocabulary) -> str:
    if token < vocabulary.num_text:
        return f"text id {token}"
    if token >= vocabulary.vision_offset:
        return f"vision token {token}" if token < vocabulary.size else f"unknown id {token}"
    return f"{vocabulary.special_strings()[token]} ({token})"


def _expect(ids: npt.NDArray[np.int64], place: int, token: int, vocabulary: Vocabulary) -> int:
    wanted = _name(token, vocabulary)
    if place >= len(ids):
        raise DocumentError("document_truncated", f"found the end after {place} tokens, expected {wanted}")
    if ids[place] != token:
        found = _name(int(ids[place]), vocabulary)
        raise DocumentError("document_token", f"found {found} at place {place}, expected {wanted}")
    return place + 1


def _read_block(
    ids: npt.NDArray[np.int64], place: int, vocabulary: Vocabulary, text: TextCodec, meta: MetaTemplate
) -> tuple[VisionBlock, int]:
    place = _expect(ids, place, vocabulary.boi, vocabulary)
    meta_text, place = _read_text(ids, place, vocabulary, text)
    place = _expect(ids, place, vocabulary.img, vocabulary)
    kind, grid, fps = meta.parse(meta_text)
    grammar = Grammar(vocabulary, kind, grid, meta)
    if grammar.length - 1 > len(ids) - place:  # before `layout` is built: a meta text may claim any size
        found = len(ids) - place
        raise DocumentError(
            "document_truncated", f"found {found} tokens after IMG, expected {grammar.length} for the grid {grid}"
        )
    return VisionBlock(kind, grammar.parse(ids[place:]), fps), place + grammar.length - 1


def _read_text(ids: npt.NDArray[np.int64], place: int, vocabulary: Vocabulary, text: TextCodec) -> tuple[str, int]:
    others = np.flatnonzero(~vocabulary.is_text(ids[place:]))
    end = place + int(others[0]) if len(others) else len(ids)
    return text.decode(ids[place:end].tolist()), end
