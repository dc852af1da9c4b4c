"""Packing reads what it was asked to read, and equal inputs give equal ids."""

import json
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from jobs.curate import curate, read_set
from jobs.pack import PackRecipe, materialise, pack_sets, text_tokenizer_from_json
from pipeline.rules import Bounds, CurateRecipe
from schemas.captions import CAPTIONS
from schemas.catalog import Lake
from schemas.document import VisionDocument, parse_document
from schemas.errors import ConfigError
from schemas.identity import clip_id
from schemas.media import LOCATIONS
from schemas.runs import ATTEMPTS, RUNS
from schemas.sequences import SEQUENCE_SETS, SEQUENCES
from schemas.texts import TEXTS
from schemas.vision_tokens import VISION_TOKENS
from schemas.vocabulary import Vocabulary
from tests.jobs.test_curate import RECIPE, expected, fill
from train.batches import SequenceFile

NUM = 12
PACK = PackRecipe(context_len=128, num_codes=16, text_tokenizer={"kind": "tiny_bpe", "num_text": 300})
ALL = CurateRecipe(resolution=Bounds(low=1))


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    """The sets `kept` and `all`, captioned, with tokens by `tok` of every clip, and one text."""
    made = Lake(tmp_path / "lake")
    fill(made, range(NUM))
    curate(made, RECIPE, "kept")
    curate(made, ALL, "all")
    captions, tokens = [], []
    for clip in read_set(made, "all")["clip_id"].to_pylist():
        codes = np.arange(4, dtype="<u2").tobytes()
        span = {"window_start_ms": 0, "window_end_ms": 2000}
        captions.append(
            {"clip_id": clip, "window": 0, "captioner_id": "c", "text": "a cat", "engine": "provided", **span}
        )
        grid = {"kind": "image", "t": 1, "h": 2, "w": 2}
        tokens.append({"clip_id": clip, "tokenizer_id": "tok", **grid, "codes": codes, "crc32": zlib.crc32(codes)})
    made.append(CAPTIONS, captions, "c")
    made.append(VISION_TOKENS, tokens, "t")
    made.append(TEXTS, [{"text_id": "one", "text": "words of one text", "uri": "/a.txt", "row": 0}], "i")
    return made


def test_a_set_is_packed_whole(lake: Lake) -> None:
    report = pack_sets(lake, ["kept"], PACK, "kept", None)
    assert (report.num_without_caption, report.num_too_long, report.already_there) == (0, 0, False)
    segments = [item for row in lake.read(SEQUENCES, ["segments"])["segments"].to_pylist() for item in row]
    assert sorted(item["item_id"] for item in segments) == sorted([*expected(range(NUM)), "one"])


def test_equal_inputs_have_equal_ids(lake: Lake) -> None:
    first = pack_sets(lake, ["kept", "all"], PACK, "one", "tok")
    assert pack_sets(lake, ["all", "kept", "kept"], PACK, "two", None).seqset_id == first.seqset_id
    assert pack_sets(lake, ["all", "kept"], PACK, "one", "tok").already_there


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"tokenizer_id": "nope"}, r"no clip of the sets has vision tokens by 'nope'; there are those of \['tok'\]"),
        ({"name": ""}, "sequence set name"),
        ({"name": "a b/../c"}, "sequence set name"),
        ({"recipe": PACK.model_copy(update={"num_codes": 3})}, "found the vision code 3, and num_codes is 3"),
        ({"set_names": ["nothing"]}, "nothing"),
    ],
)
def test_what_cannot_be_packed_takes_no_name(lake: Lake, asked: dict[str, object], said: str) -> None:
    wanted = {"set_names": ["kept"], "recipe": PACK, "name": "mine", "tokenizer_id": "tok", **asked}
    with pytest.raises(ConfigError, match=said):
        pack_sets(lake, **wanted)
    assert len(lake.read(SEQUENCE_SETS)) == 0


def test_texts_may_be_split_and_are_then_never_too_long(lake: Lake) -> None:
    lake.append(TEXTS, [{"text_id": "long", "text": "all work and no play " * 40, "uri": "/b.txt", "row": 0}], "i")
    recipe = PACK.model_copy(update={"context_len": 64})
    whole = pack_sets(lake, ["kept"], recipe, "whole", None)
    split = pack_sets(lake, ["kept"], recipe.model_copy(update={"split_texts": True}), "split", None)
    assert (whole.num_too_long, split.num_too_long) == (1, 0)
    rows = lake.read_where(SEQUENCES, "seqset_id", [split.seqset_id], ["segments", "num_tokens"]).to_pylist()
    segments = [item for row in rows for item in row["segments"]]
    assert sum(item["item_id"] == "long" for item in segments) > 1
    assert sorted({item["item_id"] for item in segments}) == sorted([*expected(range(NUM)), "one", "long"])
    assert max(row["num_tokens"] for row in rows) <= 64


