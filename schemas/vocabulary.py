"""The id space of the language model: text ids, then 211 special tokens, then one id per vision code.

The layout is Emu3's at any size, so a small model differs from the published one in two numbers only. A code is
0..num_codes-1 and belongs to the vision tokenizer; a token is an id in this joint vocabulary.
"""

import json
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from schemas.errors import ConfigError, SchemaError

IntArray = npt.NDArray[np.integer]

NUM_EXTRA = 205  # <|extra_0|> .. <|extra_204|>
SPECIAL_STRINGS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{index}|>" for index in range(NUM_EXTRA)),
    "<|image token|>",
    "<|image start|>",
    "<|image end|>",
)
NUM_SPECIALS = len(SPECIAL_STRINGS)  # 211
_FIRST_EXTRA = SPECIAL_STRINGS.index("<|extra_0|>")


@dataclass(frozen=True)
class Vocabulary:
    """Sizes of the two open parts of the id space; every id follows from them.

    Raises: ConfigError if a size is below 1.
    """

    num_text: int
    num_codes: int

    def __post_init__(self) -> None:
        if self.num_text < 1 or self.num_codes < 1:
            raise ConfigError(f"{self} is no vocabulary: num_text and num_codes must be at least 1")

    @property
    def pad(self) -> int:
        """Padding; also the end-of-text id of plain text models."""
        return self.num_text

    @property
    def eol(self) -> int:
        """End of a row of codes."""
        return self._extra(200)

    @property
    def eof(self) -> int:
        """End of a latent frame."""
        return self._extra(201)

    @property
    def tms(self) -> int:
        """Time stamp; reserved, used by no format here."""
        return self._extra(202)

    @property
    def bos(self) -> int:
        """Start of a document."""
        return self._extra(203)

    @property
    def eos(self) -> int:
        """End of a document."""
        return self._extra(204)

    @property
    def img(self) -> int:
        """Between the meta text and the codes ([SOT] in the paper)."""
        return self.num_text + NUM_SPECIALS - 3

    @property
    def boi(self) -> int:
        """Start of an image or video block ([SOV] in the paper)."""
        return self.num_text + NUM_SPECIALS - 2

    @property
    def eoi(self) -> int:
        """End of an image or video block ([EOV] in the paper)."""
        return self.num_text + NUM_SPECIALS - 1

    @property
    def vision_offset(self) -> int:
        """The token of code 0."""
        return self.num_text + NUM_SPECIALS

    @property
    def size(self) -> int:
        """Number of ids, the embedding rows of a model."""
        return self.vision_offset + self.num_codes

    def code_to_token(self, codes: IntArray) -> npt.NDArray[np.uint32]:
        """Codes of any shape -> tokens of the same shape, uint32.

        Raises: SchemaError if a code is outside 0..num_codes-1: another vision tokenizer made it.
        """
        values = np.asarray(codes)
        _check_range(values, 0, self.num_codes, "code")
        return (values.astype(np.int64) + self.vision_offset).astype(np.uint32)

    def token_to_code(self, tokens: IntArray) -> npt.NDArray[np.int64]:
        """Vision tokens of any shape -> codes of the same shape, int64.

        Raises: SchemaError if a token is no vision token.
        """
        values = np.asarray(tokens)
        _check_range(values, self.vision_offset, self.size, "vision token")
        return values.astype(np.int64) - self.vision_offset

    def is_vision(self, tokens: IntArray) -> npt.NDArray[np.bool_]:
        """Tokens of any shape -> which of them are vision tokens."""
        values = np.asarray(tokens)
        return (values >= self.vision_offset) & (values < self.size)

    def is_text(self, tokens: IntArray) -> npt.NDArray[np.bool_]:
        """Tokens of any shape -> which of them are text ids."""
        values = np.asarray(tokens)
        return (values >= 0) & (values < self.num_text)

    def special_strings(self) -> dict[int, str]:
        """Id -> exact string of each of the 211 special tokens."""
        return {self.num_text + index: string for index, string in enumerate(SPECIAL_STRINGS)}

    def vision_string(self, code: int) -> str:
        """A code -> the exact string that published token lists give it."""
        _check_range(np.asarray(code), 0, self.num_codes, "code")
        return f"<|visual token {code:06d}|>"

    def to_json(self) -> str:
        """This vocabulary as one line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> "Vocabulary":
        """What `to_json` wrote -> the vocabulary.

        Raises: ConfigError if the text is anything else.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"a vocabulary is not JSON: {error}") from error
        expected = {"num_codes", "num_text"}
        if not isinstance(values, dict) or set(values) != expected or not all(type(v) is int for v in values.values()):
            raise ConfigError(f"found {text[:200]!r}, expected a JSON object of the integers num_text and num_codes")
        return Vocabulary(**values)

    def _extra(self, index: int) -> int:
        return self.num_text + _FIRST_EXTRA + index


def _check_range(values: IntArray, low: int, high: int, name: str) -> None:
    if values.size and not np.issubdtype(values.dtype, np.integer):
        raise SchemaError(f"found {name}s of type {values.dtype}, expected integers")
    if values.size and (int(values.min()) < low or int(values.max()) >= high):
        found = f"{int(values.min())}..{int(values.max())}"
        raise SchemaError(f"found {name}s in {found}, expected {low}..{high - 1}: they belong to another vocabulary")


EMU3 = Vocabulary(num_text=151_643, num_codes=32_768)
