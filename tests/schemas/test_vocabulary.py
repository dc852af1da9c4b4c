"""The id space against the published ids, and at other sizes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import ConfigError, SchemaError
from schemas.vocabulary import EMU3, Vocabulary

VOCABULARIES = st.builds(Vocabulary, num_text=st.integers(1, 200_000), num_codes=st.integers(1, 65_536))


def test_emu3_has_the_published_ids() -> None:
    assert EMU3.size == 184_622
    published = {
        "pad": 151643,
        "eol": 151846,
        "eof": 151847,
        "tms": 151848,
        "bos": 151849,
        "eos": 151850,
        "img": 151851,
        "boi": 151852,
        "eoi": 151853,
        "vision_offset": 151854,
    }
    assert {name: getattr(EMU3, name) for name in published} == published
    assert EMU3.code_to_token(np.array([0, 32767])).tolist() == [151854, 184621]


def test_emu3_special_strings_are_the_published_ones() -> None:
    strings = EMU3.special_strings()
    assert sorted(strings) == list(range(151643, 151854))
    assert strings[151644] == "<|im_start|>"
    assert strings[151646] == "<|extra_0|>"
    assert strings[EMU3.eol] == "<|extra_200|>"
    assert strings[EMU3.eos] == "<|extra_204|>"
    assert strings[EMU3.img] == "<|image token|>"
    assert strings[EMU3.boi] == "<|image start|>"
    assert strings[EMU3.eoi] == "<|image end|>"
    assert len(set(strings.values())) == 211
    assert EMU3.vision_string(7) == "<|visual token 000007|>"


@given(VOCABULARIES, st.data())
def test_codes_and_tokens_are_inverse(vocabulary: Vocabulary, data: st.DataObject) -> None:
    codes = np.array(data.draw(st.lists(st.integers(0, vocabulary.num_codes - 1), min_size=1)))
    tokens = vocabulary.code_to_token(codes)
    assert tokens.dtype == np.uint32
    assert vocabulary.is_vision(tokens).all()
    assert not vocabulary.is_text(tokens).any()
    assert np.array_equal(vocabulary.token_to_code(tokens), codes)


@given(VOCABULARIES)
def test_every_id_is_text_special_or_vision(vocabulary: Vocabulary) -> None:
    edges = [0, vocabulary.num_text - 1, vocabulary.num_text, vocabulary.eoi, vocabulary.vision_offset]
    edges.append(vocabulary.size - 1)
    assert vocabulary.is_text(np.array(edges)).tolist() == [True, True, False, False, False, False]
    assert vocabulary.is_vision(np.array(edges)).tolist() == [False, False, False, False, True, True]
    assert Vocabulary.from_json(vocabulary.to_json()) == vocabulary


def test_ids_of_another_vocabulary_are_refused() -> None:
    small = Vocabulary(num_text=300, num_codes=16)
    with pytest.raises(SchemaError, match=r"0\.\.15"):
        small.code_to_token(np.array([3, 16]))
    with pytest.raises(SchemaError, match="vision token"):
        small.token_to_code(np.array([small.eol]))
    with pytest.raises(SchemaError, match="float64"):
        small.code_to_token(np.array([1.0]))
    with pytest.raises(ConfigError, match="num_codes"):
        Vocabulary(num_text=300, num_codes=0)
    with pytest.raises(ConfigError, match="num_text"):
        Vocabulary.from_json('{"num_text": 3}')