def test_a_mixture_says_how_often_documents_are_packed(lake: Lake) -> None:
    def counts(name: str, **mixture: float) -> Counter[str]:
        report = pack_sets(lake, ["kept", "all"], PACK.model_copy(update={"mixture": mixture}), name, None)
        rows = lake.read_where(SEQUENCES, "seqset_id", [report.seqset_id], ["segments"]).to_pylist()
        return Counter(item["item_id"] for row in rows for item in row["segments"])

    kept, every = set(expected(range(NUM))), set(read_set(lake, "all")["clip_id"].to_pylist())
    assert kept < every
    found = counts("some", kept=2.5, texts=0.0)
    assert {found[one] for one in every - kept} == {1}
    assert {found[one] for one in kept} == {2, 3}
    assert "one" not in found
    # What one document weighs is nothing to another.
    more = counts("more", kept=2.5, all=0.0, texts=3.0)
    assert {one: more[one] for one in kept} == {one: found[one] for one in kept}
    assert more["one"] == 3
    assert not set(more) & (every - kept)
    assert "mixture" not in PACK.model_dump()
    with pytest.raises(ConfigError, match=r"found mixture.keep, expected one of the packed sets \['all', 'kept'\]"):
        counts("wrong", keep=1.0)
    with pytest.raises(ConfigError, match="nothing to pack"):
        counts("nothing", kept=0.0, all=0.0, texts=0.0)


def test_a_later_set_is_written_in_the_ids_of_an_earlier_one(lake: Lake) -> None:
    first = pack_sets(lake, ["all"], PACK, "first", None)
    lake.append(TEXTS, [{"text_id": "two", "text": "zebras quietly zigzag", "uri": "/b.txt", "row": 0}], "i")
    plain, like = (pack_sets(lake, ["kept"], PACK, f"kept-{name}", None, like=name) for name in (None, "first"))
    rows = {row["seqset_id"]: row for row in lake.read(SEQUENCE_SETS).to_pylist()}
    assert rows[like.seqset_id]["text_tokenizer"] == rows[first.seqset_id]["text_tokenizer"]
    assert rows[plain.seqset_id]["text_tokenizer"] != rows[first.seqset_id]["text_tokenizer"]
    assert rows[like.seqset_id]["vocabulary"] == rows[first.seqset_id]["vocabulary"]
    assert pack_sets(lake, ["kept"], PACK, "kept-first", None, like="first").already_there
    told = [json.loads(row["inputs"]).get("like") for row in lake.read(RUNS, ["inputs"]).to_pylist()]
    assert first.seqset_id in told
    with pytest.raises(ConfigError, match="a model that read it knows no others"):
        pack_sets(lake, ["kept"], PACK.model_copy(update={"num_codes": 17}), "other", None, like="first")
    with pytest.raises(ConfigError, match="there is no sequence set 'nothing'"):
        pack_sets(lake, ["kept"], PACK, "other", None, like="nothing")


def test_captions_are_those_of_the_captioner_asked_for_and_none_that_failed_a_check(lake: Lake) -> None:
    clips = expected(range(NUM))
    span = {"window": 0, "window_start_ms": 0, "window_end_ms": 2000, "engine": "vllm"}
    better = [{"clip_id": clip, "captioner_id": "d1", "text": f"a cat of {clip}", **span} for clip in clips]
    lake.append(
        CAPTIONS, [{**row, "problem": "refusal" if row["clip_id"] == clips[0] else None} for row in better], "d"
    )
    report = pack_sets(lake, ["kept"], PACK.model_copy(update={"captioner": "d"}), "better", "tok")
    assert report.num_without_caption == 1
    segments = [item for row in lake.read(SEQUENCES, ["segments"])["segments"].to_pylist() for item in row]
    assert sorted(item["item_id"] for item in segments) == sorted([*clips[1:], "one"])


