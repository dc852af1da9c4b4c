"""Text to ids and back: the published byte-pair vocabulary, and a small one trained on the spot.

Neither knows special tokens: whatever a text contains, its ids are ordinary text.
"""

import base64
import binascii
import json
import tempfile
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from schemas.errors import ConfigError
from schemas.vocabulary import Vocabulary

# Qwen's split: contractions, letters, single digits, punctuation runs, line breaks, spaces.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
EMU3_FILE = "emu3.tiktoken"
TINY_FILE = "text_tokenizer.json"
NUM_BYTES = 256


class TextTokenizer(Protocol):
    """A `TextCodec` that knows its size and can be stored beside the weights that were trained with it."""

    @property
    def num_text(self) -> int:
        """Number of ids."""
        ...

    def encode(self, text: str) -> list[int]:
        """Text -> ids below `num_text`."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Ids -> text; bytes that are no UTF-8 become the replacement character."""
        ...

    def to_json(self) -> str:
        """The serialisation that the `tokenizers` library reads: the same ids for every text."""
        ...

    def save(self, folder: Path) -> None:
        """Write the one file that `load_text_tokenizer` reads."""
        ...


def hub_tokenizer(text: TextTokenizer, vocabulary: Vocabulary) -> str:
    """A text tokenizer -> `tokenizer.json` with the same ids for every text, BOS before each.

    All control and vision tokens have their strings, so that ids decode; none is recognised inside a text.
    """
    values = json.loads(text.to_json())
    ids = {string: token for token, string in vocabulary.special_strings().items()}
    ids |= {vocabulary.vision_string(code): vocabulary.vision_offset + code for code in range(vocabulary.num_codes)}
    values["model"]["vocab"] |= ids
    values["added_tokens"] = []
    bos = vocabulary.special_strings()[vocabulary.bos]
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [start, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {bos: {"id": bos, "ids": [vocabulary.bos], "tokens": [bos]}},
    }
    return json.dumps(values, ensure_ascii=False)


class Emu3TextTokenizer:
    """The published tokenizer, from its tiktoken file: lines of base64 bytes and a rank. Text is NFC-normalised.

    Raises: ConfigError if the file is missing or is no such file.
    """

    def __init__(self, path: Path) -> None:
        import tiktoken  # here: half a second that a command line without text does not want

        try:
            self._file = Path(path).read_bytes()
            ranks = {
                base64.b64decode(line.split()[0], validate=True): int(line.split()[1])
                for line in self._file.splitlines()
                if line.strip()
            }
        except OSError as error:
            raise ConfigError(f"the text tokenizer {path} cannot be read: {error}") from error
        except (ValueError, IndexError, binascii.Error) as error:
            raise ConfigError(f"{path} is no tiktoken file (lines of base64 bytes and a rank): {error}") from error
        if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) < NUM_BYTES:
            raise ConfigError(f"{path} holds {len(ranks)} ranks, expected each of 0..n-1 once and at least {NUM_BYTES}")
        # No special tokens are registered, so none can be recognised inside ordinary text.
        self._encoding = tiktoken.Encoding("emu3", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
        self._num_text = len(ranks)

    @property
    def num_text(self) -> int:
        """Number of ids, 151,643 for the published file."""
        return self._num_text

    def encode(self, text: str) -> list[int]:
        """Text -> ids."""
        return self._encoding.encode_ordinary(unicodedata.normalize("NFC", text))

    def decode(self, ids: list[int]) -> str:
        """Ids -> text."""
        return self._encoding.decode(ids, errors="replace")

    def to_json(self) -> str:
        """The serialisation that the `tokenizers` library reads: the same ids for every text."""
        from tokenizers import Regex, normalizers, pre_tokenizers
        from transformers.convert_slow_tokenizer import TikTokenConverter

        with tempfile.NamedTemporaryFile(suffix=f".{EMU3_FILE}") as file:
            file.write(self._file)
            file.flush()
            converted: Any = TikTokenConverter(vocab_file=file.name, extra_special_tokens=[]).converted()
        converted.normalizer = normalizers.NFC()
        converted.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        return str(converted.to_str())

    def save(self, folder: Path) -> None:
        """Write the tiktoken file, byte for byte."""
        (folder / EMU3_FILE).write_bytes(self._file)


class TinyBpe:
    """A byte-level BPE of any size, for models that train in minutes. Every string round-trips exactly."""

    def __init__(self, serialized: str) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_str(serialized)
        except Exception as error:  # the library raises plain Exception
            raise ConfigError(f"found no serialised text tokenizer: {error}") from error

    @staticmethod
    def train(texts: Iterable[str], num_text: int) -> "TinyBpe":
        """Texts -> a tokenizer of at most `num_text` ids (fewer if the texts hold fewer pairs worth merging).

        The same texts in the same order give the same tokenizer.

        Raises: ConfigError if `num_text` is below 256, one id for each byte.
        """
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

        if num_text < NUM_BYTES:
            raise ConfigError(f"found num_text {num_text}, expected at least {NUM_BYTES}: one id for each byte")
        tokenizer: Any = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=num_text, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        return TinyBpe(tokenizer.to_str())

    @staticmethod
    def load(path: Path) -> "TinyBpe":
        """A folder that `save` wrote to, or its file -> the tokenizer.

        Raises: ConfigError if there is none.
        """
        file = path / TINY_FILE if path.is_dir() else path
        try:
            return TinyBpe(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the text tokenizer {file} cannot be read: {error}") from error

    @property
    def num_text(self) -> int:
        """Number of ids."""
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        """Text -> ids."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        """Ids -> text."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def to_json(self) -> str:
        """The tokenizer's serialisation, which the constructor reads back."""
        return str(self._tokenizer.to_str())

    def save(self, path: Path) -> None:
        """Write the tokenizer into a folder, or to a file named `*.json`."""
        file = path if path.suffix == ".json" else path / TINY_FILE
        values = json.loads(self.to_json())
        file.write_text(json.dumps(values, ensure_ascii=False, indent=1), encoding="utf-8")


def load_text_tokenizer(folder: Path) -> Emu3TextTokenizer | TinyBpe:
    """A checkpoint folder -> the text tokenizer stored in it.

    Raises: ConfigError if there is none.
    """
    if (folder / EMU3_FILE).exists():
        return Emu3TextTokenizer(folder / EMU3_FILE)
    if (folder / TINY_FILE).exists():
        return TinyBpe.load(folder)
    raise ConfigError(f"found no text tokenizer in {folder}, expected {EMU3_FILE} or {TINY_FILE}")
