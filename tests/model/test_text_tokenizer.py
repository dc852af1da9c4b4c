"""Text tokenizers: every string round-trips, no special token comes out, the split is the published one."""

import base64
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.text_tokenizer import EMU3_FILE, SPLIT_PATTERN, Emu3TextTokenizer, TinyBpe, load_text_tokenizer
from schemas.errors import ConfigError
from schemas.vocabulary import EMU3

TEXTS = ["a red circle moves left on a white background", "a blue square stays still, 64*64, 24 fps"] * 3
BPE = TinyBpe.train(TEXTS, 320)
HOSTILE = [*EMU3.special_strings().values(), EMU3.vision_string(0)]
STRINGS = st.one_of(st.text(), st.lists(st.sampled_from([*HOSTILE, " ", "\n", "a"])).map("".join))


def write_tiktoken(path: Path, merges: tuple[bytes, ...] = ()) -> Emu3TextTokenizer:
    """A file of the published form: one rank for each byte, then merges."""
    parts = [bytes([value]) for value in range(256)] + list(merges)
    path.write_text("".join(f"{base64.b64encode(part).decode()} {rank}\n" for rank, part in enumerate(parts)))
    return Emu3TextTokenizer(path)


@given(STRINGS)
def test_every_string_round_trips(text: str) -> None:
    ids = BPE.encode(text)
    assert BPE.decode(ids) == text
    assert all(0 <= index < BPE.num_text for index in ids)


def test_training_is_deterministic_and_merges_what_is_frequent() -> None:
    assert 256 < BPE.num_text <= 320
    assert len(BPE.encode(TEXTS[0])) < len(TEXTS[0]) / 2
    assert TinyBpe.train(TEXTS, 320).encode(TEXTS[0]) == BPE.encode(TEXTS[0])
    assert TinyBpe.train([], 256).num_text == 256
    with pytest.raises(ConfigError, match="at least 256"):
        TinyBpe.train(TEXTS, 255)


def test_saved_tokenizers_are_equal_byte_for_byte(tmp_path: Path) -> None:
    BPE.save(tmp_path)
    again = load_text_tokenizer(tmp_path)
    assert again.encode("a red square <|endoftext|>") == BPE.encode("a red square <|endoftext|>")
    before = next(tmp_path.iterdir()).read_bytes()
    TinyBpe.train(TEXTS, 320).save(tmp_path)
    assert next(tmp_path.iterdir()).read_bytes() == before


def test_published_form_knows_no_special_tokens(tmp_path: Path) -> None:
    tokenizer = write_tiktoken(tmp_path / EMU3_FILE)
    assert tokenizer.num_text == 256
    for string in HOSTILE:
        assert tokenizer.encode(string) == list(string.encode())
    assert tokenizer.decode(tokenizer.encode("naïve 日本 \r\n")) == "naïve 日本 \r\n"
    assert tokenizer.decode([0xFF]) == "\ufffd"


def test_published_form_normalises_and_splits_as_published(tmp_path: Path) -> None:
    merges = (b"90", b" 9", b"*9", b"(w", b".\n", b"'S", b"e\xcc\x81", b"\xc3\xa9")
    tokenizer = write_tiktoken(tmp_path / EMU3_FILE, merges)
    rank = {merge: 256 + index for index, merge in enumerate(merges)}
    assert tokenizer.encode("90*90") == [57, 48, 42, 57, 48]  # digits stand alone, whatever could be merged
    assert tokenizer.encode(" 9") == [32, 57]
    assert tokenizer.encode("(w") == [rank[b"(w"]]
    assert tokenizer.encode(".\n") == [rank[b".\n"]]
    assert tokenizer.encode("IT'S") == [73, 84, rank[b"'S"]]
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é") == [rank[b"\xc3\xa9"]]


@given(st.text(alphabet=st.sampled_from("ab  \n\r'sTt(.;_-12ÄÜ日é!?\t"), max_size=20))
def test_pieces_of_the_published_split_are_encoded_apart(text: str) -> None:
    pieces = pytest.importorskip("regex").findall(SPLIT_PATTERN, text)
    assert "".join(pieces) == text
    assert [index for piece in pieces for index in BPE.encode(piece)] == BPE.encode(text)


def test_published_form_is_saved_byte_for_byte(tmp_path: Path) -> None:
    tokenizer = write_tiktoken(tmp_path / "some.tiktoken", (b"ab",))
    (tmp_path / "checkpoint").mkdir()
    tokenizer.save(tmp_path / "checkpoint")
    assert (tmp_path / "checkpoint" / EMU3_FILE).read_bytes() == (tmp_path / "some.tiktoken").read_bytes()
    assert load_text_tokenizer(tmp_path / "checkpoint").encode("abab") == [256, 256]


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no text tokenizer"):
        load_text_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        Emu3TextTokenizer(tmp_path / "missing")
    file = tmp_path / EMU3_FILE
    for content in ("YQ==\n", "YQ== x\n", "§ 0\n", "YQ== 1\n"):
        file.write_text(content)
        with pytest.raises(ConfigError, match="rank"):
            Emu3TextTokenizer(file)
    (tmp_path / "text_tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="no serialised"):
        TinyBpe.load(tmp_path)