def test_conversations_about_clips_are_packed_and_the_others_have_reasons(lake: Lake, tmp_path: Path) -> None:
    places = [
        {"location_id": f"{number}", "media_id": f"{number:016x}", "uri": f"/media/{number}.png", "licence": None}
        for number in range(NUM)
    ]
    lake.append(LOCATIONS, places, "i")
    said = [{"from": "human", "value": "Colour?"}, {"from": "gpt", "value": "red"}]
    more = [*said, {"from": "human", "value": "Shape?"}, {"from": "gpt", "value": "circle"}]
    rows: list[object] = [
        {"image": "/media/0.png", "conversations": more},
        {"image": "/media/0.png", "conversations": more},  # the same again is the same document
        {"image": ["/media/2.png", "/media/4.png"], "conversations": said},
        {"conversations": said},
        {"image": "/media/none.png", "conversations": said},
        {"image": "/media/3.png", "conversations": said},  # not in the set
        {"image": "/media/0.png", "conversations": said[:1]},
        {"image": "/media/0.png", "conversations": [said[0], {"from": "gpt", "value": "long " * 200}]},
    ]
    path = tmp_path / "said.json"
    path.write_text(json.dumps(rows))
    report = pack_sets(lake, ["kept"], PACK, "chat", None, [path])
    assert (report.num_conversations_refused, report.num_too_long) == (3, 1)
    stored = lake.read(SEQUENCES).to_pylist()
    chats = [(row, chat) for row in stored for chat in row["chats"] or ()]
    assert [row["segments"][chat["document"]]["kind"] for row, chat in chats] == ["chat"] * 3
    zero, two, four = (clip_id(f"{number:016x}", 0, 0) for number in (0, 2, 4))
    assert sorted(tuple(chat["clip_ids"]) for _, chat in chats) == sorted([(zero,), (two, four), ()])
    text = text_tokenizer_from_json(lake.read(SEQUENCE_SETS)["text_tokenizer"][0].as_py())
    answers = []
    for row, chat in chats:
        tokens = np.frombuffer(row["tokens"], "<u4")
        spans = [tokens[span["offset"] : span["offset"] + span["length"]] for span in chat["answers"]]
        answers.append(tuple(text.decode(span[:-1].tolist()) for span in spans))
    assert sorted(answers) == [("red",), ("red",), ("red", "circle")]
    reasons = {row["error_class"] for row in lake.read(ATTEMPTS).to_pylist()}
    assert reasons == {"UnknownMedium", "NoSingleClip", "BrokenConversation", "DocumentTooLong"}
    file = SequenceFile(materialise(lake, "chat"))
    assert sum(len(file.answers(row)) for row in range(len(file))) == 4
    assert pack_sets(lake, ["kept"], PACK, "chat", None, [path]).already_there
    assert pack_sets(lake, ["kept"], PACK, "plain", None).seqset_id != report.seqset_id


def test_a_share_of_the_captions_stands_after_its_picture(lake: Lake) -> None:
    def forms(name: str, **options: object) -> dict[str, tuple[str, bool]]:
        pack_sets(
            lake,
            ["all"],
            PackRecipe.model_validate({**PACK.model_dump(), "include_texts": False, **options}),
            name,
            None,
        )
        row = lake.read_where(SEQUENCE_SETS, "name", [name]).to_pylist()[0]
        text, vocabulary = text_tokenizer_from_json(row["text_tokenizer"]), Vocabulary.from_json(row["vocabulary"])
        found = {}
        for stored in lake.read_where(SEQUENCES, "seqset_id", [row["seqset_id"]]).to_pylist():
            tokens = np.frombuffer(stored["tokens"], "<u4")
            for part in stored["segments"]:
                document = parse_document(tokens[part["offset"] : part["offset"] + part["length"]], vocabulary, text)
                assert isinstance(document, VisionDocument)
                found[part["item_id"]] = (document.caption, document.caption_last)
        assert len(found) == NUM
        return found

    assert set(forms("none").values()) == {("a cat", False)}
    assert set(forms("every", understanding={"image": 1.0}, null_prompt_ratio=0.9).values()) == {("a cat", True)}
    half = forms("half", understanding={"image": 0.5, "video": 1.0}, null_prompt_ratio=0.9)
    assert {last for _, last in half.values()} == {False, True}
    assert forms("again", understanding={"image": 0.5, "video": 1.0}, null_prompt_ratio=0.9) == half
    assert "understanding" not in PACK.model_dump()
